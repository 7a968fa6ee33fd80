"""Reading the pickles that data sets are published as, without executing anything.

CIFAR-10 in the layout that torchvision keeps (``cifar-10-batches-py``) is five pickles. ``pickle``
would run whatever such a file asks for; here the standard library's disassembler lists the file's
instructions, and the few that lists, dictionaries, numbers, texts, bytes and arrays of bytes are
made of are carried out by hand. Anything else is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from culpa.errors import IntegrityError

VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG1", "LONG", "SHORT_BINUNICODE", "BINUNICODE"),
    *("SHORT_BINSTRING", "BINSTRING", "STRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
"""Instructions whose argument is the value."""
FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
MADE = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
"""The names a file may mention, and what they stand for; nothing is imported by them."""
LENGTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Named:
    """A name in a file, or an object under construction: ``kind`` says which."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.value: Any = None


def read_plain_pickle(file: Path) -> Any:
    """What is in the file: lists, dictionaries, tuples, numbers, text, bytes, uint8 arrays.

    Text of Python 2 comes as ``bytes`` encoded in Latin-1 or as ``str``, whichever it is.

    Raises:
        IntegrityError: if the file is no pickle, or asks for anything else.
    """
    try:
        return _Reader().read(file.read_bytes())
    except IntegrityError as error:
        raise IntegrityError(f"{file} is refused: {error}") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{file} is damaged, or no pickle: {error}.") from error


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        for code, argument, _ in pickletools.genops(data):
            if code.name == "STOP":
                return _finished(self.stack.pop())
            self._do(code.name, argument)
        raise IntegrityError("it ends without a result.")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in FIXED:
            stack.append(FIXED[name]())
        elif name in LENGTHS:
            self._tuple(len(stack) - LENGTHS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            self._tuple(self.marks.pop())
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_Named(_kind(argument or " ".join((stack.pop(-2), stack.pop())))))
        elif name == "REDUCE":
            arguments, made = stack.pop(), stack.pop()
            stack.append(_called(made, arguments))
        elif name == "BUILD":
            state, made = stack.pop(), stack[-1]
            _built(made, state)
        else:
            raise IntegrityError(f"it holds the instruction {name}, which no plain data needs.")

    def _tuple(self, start: int) -> None:
        self.stack[start:] = [tuple(self.stack[start:])]

    def _fill(self, name: str) -> None:
        single = {"APPEND": 1, "SETITEM": 2}
        start = len(self.stack) - single[name] if name in single else self.marks.pop()
        items = [_finished(item) for item in self.stack[start:]]
        del self.stack[start:]
        target = self.stack[-1]
        if name.startswith("APPEND"):
            target.extend(items)
        else:
            target.update(zip(items[::2], items[1::2], strict=True))


def _kind(mentioned: str) -> str:
    if mentioned not in MADE:
        raise IntegrityError(f"it asks for {mentioned.replace(' ', '.')}, which is no plain data.")
    return MADE[mentioned]


def _called(made: _Named, arguments: tuple[Any, ...]) -> Any:
    if made.kind == "encode":
        return str(arguments[0]).encode(str(arguments[1]))
    if made.kind == "dtype" and arguments[0] not in ("u1", b"u1", "|u1"):
        raise IntegrityError(f"it has an array of type {arguments[0]!r}; unsigned bytes are read.")
    return _Named(made.kind)


def _built(made: _Named, state: tuple[Any, ...]) -> None:
    """An array's state is (version, shape, type, column-major, bytes); a type's does not matter."""
    if made.kind == "array":
        _, shape, kind, columns, content = state
        if columns or not isinstance(kind, _Named) or kind.kind != "dtype":
            raise IntegrityError("it has an array that is not of unsigned bytes, row by row.")
        raw = content if isinstance(content, bytes) else str(content).encode("latin-1")
        made.value = np.frombuffer(raw, np.uint8).reshape(shape)


def _finished(value: Any) -> Any:
    return value.value if isinstance(value, _Named) else value
