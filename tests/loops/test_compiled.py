"""Compiled modules: recorded as they are, differentiated through the module they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import culpa
from oracles.compare import assert_bitwise, assert_close, assert_tree_close, difference
from oracles.problems import cross_entropy, log_likelihoods, seeded, smooth
from oracles.recipes import DECAYING, sgd
from oracles.retrain import parameters_of

BATCHES = smooth({0: sgd()}, DECAYING).batches


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.3), nn.Linear(7, 3)
    ).double()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_is_recorded_and_its_original_differentiated(
    backend: str, tmp_path: Path
) -> None:
    batches = BATCHES[:6]
    model = seeded(0, net)()
    compiled = torch.compile(model, backend=backend)
    optimizer = SGD(model.parameters(), lr=0.002, momentum=0.9)
    torch.manual_seed(0)

    def through(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loop's loss, of the compiled module; of another module that is given, of that."""
        return cross_entropy(compiled if module is model else module, batch)

    with culpa.record(tmp_path / "run", culpa.Problem(model, through), optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            cross_entropy(compiled, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    plain = culpa.Problem(seeded(3, net)(), cross_entropy)
    assert_bitwise(culpa.replay(run, plain).state, parameters_of(model))
    behaviour = culpa.Behaviour("test", log_likelihoods, batches[-1])
    scores = culpa.attribute(run, plain, [behaviour]).steps[:, 0]
    effects = [culpa.replay(run, plain, without=[k]).effect(behaviour).mean() for k in range(6)]
    assert_close(scores, torch.stack(effects), 0.1)
    start = parameters_of(seeded(0, net)())
    moved = difference(parameters_of(model), start)
    assert_tree_close(culpa.embed(run, plain)["training"], moved, 1e-12)
