"""Optimizer classes by name, built again from a record, and their state as tensors.

A run folder names a class and executes nothing: a bare name is looked up in ``torch.optim``, any
other among the classes that the user gave to ``Problem(optimizers=...)``.

Plain numbers in an optimizer's state are kept as 0-dim tensors whose slot says their type
(``"count:int"``), so that the class finds again what it had left there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from culpa.errors import UnsupportedError
from culpa.tree import Slots

REFUSED = {
    "LBFGS": "it evaluates the loss an unknown number of times inside one step",
    "SparseAdam": "its sparse gradients have no dense state",
}
_NUMBERS: dict[type, torch.dtype] = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float64,
}
_TYPES = {kind.__name__: kind for kind in _NUMBERS}
_OUTSIDE_OF_GROUPS = ("initial_accumulator_value",)
"""What classes of ``torch.optim`` read from their constructor's defaults, not from the group."""


def qualified_name(found: type[Optimizer]) -> str:
    """What a record calls a class: ``"Adam"`` of torch.optim, ``"my.module.Mine"`` otherwise."""
    if getattr(torch.optim, found.__name__, None) is found:
        return found.__name__
    return f"{found.__module__}.{found.__qualname__}"


def optimizer_class(name: str, given: Sequence[type[Optimizer]] = ()) -> type[Optimizer]:
    """The class that a record calls ``name``.

    Args:
        name: see ``qualified_name``.
        given: the user's classes. One of a script (``__main__``) is recognised without its module.

    Raises:
        UnsupportedError: for a class that is neither in torch.optim nor given, and for those
            refused by name.
    """
    if name in REFUSED:
        raise UnsupportedError(f"torch.optim.{name} cannot be recorded: {REFUSED[name]}.")
    found = None if name == "Optimizer" else getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, Optimizer):
        return found
    exact = [one for one in given if qualified_name(one) == name]
    scripts = [
        one
        for one in given
        if name.endswith(f".{one.__qualname__}")
        and "__main__" in (one.__module__, name.partition(".")[0])
    ]
    if exact or scripts:
        return (exact + scripts)[0]
    has, short = ", ".join(map(qualified_name, given)) or "none", name.rpartition(".")[2]
    raise UnsupportedError(
        f"the optimizer {name!r} is not a class of torch.optim, and a record executes no code of"
        f" its own. Give the class: culpa.Problem(model, loss, optimizers=({short},))"
        f" (given: {has}). Subclasses of torch's classes are classes of their own."
    )


def build(found: type[Optimizer], members: Sequence[Mapping[str, Any]]) -> Optimizer:
    """A new optimizer with the param groups ``members`` (hyperparameters included).

    Raises:
        UnsupportedError: if its constructor takes something that is in no param group.
    """
    ours = getattr(torch.optim, found.__name__, None) is found
    known = inspect.signature(found.__init__).parameters
    first = members[0] if members else {}
    keywords = {
        name: value
        for name, value in first.items()
        if name != "params" and name in known and (not ours or name in _OUTSIDE_OF_GROUPS)
    }
    try:
        return found([dict(member) for member in members], **keywords)  # pyright: ignore[reportCallIssue]
    except TypeError as error:
        if ours:
            raise
        raise UnsupportedError(
            f"{qualified_name(found)} could not be built again from its param groups ({error}). Its"
            " constructor must take param groups first, and every other argument must be one of"
            f" the hyperparameters it keeps there: {', '.join(sorted(first)) or 'none'}."
        ) from error


def gather_slots(optimizer: Any, names: Mapping[Tensor, str]) -> Slots:
    """The live state of an optimizer by slot and parameter name; numbers as 0-dim tensors.

    Raises:
        UnsupportedError: if the state holds something other than tensors, numbers and ``None``, or
            belongs to no parameter.
    """
    slots: Slots = {}
    for param, state in optimizer.state.items():
        if not isinstance(param, Tensor) or param not in names:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps state under {str(param)[:60]!r}, which is no"
                " parameter it trains; only state[parameter][slot] can be recorded."
            )
        for slot, value in state.items():
            if value is not None:
                key, tensor = as_tensor(slot, value, type(optimizer).__name__)
                slots.setdefault(key, {})[names[param]] = tensor
    return slots


def as_tensor(slot: str, value: Any, owner: str) -> tuple[str, Tensor]:
    """A slot's value as it is kept; tensors are the very same."""
    if isinstance(value, Tensor):
        return slot, value
    if type(value) not in _NUMBERS:
        raise UnsupportedError(
            f"{owner} keeps a {type(value).__name__} in its state slot {slot!r}; only tensors and"
            " plain numbers can be recorded."
        )
    return f"{slot}:{type(value).__name__}", torch.tensor(value, dtype=_NUMBERS[type(value)])


def as_kept(slot: str, tensor: Tensor) -> tuple[str, Any]:
    """The inverse of ``as_tensor``: what the class itself calls the slot, and its value."""
    name, _, kind = slot.rpartition(":")
    return (name, _TYPES[kind](tensor.item())) if name and kind in _TYPES else (slot, tensor)
