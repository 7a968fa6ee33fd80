"""Run an optimizer's own ``step`` so that autograd sees all of it, whatever the step does to hide.

Most steps run under ``torch.no_grad()``, many write through ``.data``, read numbers with
``.item()``, and change tensors in place that autograd has saved. The map from the state before to
the state after is smooth all the same. Inside ``Through`` every call of torch is recorded, and:

* ``.data`` and ``.detach()`` are the tensor itself; assigning ``.data`` copies into it;
* ``.item()`` of what depends on an input is a number that still does (number.py);
* a cast to half precision is left out: the derivative is that of the step without its rounding;
* the root of 0 is 0 and has DEFINED derivative 0, as in ``adam.py``; such coordinates are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from culpa.dynamics.updates.number import Number, unwrapped

_HALF = (torch.float16, torch.bfloat16)
_ROOTS = {"sqrt": 0.5, "sqrt_": 0.5, "pow": None, "pow_": None, "__pow__": None, "__ipow__": None}
_SCALED = ("add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_")


class Through(TorchFunctionMode):
    """See the top of this file. Use it around ``optimizer.step()``.

    Args:
        recording: whether autograd records; otherwise the same values, without derivatives.

    Attributes:
        singular: roots taken so far at 0 or below, by coordinate.
        rounded: whether a cast to half precision was left out.
    """

    def __init__(self, recording: bool = True) -> None:
        super().__init__()
        self.recording = recording
        self.singular = 0
        self.rounded = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One call of torch."""
        with torch.set_grad_enabled(self.recording):
            return self._call(_name(func), func, args, dict(kwargs or {}))

    def _call(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in ("get data", "detach", "detach_"):
            return args[0]
        if name == "set data":
            args[0].copy_(args[1])
            return None
        if name == "__float__":
            return args[0].tolist()  # lost, without torch's warning
        if name == "item" and args[0].requires_grad:
            return Number.of(args[0].reshape(()))
        if name in _ROOTS and isinstance(args[0], Tensor):
            power = _exponent(name, args, kwargs)
            if power is not None:
                return self._root(args[0], power, in_place=name.endswith("_") and name[0] != "_")
        if name in ("_foreach_sqrt", "_foreach_sqrt_"):
            return [self._root(x, 0.5, in_place=name.endswith("_")) for x in args[0]]
        if self._is_rounding(name, args, kwargs):
            self.rounded = True
            return args[0].clone()
        if name in _SCALED:
            args, kwargs = _scaled(args, kwargs)
        return func(*map(unwrapped, args), **{k: unwrapped(v) for k, v in kwargs.items()})

    def _root(self, x: Tensor, power: float, *, in_place: bool) -> Tensor:
        """x^power, and 0 with derivative 0 where x <= 0."""
        positive = x > 0
        self.singular += int((~positive).sum())
        # The root of 1 where x <= 0 keeps the infinite derivative from arising.
        root = torch.where(positive, torch.where(positive, x, 1.0) ** power, 0.0)
        return x.copy_(root) if in_place else root

    def _is_rounding(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        wanted = name in ("bfloat16", "half") or (
            name in ("to", "type") and any(a in _HALF for a in (*args[1:], *kwargs.values()))
        )
        return wanted and args[0].dtype in (torch.float32, torch.float64)


def _name(func: Any) -> str:
    """What is called: ``"add_"``; ``"get data"`` for a property."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')} {getattr(func.__self__, '__name__', '')}"
    return name


def _exponent(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The exponent of a root, between 0 and 1; ``None`` if the call takes none."""
    power = _ROOTS[name]
    if power is None:
        power = args[1] if len(args) > 1 else kwargs.get("exponent")
    return float(power) if isinstance(power, float) and 0.0 < power < 1.0 else None


def _scaled(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``alpha=`` and ``value=`` that depend on an input, as factors: torch takes numbers only."""
    for key in ("alpha", "value"):
        if isinstance(kwargs.get(key), Number):
            factor = kwargs.pop(key).tensor
            return (args[0], args[1] * factor, *args[2:]), kwargs
    return args, kwargs


@contextmanager
def in_place_allowed() -> Generator[None]:
    """Let the step change tensors that autograd has saved: copies are saved instead."""

    def keep(value: Tensor) -> Tensor:
        return value.clone()

    def give(value: Tensor) -> Tensor:
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield
