"""Attribution on another device than the CPU, which is simulated (tests/devices.py).

The same kernels compute, so every number must be the one that the CPU gives, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, optim

import culpa
from culpa import behaviours
from devices import Distant, accelerator, moved
from elsewhere import Training, batch, problem_of

TRAININGS = {
    "momentum": Training(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), micro_batches=2),
    "kept": Training(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), updates=6),
    "adamw": Training(lambda p: optim.AdamW(p, lr=0.02), normalises=True, clips=True),
    "dropout": Training(lambda p: optim.AdamW(p, lr=0.02), drops=True, frozen=True),
    "generic": Training(lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5), updates=1),
}


class Asked(NamedTuple):
    """A run and what to ask of it, all on one device."""

    run: culpa.Run
    problem: culpa.Problem
    place: Callable[[Any], Any]
    folder: Path

    def points(self, seed: int = 3) -> Any:
        """Test points."""
        return self.place(batch(torch.Generator().manual_seed(seed), 7))

    @property
    def behaviours(self) -> list[culpa.Behaviour]:
        """Two of them."""
        first = culpa.log_likelihood("right", self.points())
        return [first, behaviours.margin("margin", self.points(4))]


def here(value: Any) -> Any:
    """It stays where it is."""
    return value


def _attributed(asked: Asked, **options: Any) -> Any:
    found = culpa.attribute(asked.run, asked.problem, asked.behaviours, **options)
    grades = [(one.grade, one.growth, one.residual) for one in found.trust]
    return found.steps, found.stages, found.examples, found.spread, found.strategy, grades


def _embedded(asked: Asked, **options: Any) -> Any:
    made = culpa.embed(asked.run, asked.problem, **options)
    made.save(asked.folder / "embeddings")
    read = culpa.StageEmbeddings.load(asked.folder / "embeddings", asked.problem)
    return [_facts(asked, made), _facts(asked, read)]


def _facts(asked: Asked, made: culpa.StageEmbeddings) -> Any:
    one = asked.behaviours[0]
    names = list(made)
    without = made.counterfactual(names[0])
    observed = asked.run.final_state()
    return (
        [dict(made[name]) for name in names],
        *(made.score(one), made.effect(one), made.observed(one)),
        *(without, {n: observed[n] - without[n] for n in observed}),
        *(culpa.by_layer(made, one), culpa.effect_by_layer(made, one, points=2)),
        *(made.statistics, list(made.trust.values())),
    )


def _side(asked: Asked) -> Any:
    found = culpa.replay_many(asked.run, asked.problem, ["one", "two"], side_by_side=True)
    return [(one.state, one.claim) for one in found]


def _audited(asked: Asked, **options: Any) -> Any:
    audit = culpa.audit(asked.run, asked.problem, asked.behaviours, **options)
    return [line for line in audit.table().splitlines() if line.startswith(("|", "*"))]


def _from_checkpoints(asked: Asked) -> Any:
    run, stages = asked.run, asked.run.stages
    ends = [0, *(stage.stop for stage in stages)]
    data = [one for k in (0, 7) for one in run.batches_of(k)]
    described = [
        culpa.CheckpointStage(s.name, data, steps=len(s), learning_rate=0.1, momentum=0.9)
        for s in stages
    ]
    known = culpa.from_checkpoints([asked.place(run.state(k).params) for k in ends], described)
    made = culpa.embed(known, asked.problem)
    return _facts(asked, made), culpa.compare_with_recording(made, run, asked.problem)


QUESTIONS: dict[str, tuple[str, Callable[[Asked], Any]]] = {
    "examples": ("momentum", partial(_attributed, examples=True)),
    "read from the record": ("kept", _attributed),
    "order 2": ("generic", partial(_attributed, examples=True, order=2)),
    "smoothing": ("dropout", partial(_attributed, smoothing=culpa.Smoothing(1))),
    "restart": ("dropout", partial(_attributed, counterfactual="restart")),
    "zero-gradient": ("adamw", partial(_attributed, counterfactual="zero-gradient")),
    "generic": ("generic", partial(_attributed, examples=True)),
    "differences": (
        "momentum",
        partial(_attributed, propagator=culpa.Exact("finite-difference"), examples=True),
    ),
    "checked": ("momentum", partial(_attributed, propagator=culpa.Exact("checked-difference"))),
    "forward": ("momentum", partial(_attributed, propagator=culpa.Exact("forward-over-reverse"))),
    "Gauss-Newton": (
        "momentum",
        partial(_attributed, propagator=culpa.GaussNewton(), examples=True),
    ),
    "identity": ("dropout", partial(_attributed, propagator=culpa.Identity(), examples=True)),
    "held elsewhere": ("dropout", partial(_attributed, hold=culpa.OnCpu())),
    "held rounded": ("dropout", partial(_attributed, hold=culpa.InMemory(torch.bfloat16))),
    "rounded elsewhere": ("dropout", partial(_attributed, hold=culpa.OnCpu(torch.bfloat16))),
    "embed": ("adamw", _embedded),
    "embed generic": ("generic", _embedded),
    "embed by replay": ("adamw", partial(_embedded, stages=["one", "two"])),
    "embed order 2": ("generic", partial(_embedded, order=2)),
    "additive": ("adamw", partial(_embedded, form="additive", stages=["two"])),
    "secant": ("momentum", partial(_embedded, propagator=culpa.Secant(0.5))),
    "secant without": (
        "dropout",
        partial(_embedded, propagator=culpa.Secant(1.0), counterfactual="zero-gradient"),
    ),
    "checkpoints": ("kept", _from_checkpoints),
    "side by side": ("kept", _side),
    "audit": ("momentum", _audited),
    "audit without replays": ("dropout", partial(_audited, budget=0.0)),
    "updates": ("dropout", lambda a: str(culpa.find_updates(a.run, a.problem, a.behaviours[:1]))),
    "noise": ("adamw", lambda a: culpa.noise_floor(a.run, a.problem, a.behaviours).effects),
    "subsets": ("adamw", lambda a: culpa.interactions(a.run, a.problem, a.behaviours).values),
    "DVEmb": ("kept", lambda a: culpa.dvemb(a.run, a.problem, a.behaviours)),
}
"""By name, of which training, and what."""
QUICK = {
    *("read from the record", "identity", "held elsewhere", "embed by replay", "secant without"),
    *("side by side", "updates", "noise", "DVEmb", "order 2", "additive"),
}
"""Those that together see what was ever found to be on the wrong device."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: Any) -> Callable[..., Asked]:
    """A training's run, recorded once on each device, with a problem there."""
    made: dict[Any, Asked] = {}

    def ask(kind: str, place: Callable[[Any], Any]) -> Asked:
        if (kind, place) not in made:
            folder = tmp_path_factory.mktemp(kind)
            keep = culpa.All() if kind == "kept" else None
            run = TRAININGS[kind].recorded(folder / "run", place, checkpoints=keep)
            problem = problem_of(place(TRAININGS[kind].model()))
            made[kind, place] = Asked(run, problem, place, folder)
        return made[kind, place]

    return ask


@pytest.fixture(autouse=True)
def there() -> Iterator[None]:
    with accelerator():
        yield


def plain(value: Any) -> Any:
    """What a result holds, as containers; every tensor must be on the CPU."""
    assert not isinstance(value, Distant), "a result is on the device"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        return value.nan_to_num().tolist(), str(value.dtype)
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else repr(value)


@pytest.mark.parametrize(
    "question", [q if q in QUICK else pytest.param(q, marks=pytest.mark.slow) for q in QUESTIONS]
)
def test_answers_on_a_device_are_those_on_the_cpu(
    question: str, asked: Callable[..., Asked]
) -> None:
    kind, ask = QUESTIONS[question]
    assert plain(ask(asked(kind, moved))) == plain(ask(asked(kind, here)))
