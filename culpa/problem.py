"""The training problem: a model and the loss its loop minimises, as a function of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from culpa.errors import OptionError, ProblemError
from culpa.shortcuts import without_shortcuts
from culpa.swap import Places
from culpa.tree import Tree

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch) -> scalar``: what the loop calls ``.backward()`` on for one micro-batch."""
Function = Callable[[nn.Module, Any], Any]
"""Any function of a model and a batch that a user wrote; what it returns is checked afterwards."""


class Problem:
    """What a training loop minimises.

    Args:
        model: the module that is trained. culpa borrows it for replays and products and leaves it
            as it found it. Of a ``DistributedDataParallel`` the module inside is meant, and
            ``culpa.record`` sees how its gradients are reduced (docs/distributed.md). One that
            ``fully_shard`` was applied to can be recorded; all else takes the module as it was.
        loss: ``loss(model, batch) -> scalar tensor``, exactly what the loop calls ``.backward()``
            on for one micro-batch. It must use the ``model`` it is given.
        example_losses: optional ``example_losses(model, batch) -> [B]`` whose mean is ``loss``;
            needed for scores of single training examples.
        optimizers: the optimizer classes, outside of torch.optim, that the run was trained with.
            A record names them and holds no code.

    Raises:
        OptionError: if ``model`` is no module, a loss is not callable, or an optimizer is no class
            of optimizers.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        example_losses: Loss | None = None,
        *,
        optimizers: Sequence[type[torch.optim.Optimizer]] = (),
    ) -> None:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                f"Problem(model=...) must be a torch.nn.Module, got {type(model).__name__}. "
                "Pass the module itself, not its parameters or its class."
            )
        for name, function in (("loss", loss), ("example_losses", example_losses)):
            if function is not None and not callable(function):
                raise OptionError(
                    f"Problem({name}=...) must be a function (model, batch) -> tensor, "
                    f"got {type(function).__name__}."
                )
        for one in optimizers:
            if not (isinstance(one, type) and issubclass(one, torch.optim.Optimizer)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionError(
                    "Problem(optimizers=...) takes subclasses of torch.optim.Optimizer, got"
                    f" {one!r}. Pass the class itself, not an optimizer."
                )
        self.wrapper = model if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model if self.wrapper is None else self.wrapper.module
        self._places = Places(self.model)
        self.loss = loss
        self.example_losses = example_losses
        self.optimizers = tuple(optimizers)

    @staticmethod
    def by_stage(problems: Mapping[str, Problem]) -> StagedProblem:
        """One problem for every stage, by the stage's name: pre-train and fine-tune, say.

        Give it to ``culpa.record`` (its stages then find their loss by name), or to whatever walks
        a run again that was recorded with ``recorder.stage(name, problem=...)``.

        Raises:
            OptionError: without problems, or if they are not of one and the same module.
        """
        return StagedProblem(problems)

    def of(self, stage: str) -> Problem:
        """The problem of a stage: this one, of every stage."""
        return self

    def require_stages(self, stages: Collection[str], losses: int, complete: bool) -> None:
        """Raise ``ProblemError`` unless this is what a run with these stages was recorded with.

        Args:
            stages: the run's.
            losses: how many problems it was recorded with.
            complete: whether there cannot be further stages.
        """
        if losses > 1:
            raise ProblemError(
                f"the run was recorded with {losses} problems, one after another, and one was"
                " given. Pass culpa.Problem.by_stage({name: problem, ...}) with the stages"
                f" {', '.join(map(repr, stages))}."
            )

    def evaluate(self, batch: Any) -> Tensor:
        """The loss of one micro-batch at the model as it is, checked to be a finite scalar."""
        value = check_loss(self.loss(self.model, batch))
        number = float(value.detach())
        if not math.isfinite(number):
            raise ProblemError(
                f"the loss is {number}, which is not finite. Nothing can be "
                "attributed in a run that diverged: lower the learning rate or clip gradients."
            )
        return value

    def loss_at(self, params: Mapping[str, Tensor], buffers: Tree, batch: Any) -> Tensor:
        """The loss as a pure function, differentiable in ``params``."""
        return check_loss(self.call_at(self.loss, params, buffers, batch))

    def example_losses_at(self, params: Mapping[str, Tensor], buffers: Tree, batch: Any) -> Tensor:
        """The losses of the examples of a micro-batch, shape ``[B]``, as a pure function."""
        return self.example_losses_in(params, _copied(buffers), batch)

    def example_losses_in(self, params: Mapping[str, Tensor], buffers: Tree, batch: Any) -> Tensor:
        """As ``example_losses_at``, but modules read and write the very tensors ``buffers``."""
        if self.example_losses is None:
            raise OptionError(
                "examples=True needs Problem(model, loss, example_losses=...): a function "
                "(model, batch) -> [B] whose mean is the loss."
            )
        losses = self.call_in(self.example_losses, params, buffers, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ProblemError(
                f"example_losses(model, batch) must return a tensor of shape [B], got {got}. "
                "Use reduction='none' and do not average."
            )
        return losses

    def call_at(
        self, function: Function, params: Mapping[str, Tensor], buffers: Tree, batch: Any
    ) -> Any:
        """``function(model, batch)`` with the model's tensors replaced, the model untouched."""
        return self.call_in(function, params, _copied(buffers), batch)

    def call_in(
        self, function: Function, params: Mapping[str, Tensor], buffers: Tree, batch: Any
    ) -> Any:
        """As ``call_at``, but modules read and write the very tensors ``buffers``."""
        with without_shortcuts(), self._places.swapped({**params, **buffers}):
            return function(self.model, batch)


def _copied(buffers: Tree) -> Tree:
    # A module in train mode writes its running statistics into what it is given.
    return {name: value.clone() for name, value in buffers.items()}


class StagedProblem(Problem):
    """A problem for every stage; made by ``culpa.Problem.by_stage``."""

    def __init__(self, problems: Mapping[str, Problem]) -> None:
        for name, problem in problems.items():
            if not isinstance(problem, Problem) or isinstance(problem, StagedProblem):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptionError(
                    f"Problem.by_stage takes a culpa.Problem for every stage, got a"
                    f" {type(problem).__name__} for {name!r}."
                )
        models = {id(problem.model) for problem in problems.values()}
        if len(models) != 1:
            raise OptionError(
                f"Problem.by_stage takes problems of one and the same module, got {len(models)}"
                f" modules for {len(problems)} stages. Build the model once; parts that train later"
                " can be there from the beginning."
            )
        first = next(iter(problems.values()))
        graded = all(problem.example_losses for problem in problems.values())
        super().__init__(
            first.wrapper or first.model,
            _stage_unknown,
            _stage_unknown if graded else None,
            optimizers=tuple(dict.fromkeys(c for p in problems.values() for c in p.optimizers)),
        )
        self.problems = dict(problems)

    def of(self, stage: str) -> Problem:
        """The problem of a stage; raises ``ProblemError`` for a stage that has none."""
        if stage not in self.problems:
            raise ProblemError(
                f"Problem.by_stage has no problem for stage {stage!r}, only for"
                f" {', '.join(map(repr, self.problems))}."
            )
        return self.problems[stage]

    def require_stages(self, stages: Collection[str], losses: int, complete: bool) -> None:
        """Raise ``ProblemError`` unless every stage has a problem, and every problem a stage."""
        for stage in stages:
            self.of(stage)
        unknown = [name for name in self.problems if name not in stages]
        if unknown and complete:
            raise ProblemError(
                f"Problem.by_stage names the stage {unknown[0]!r}, which the run has not; its"
                f" stages are {', '.join(map(repr, stages))}."
            )


def _stage_unknown(_model: nn.Module, _batch: Any) -> Tensor:
    raise ProblemError(
        "this problem has one loss for every stage, and no stage was named: problem.of(stage)."
    )


def check_loss(value: Any) -> Tensor:
    """Return ``value`` if it is a scalar floating-point tensor, else say what it is."""
    if not isinstance(value, Tensor):
        raise ProblemError(
            f"loss(model, batch) must return a scalar tensor, got {type(value).__name__}. "
            "Return the tensor you call .backward() on."
        )
    if value.ndim != 0 or not value.is_floating_point():
        raise ProblemError(
            f"loss(model, batch) must return a scalar floating-point tensor, got shape "
            f"{tuple(value.shape)} and dtype {value.dtype}. Reduce it with .mean() or .sum(), "
            "as your loop does before .backward()."
        )
    return value
