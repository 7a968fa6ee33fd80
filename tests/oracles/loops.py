"""One way to hold a training loop against the truth: recorded, replayed and attributed.

``Loop.train(driver, model)`` is the loop, written once. It builds its own optimizers, so the driver
is opened by the function ``open`` that it is given: under ``culpa.record``, or as ``Skipping``,
which retrains without some updates and shares nothing with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import culpa
from oracles.compare import assert_bitwise, assert_close, assert_tree_close, difference
from oracles.retrain import behaviour_values, buffers_of, parameters_of
from oracles.skipping import Skipping

Open = Callable[..., AbstractContextManager[Any]]
"""``open(problem, optimizer or optimizers, **options of culpa.record)`` -> the driver."""


@dataclass(frozen=True)
class Loop:
    """A loop: ``model()`` builds the module, ``train(model, open)`` trains it.

    ``problem(model)`` is what replays and estimators are given; ``behaviour(model, batch) -> [n]``.
    """

    model: Callable[[], nn.Module]
    train: Callable[[nn.Module, Open], None]
    problem: Callable[[nn.Module], Any]
    behaviour: Callable[[nn.Module, Any], Tensor]
    test: Any
    seed: int = 0

    def retrain(self, without: Collection[int] = ()) -> nn.Module:
        """The model that training without some updates ends with."""
        model = self.model()

        @contextmanager
        def opened(problem: Any, optimizers: Any, **_: Any) -> Generator[Skipping]:
            listed = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
            yield Skipping(model, listed, frozenset(without))

        torch.manual_seed(self.seed)
        self.train(model, opened)
        return model

    def record(self, path: Path) -> tuple[Any, nn.Module]:
        """The opened run, and the trained model."""
        model = self.model()
        torch.manual_seed(self.seed)

        def opened(problem: Any, optimizers: Any, **options: Any) -> Any:
            return culpa.record(path, problem, optimizers, **options)

        self.train(model, opened)
        return culpa.open_run(path), model

    def scrambled(self) -> Any:
        """The problem around a module of other weights: all it needs must come from the record."""
        model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5).add_(0.25)
        return self.problem(model)

    def value(self, without: Collection[int] = ()) -> Tensor:
        """The mean of the behaviour after training without some updates, float64."""
        return behaviour_values(self.retrain(without), self.behaviour, self.test).mean()


def assert_replayed(loop: Loop, path: Path) -> tuple[Any, Any]:
    """Recording changes nothing; replay gives the same bits, and those of retraining by stage."""
    run, trained = loop.record(path)
    plain = loop.retrain()
    assert_bitwise(parameters_of(trained), parameters_of(plain))
    problem = loop.scrambled()
    again = culpa.replay(run, problem)
    assert_bitwise(again.state, parameters_of(plain))
    assert_bitwise(run.final_state(), parameters_of(plain))
    if buffers_of(plain):
        assert_bitwise(again.buffers, buffers_of(plain))
    for stage in run.stages:
        found = culpa.replay(run, problem, without=stage.name)
        assert_bitwise(found.state, parameters_of(loop.retrain(stage.updates)))
    run.verify(problem, level="replay")
    return run, problem


def assert_modelled(
    loop: Loop,
    run: Any,
    problem: Any,
    *,
    carried: float = 1e-9,
    first_order: float = 0.05,
    dual: float = 1e-5,
) -> Any:
    """The sweeps say what retraining says.

    ``Secant(1)`` carries a stage's displacement exactly, so its embeddings are retraining's up to
    rounding (``carried``); scores of single updates are first order in the learning rate, within
    ``first_order`` of the true effects in norm, and the tangent sweep's up to rounding (``dual``).
    """
    end = parameters_of(loop.retrain())
    names = set(run.state(0).params)
    found = culpa.embed(run, problem, propagator=culpa.Secant(1))
    for stage in run.stages:
        without = parameters_of(loop.retrain(stage.updates))
        expected = {n: v for n, v in difference(end, without).items() if n in names}
        assert_tree_close(found[stage.name], expected, carried)
    behaviour = culpa.Behaviour("test", loop.behaviour, loop.test)
    exact = culpa.Exact(hvp="reverse-over-reverse")
    scores = culpa.attribute(run, problem, [behaviour], propagator=exact)
    whole = loop.value()
    truth = torch.stack([whole - loop.value([k]) for k in range(run.num_steps)])
    assert_close(scores.steps[:, 0], truth, first_order)
    additive = culpa.embed(run, problem, form="additive", propagator=exact)
    assert_close(scores.stages[:, 0], additive.score(behaviour).mean(1), dual)
    return scores
