"""A second device on a machine that has none: tensors that say they are on an accelerator.

Their numbers are in the CPU's memory and computed by its kernels, so that every result equals
that of the CPU bit for bit; but torch refuses to mix them with tensors of the CPU wherever CUDA
does. The device is called ``lazy:0``: of the types that torch knows without hardware behind them
it is the one whose backward passes run in the calling thread, as those of the CPU do. What is mixed
up in C++, inside of ``backward`` and of ``torch.func`` is seen as well: every operator passes here.

What it cannot see: kernels of CUDA that do not exist, are not deterministic or round otherwise; its
generators (random numbers come from the CPU's, and a ``torch.Generator`` is always of the wrong
device); streams, pinned and asynchronous copies, memory; code that asks for ``"cuda"`` by name, as
GradScaler, autocast and fused optimizers do; a cotangent on the wrong device, until it meets a
tensor; whether an operator takes two numbers of the CPU; several accelerators.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from culpa.trajectory import forms, layout

ACCELERATOR = torch.device("lazy", 0)
_CPU = torch.device("cpu")
_ACROSS = ("copy_", "_to_copy", "to", "is_same_size", "_has_same_storage_numel")
"""Operators whose tensors may be on different devices."""
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
"""Operators that take indices from the CPU."""
_FILLING = ("fill", "fill_", "masked_fill", "masked_fill_")
"""Operators that are not elementwise for torch, and take a number of the CPU."""


class Distant(Tensor):
    """A tensor on the accelerator; ``near`` has its numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> Distant:
        """Of the same shape, strides and type."""
        made = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=ACCELERATOR,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator on such tensors."""
        return _run(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA's."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor"
            " to host memory first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        """Numbers go anywhere."""
        return self.near.tolist()

    def data_ptr(self) -> int:
        """Where its numbers are."""
        return self.near.data_ptr()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check that the operator's tensors are where they must be, and compute on the CPU."""
    given = [*_tensors(args), *_tensors(kwargs.values())]
    _require_one_device(func, args, given)
    wanted = kwargs.get("device")
    if wanted is not None and wanted.type == ACCELERATOR.type:
        kwargs = kwargs | {"device": _CPU}
    there = wanted is None or wanted.type == ACCELERATOR.type
    if there and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    near = {name: _near(value) for name, value in kwargs.items()}
    found = func(*(_near(value) for value in args), **near)
    if not there:
        return found
    found = _distant(found)
    if not given or not _about(func).aliases:
        return found
    return return_and_correct_aliasing(func, args, kwargs, found)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _near(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_near(one) for one in value]
    return value.near if isinstance(value, Distant) else value


def _distant(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_distant(one) for one in value)
    return Distant(value) if isinstance(value, Tensor) else value


def _maker(name: str) -> Callable[..., Any]:
    func = torch.ops.aten
    for part in name.split("."):
        func = getattr(func, part)

    def make(*args: Any, **kwargs: Any) -> Any:
        return _run(func, args, {"device": ACCELERATOR} | kwargs)

    return make


_LIBRARY = torch.library.Library("aten", "IMPL", "Lazy")  # kernels go with it
for _name in ("empty.memory_format", "empty_strided.default", "arange.start_step"):
    _LIBRARY.impl(_name.removesuffix(".default"), _maker(_name))
_LIBRARY.impl("_efficientzerotensor", _maker("zeros.default"))  # it would have no memory
_LIBRARY.impl("_copy_from", lambda one, into, _=False: (_near(into).copy_(_near(one)), into)[1])


def _require_one_device(func: Any, args: Sequence[Any], given: Sequence[Tensor]) -> None:
    """Raise what CUDA raises, unless it would compute."""
    about = _about(func)
    if about.name in _ACROSS:
        return
    if about.name.startswith("_foreach_"):
        rows = [[*_tensors(one)] for one in args if isinstance(one, list | tuple)]
        for at in range(max(map(len, rows), default=0)):
            _require_same(about, [row[at] for row in rows if at < len(row)])
        return
    if about.name in _INDEXING and isinstance(given[0], Distant):
        given = [one for one in given if one.dtype not in (torch.int64, torch.int32, torch.bool)]
    _require_same(about, given)


def _require_same(about: _About, given: Sequence[Tensor]) -> None:
    near = [one for one in given if not isinstance(one, Distant)]
    if len(near) in (0, len(given)):
        return
    written = about.writes and given[0] is near[0]
    if written or not about.takes_numbers or any(one.ndim for one in near):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0"
            f" and cpu! ({about.name})"
        )


class _About(NamedTuple):
    """What matters of an operator."""

    name: str
    aliases: bool
    writes: bool
    takes_numbers: bool


@cache
def _about(func: Any) -> _About:
    schema = func._schema
    name: str = schema.name.removeprefix("aten::")
    numbers = torch.Tag.pointwise in func.tags or name in (*_FILLING, *_INDEXING)
    aliases = any(argument.alias_info for argument in schema.arguments)
    return _About(name, aliases, schema.is_mutable, numbers or name.startswith("_foreach_"))


def _is_autocast_enabled(device: str = "cpu") -> bool:
    """As torch answers; ``lazy`` has no autocast."""
    return device != ACCELERATOR.type and _AUTOCAST(device)


_AUTOCAST = torch.is_autocast_enabled


@contextmanager
def accelerator() -> Generator[torch.device]:
    """Inside, batches may be recorded there, and autocast may be asked about."""
    known = (*layout.DEVICES, ACCELERATOR.type)
    with (
        patch.object(layout, "DEVICES", known),
        patch.object(forms, "DEVICES", known),
        patch.object(torch, "is_autocast_enabled", _is_autocast_enabled),
    ):
        yield ACCELERATOR


def moved(value: Any) -> Any:
    """A module, or tensors, on the accelerator."""
    if isinstance(value, nn.Module):
        return value.to(ACCELERATOR)
    if isinstance(value, Tensor):
        return value.to(ACCELERATOR)
    if isinstance(value, dict):
        return {name: moved(one) for name, one in value.items()}
    return type(value)(moved(one) for one in value)
