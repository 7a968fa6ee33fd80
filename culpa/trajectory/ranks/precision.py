"""FSDP2's ``MixedPrecisionPolicy``: a model that is computed in other dtypes than it is kept in.

A sharded module's parameters are cast when they are gathered, its floating-point inputs when it is
called, its outputs if the policy says so. Gradients are of the cast parameters; in which dtype they
are summed over the ranks is reduce.py's.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from culpa.problem import Loss, Problem
from culpa.trajectory.ranks.lent import Gathering, computed_in
from culpa.trajectory.schema import Precision, Reduction

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Casting(dict[str, Any]):
    """What a module holds of parameters: ``module.weight`` is cast, all else is as it lies.

    Cast once in a forward pass, so that gradients by several uses are added up in that dtype.
    """

    def __init__(
        self, own: Mapping[str, Any], made: dict[int, Tensor], to: Mapping[int, torch.dtype]
    ) -> None:
        super().__init__(own)
        self._made, self._to = made, to

    def __getitem__(self, key: str) -> Any:
        """The parameter, in the dtype that it is computed in."""
        held = super().__getitem__(key)
        if id(held) not in self._to:
            return held
        if id(held) not in self._made:
            self._made[id(held)] = held.to(self._to[id(held)])
        return self._made[id(held)]


def precision_of(reduction: Reduction | None) -> tuple[Precision, ...]:
    """Of the update that was reduced so."""
    return () if reduction is None else reduction.precision


@contextmanager
def computing(model: nn.Module, precision: Sequence[Precision]) -> Generator[None]:
    """Inside, the model computes as ``precision`` says. For one micro-batch."""
    if not precision:
        yield
        return
    to = {n: DTYPES[one.params] for one in precision if one.params for n in one.names}
    with ExitStack() as stack:
        stack.enter_context(computed_in(to))
        stack.enter_context(_casting(model, to))
        for one in precision:
            module = model.get_submodule(one.module)
            if one.inputs and one.params:
                hook = partial(_cast_inputs, DTYPES[one.params])
                handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if one.output:
                after = partial(_cast_output, DTYPES[one.output])
                stack.callback(module.register_forward_hook(after).remove)
        yield


@contextmanager
def _casting(model: nn.Module, to: Mapping[str, torch.dtype]) -> Generator[None]:
    held: list[tuple[nn.Module, dict[str, Any]]] = []
    by_id = {id(p): to[n] for n, p in model.named_parameters() if n in to}
    made: dict[int, Tensor] = {}
    try:
        for module in model.modules():
            own = module.__dict__["_parameters"]
            if own and not isinstance(own, Gathering):  # which casts what it gathers
                held.append((module, own))
                module.__dict__["_parameters"] = Casting(own, made, by_id)
        yield
    finally:
        for module, own in held:
            module.__dict__["_parameters"] = own


class Computed(Problem):
    """A problem whose losses are computed as a policy says; made by ``computed``."""

    def __init__(self, problem: Problem, loss: Loss, example_losses: Loss | None) -> None:
        self.__dict__.update(problem.__dict__)  # with the places that it has looked up
        self.loss, self.example_losses = loss, example_losses


def computed(problem: Problem, precision: Sequence[Precision]) -> Problem:
    """The problem with its losses computed as ``precision`` says."""
    if not precision or isinstance(problem, Computed):
        return problem

    def inside(function: Loss) -> Loss:
        def call(model: nn.Module, batch: Any) -> Tensor:
            with computing(model, precision):
                return function(model, batch)

        return call

    graded = problem.example_losses
    return Computed(problem, inside(problem.loss), None if graded is None else inside(graded))


def _cast_inputs(dtype: torch.dtype, _module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(dtype, args), _cast(dtype, kwargs)


def _cast_output(dtype: torch.dtype, _module: Any, _args: Any, output: Any) -> Any:
    return _cast(dtype, output)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    utils: Any = importlib.import_module("torch.distributed.utils")  # not in every build of torch

    def to(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return utils._apply_to_tensors(to, values)  # as FSDP2 looks for them
