"""A Python number that remembers the tensor it was read from, for steps that call ``.item()``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Number(float):
    """The value of a 0-dim tensor; arithmetic keeps the tensor, ``float()`` and ``math`` lose it.

    A subclass of float, since that is all that torch takes as ``alpha=`` or ``value=``.
    """

    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Number:
        """The number in a 0-dim tensor."""
        value: Any = tensor.tolist()  # a number, and not by item(), which is what is being undone
        number = cls(value)
        number.tensor = tensor.double()
        return number

    def _with(self, name: str, *others: Any) -> Any:
        value = getattr(self.tensor, name)(*map(unwrapped, others))
        scalar = isinstance(value, Tensor) and not any(isinstance(o, Tensor) for o in others)
        return Number.of(value) if scalar else value

    def __add__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__add__", other)

    def __radd__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__radd__", other)

    def __sub__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__sub__", other)

    def __rsub__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__rsub__", other)

    def __mul__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__mul__", other)

    def __rmul__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__rmul__", other)

    def __truediv__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__truediv__", other)

    def __rtruediv__(self, other: Any) -> Any:
        """See ``float``."""
        return self._with("__rtruediv__", other)

    def __pow__(self, other: Any, modulo: None = None) -> Any:
        """See ``float``."""
        return self._with("__pow__", other)

    def __neg__(self) -> Any:
        """See ``float``."""
        return self._with("__neg__")


def unwrapped(value: Any) -> Any:
    """The tensor of a ``Number``; anything else as it is."""
    return value.tensor if isinstance(value, Number) else value
