"""A stage's effect split by layer: the parts are right and add up to the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import culpa
from oracles.compare import assert_close
from oracles.problems import (
    cross_entropy,
    gelu_mlp,
    held_out,
    log_likelihoods,
    parameter_sums,
    seeded,
    smooth,
    turned_digits,
    unseen_digits,
)
from oracles.recipes import adamw
from oracles.recording import Recorded, record


class Scaled(nn.Module):
    """A parameter of its own, a frozen layer, a nested block."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(5, 6)
        self.block = nn.Sequential(nn.GELU(), nn.Linear(6, 7), nn.GELU())
        self.head = nn.Linear(7, 3)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.head(self.block(self.frozen(inputs)))


def trained_only(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.5)


def right() -> culpa.Behaviour:
    return culpa.Behaviour("right", log_likelihoods, held_out())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    plan = replace(
        smooth({0: trained_only}, [(0.2,)] * 12), model=seeded(3, lambda: Scaled().double())
    )
    return record(plan, tmp_path_factory.mktemp("layers") / "run")


@pytest.fixture(scope="module")
def embeddings(recorded: Recorded) -> culpa.StageEmbeddings:
    return culpa.embed(recorded.run, recorded.problem)


def test_layers_are_the_modules_that_hold_what_was_trained(
    embeddings: culpa.StageEmbeddings,
) -> None:
    split = culpa.by_layer(embeddings, right())
    # In the model's order; the frozen layer carries nothing, and is not among them.
    assert list(split) == ["gain", "block.1", "head"]
    assert list(culpa.effect_by_layer(embeddings, right()).layers) == list(split)
    assert all(v.shape == (3,) and v.dtype == torch.float64 for v in split.values())


def test_scores_by_layer_add_up_to_the_score(embeddings: culpa.StageEmbeddings) -> None:
    split = culpa.by_layer(embeddings, right())
    assert_close(sum(split.values(), torch.zeros(3)), embeddings.score(right()).mean(1), 1e-10)


def test_a_layer_s_score_is_the_score_of_its_displacement_alone(
    recorded: Recorded, embeddings: culpa.StageEmbeddings
) -> None:
    split = culpa.by_layer(embeddings, right())
    for layer, values in split.items():
        for at, stage in enumerate(embeddings):

            def mean(params: dict[str, Tensor]) -> Tensor:
                model = recorded.problem.model
                logits = functional_call(model, embeddings.final | params, held_out()[0])
                return logits.log_softmax(1).gather(1, held_out()[1][:, None]).mean()

            part = {
                n: v
                for n, v in embeddings[stage].items()
                if n == layer or n.startswith(f"{layer}.")
            }
            assert part
            at_end = {n: embeddings.final[n] for n in part}
            _, expected = torch.func.jvp(mean, (at_end,), (part,))
            assert_close(values[at], expected, 1e-10)


def test_a_linear_behaviour_is_split_by_reading_off(embeddings: culpa.StageEmbeddings) -> None:
    sums = culpa.Behaviour("sums", parameter_sums, None, unit="1")
    count = 7  # parameter tensors, of which the behaviour is the mean
    expected = torch.stack(
        [
            (embeddings[n]["head.weight"].sum() + embeddings[n]["head.bias"].sum())
            for n in embeddings
        ]
    )
    assert_close(culpa.by_layer(embeddings, sums)["head"], expected / count, 1e-10)
    # Linear: one point is enough, and both splits are the same.
    whole = culpa.effect_by_layer(embeddings, sums, points=1)
    assert_close(whole.layers["head"], expected / count, 1e-10)
    assert float(whole.residual.abs().max()) <= 1e-12


def test_effects_by_layer_add_up_and_report_what_is_left(
    embeddings: culpa.StageEmbeddings,
) -> None:
    effect = embeddings.effect(right()).mean(1)
    left: list[float] = []
    for points in (1, 2, 4, 8):
        split = culpa.effect_by_layer(embeddings, right(), points=points)
        assert split.stages == ("first", "second", "third")
        assert split.points == points
        assert_close(split.effect, effect, 1e-12)
        total = sum(split.layers.values(), torch.zeros(3)) + split.residual
        assert_close(total, effect, 1e-12)
        left.append(float(split.residual.norm() / effect.norm()))
    assert left[0] > 1e-4, "the displacement is too small for the quadrature to matter"
    assert left[0] > left[1] > left[2]
    assert max(left[2:]) < 1e-10


def test_the_default_is_eight_points(embeddings: culpa.StageEmbeddings) -> None:
    assert culpa.effect_by_layer(embeddings, right()).points == 8


def test_every_layer_s_integral_is_right(
    recorded: Recorded, embeddings: culpa.StageEmbeddings
) -> None:
    # Against the midpoint rule with many points, by another route through the model.
    split = culpa.effect_by_layer(embeddings, right())
    model, steps = recorded.problem.model, 400
    for at, stage in enumerate(embeddings):
        displacement = embeddings[stage]
        expected = dict.fromkeys(split.layers, 0.0)
        for step in range(steps):
            share = (step + 0.5) / steps
            leaves = {
                n: (embeddings.final[n] - share * d).requires_grad_()
                for n, d in displacement.items()
            }
            logits = functional_call(model, embeddings.final | leaves, held_out()[0])
            (-nn.functional.cross_entropy(logits, held_out()[1])).backward()
            for name, leaf in leaves.items():
                layer = next(x for x in expected if name == x or name.startswith(f"{x}."))
                assert leaf.grad is not None
                expected[layer] += float((leaf.grad * displacement[name]).sum()) / steps
        for layer, value in expected.items():
            assert float(split.layers[layer][at]) == pytest.approx(value, rel=1e-4, abs=1e-8)


def test_a_layer_s_effect_is_not_its_score_where_it_is_not_small(
    embeddings: culpa.StageEmbeddings,
) -> None:
    first = culpa.by_layer(embeddings, right())["head"]
    whole = culpa.effect_by_layer(embeddings, right()).layers["head"]
    assert float((first - whole).norm() / whole.norm()) > 1e-2


def test_single_precision_digits_and_a_saved_file(tmp_path: Path) -> None:
    plan = turned_digits(adamw(), 3e-3, lengths=(8, 4, 4), hidden=16)
    recorded = record(plan, tmp_path / "run")
    culpa.embed(recorded.run, recorded.problem).save(tmp_path / "stages.safetensors")
    bare = culpa.StageEmbeddings.load(tmp_path / "stages.safetensors")
    asked = culpa.log_likelihood("digits", unseen_digits(40))
    for function in (culpa.by_layer, culpa.effect_by_layer):
        with pytest.raises(culpa.OptionError, match="loaded without a problem"):
            function(bare, asked)
    found = culpa.StageEmbeddings.load(
        tmp_path / "stages.safetensors", culpa.Problem(gelu_mlp(16)(), cross_entropy)
    )
    state = torch.get_rng_state()
    split = culpa.effect_by_layer(found, asked)
    scores = culpa.by_layer(found, asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(split.layers) == list(scores) == ["0", "2", "4"]
    assert_close(sum(scores.values(), torch.zeros(3)), found.score(asked).mean(1), 1e-4)
    assert float(split.residual.norm() / split.effect.norm()) < 1e-3


def test_mistakes_are_named(embeddings: culpa.StageEmbeddings) -> None:
    for points in (0, -3, True):
        with pytest.raises(culpa.OptionError, match="points"):
            culpa.effect_by_layer(embeddings, right(), points=points)
    constant = culpa.Behaviour("constant", lambda m, b: torch.ones(2), None)
    with pytest.raises(culpa.OptionError, match="not differentiable"):
        culpa.by_layer(embeddings, constant)
