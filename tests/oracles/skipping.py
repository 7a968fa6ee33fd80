"""Skip-and-retrain for loops of any kind: the loop itself, run again with updates undone.

A loop is written once, as ``train(driver)``. Under ``culpa.record`` the driver is the recorder;
under ``Skipping`` it has the same three methods, and an update in ``without`` is executed like any
other and then taken back: parameters, buffers and the optimizers' state are put where they were
before its first micro-batch. Generators, schedules and batches advance as in the observed run.

Nothing of the library is imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Train = Callable[[Any], None]


@dataclass
class Skipping:
    """A driver that undoes the updates in ``without``; an update is one step of each optimizer."""

    model: nn.Module
    optimizers: list[Optimizer]
    without: Collection[int] = ()
    index: int = 0
    stages: dict[str, range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stepped = 0
        self._before: Any = None
        self._hooks: list[Any] = []
        self._watch(self.optimizers)

    @contextmanager
    def stage(self, name: str, *, optimizer: Any = None, problem: Any = None) -> Generator[None]:
        """Updates made inside; ``optimizer`` takes over."""
        if optimizer is not None:
            self._watch(optimizer if isinstance(optimizer, list) else [optimizer])
        start = self.index
        yield
        self._settle()
        self.stages[name] = range(start, self.index)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Each batch; whatever the loop did with the one before has ended."""
        for batch in loader:
            self._arrive()
            yield batch
        self._settle()

    @contextmanager
    def step(self, *_: Any, weights: Any = None) -> Generator[None]:
        """One update."""
        self._arrive()
        yield
        self._settle()

    def _arrive(self) -> None:
        self._settle()
        if self._before is None:
            self._before = self._snapshot()

    def _settle(self) -> None:
        if self._stepped < len(self.optimizers):
            return
        if self.index in self.without:
            self._restore(self._before)
        self.index, self._stepped, self._before = self.index + 1, 0, None

    def _snapshot(self) -> Any:
        tensors = {n: t.detach().clone() for n, t in self._tensors().items()}
        return tensors, [copy.deepcopy(o.state_dict()["state"]) for o in self.optimizers]

    def _restore(self, before: Any) -> None:
        tensors, states = before
        with torch.no_grad():
            for name, live in self._tensors().items():
                live.copy_(tensors[name])
        for optimizer, state in zip(self.optimizers, states, strict=True):
            numbered = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.state.clear()
            for number, slots in state.items():
                optimizer.state[numbered[number]] = slots

    def _tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _watch(self, optimizers: list[Optimizer]) -> None:
        for hook in self._hooks:
            hook.remove()
        self.optimizers = optimizers
        self._hooks = [o.register_step_post_hook(self._count) for o in optimizers]

    def _count(self, optimizer: Any, *_: Any) -> None:
        overflowed = getattr(optimizer, "found_inf", None)  # of a GradScaler, for a fused optimizer
        if overflowed is None or not bool(overflowed):
            self._stepped += 1
