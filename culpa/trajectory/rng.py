"""The state of every random number generator that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec
import numpy as np
import torch

from culpa.trajectory import memory


class RandomState(msgspec.Struct, frozen=True):
    """Python's, NumPy's (legacy global), and torch's generators, as bytes."""

    python: bytes
    numpy: bytes
    torch_cpu: bytes
    torch_cuda: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """Canonical bytes, for the store and for digests."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> RandomState:
        """The inverse of ``encode``; raises ``msgspec.ValidationError`` on anything else."""
        return msgspec.msgpack.decode(data, type=cls)


class _Asked:
    """A generator's state as bytes; asked for anew only where the memory it lies in has changed."""

    def __init__(self, ask: Callable[[], bytes]) -> None:
        self._ask = ask
        self._last: tuple[Any, bytes] | None = None

    def state(self, key: Any) -> bytes:
        """The state, given all of what it follows from; ``None``: that is not known."""
        last = self._last
        if last is not None and key is not None and key == last[0]:
            return last[1]
        found = self._ask()
        self._last = (key, found)
        return found


class _Global:
    """The global generators of Python and NumPy, and where they keep their words (memory.py)."""

    def __init__(self) -> None:
        self._python: Any = getattr(random.getstate, "__self__", None)
        self._numpy: Any = getattr(np.random.get_state, "__self__", None)
        self._python_at = memory.of_python(self._python)
        self._numpy_at = memory.of_numpy(self._numpy)
        self._asked_python, self._asked_numpy = _Asked(_ask_python), _Asked(_ask_numpy)
        self._torch_at = memory.of_torch(torch.default_generator)
        self._torch = torch.empty(0, dtype=torch.uint8), b""
        self._last: tuple[Any, RandomState] | None = None

    def state(self) -> RandomState:
        """Of all generators on the CPU: the same object as last time if none has moved."""
        key = self._read()
        if self._last is not None and key is not None and key == self._last[0]:
            return self._last[1]
        found = RandomState(self.python(), self.numpy(), self.torch())
        self._last = (key, found)
        return found

    def _read(self) -> Any:
        """What the states follow from, as it lies in memory; ``None``: that is not known."""
        python, numpy, torch_ = self._python_at, self._numpy_at, self._torch_at
        if python is None or numpy is None or torch_ is None:
            return None
        if numpy[0].owner is not self._numpy._bit_generator:
            return None  # np.random.set_bit_generator has replaced what was looked at
        numpys = numpy[0].there.raw, numpy[1].there.raw
        return python.there.raw, self._python.gauss_next, numpys, torch_.there.raw

    def python(self) -> bytes:
        at = self._python_at
        return self._asked_python.state(at and (at.read(), self._python.gauss_next))

    def numpy(self) -> bytes:
        at = self._numpy_at
        if at is not None and at[0].owner is not self._numpy._bit_generator:
            at = None
        return self._asked_numpy.state(at and (at[0].read(), at[1].read()))

    def torch(self) -> bytes:
        state = torch.default_generator.get_state()
        if not torch.equal(state, self._torch[0]):
            self._torch = state, state.numpy().tobytes()
        return self._torch[1]


@cache
def _global() -> _Global:
    return _Global()


def _ask_python() -> bytes:
    version, words, gauss = random.getstate()
    return msgspec.msgpack.encode([version, np.array(words, dtype=np.uint32).tobytes(), gauss])


def _ask_numpy() -> bytes:
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the user's own)
    words = np.asarray(keys, dtype=np.uint32).tobytes()
    return msgspec.msgpack.encode([str(kind), words, position, has_gauss, cached])


def capture() -> RandomState:
    """The generators as they are now: 2 microseconds, and 50 more where Python's or NumPy's moved.

    Parts that did not move since the last call are the same objects as then.
    """
    found = _global().state()
    if not torch.cuda.is_initialized():
        return found
    states = tuple(s.numpy().tobytes() for s in torch.cuda.get_rng_state_all())
    return msgspec.structs.replace(found, torch_cuda=states)


def restore(state: RandomState) -> None:
    """Set every generator to ``state``."""
    version, words, gauss = msgspec.msgpack.decode(state.python)
    random.setstate((version, tuple(np.frombuffer(words, dtype=np.uint32).tolist()), gauss))
    kind, keys, position, has_gauss, cached = msgspec.msgpack.decode(state.numpy)
    numpy_state: Any = (kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(numpy_state)  # noqa: NPY002 (the user's own generator)
    torch.set_rng_state(_byte_tensor(state.torch_cpu))
    if state.torch_cuda and torch.cuda.is_available():
        for device in range(min(len(state.torch_cuda), torch.cuda.device_count())):
            torch.cuda.set_rng_state(_byte_tensor(state.torch_cuda[device]), device)


def check(state: RandomState) -> None:
    """Raise ``ValueError`` unless every generator takes its state; tried on generators aside."""
    try:
        version, words, gauss = msgspec.msgpack.decode(state.python)
        unpacked = tuple(np.frombuffer(words, dtype=np.uint32).tolist())
        random.Random().setstate((version, unpacked, gauss))  # noqa: S311 (only to see whether it fits)
        kind, keys, position, has_gauss, cached = msgspec.msgpack.decode(state.numpy)
        numpy_state: Any = (kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached)
        np.random.RandomState(0).set_state(numpy_state)
        if not 0 <= position <= len(numpy_state[1]):  # which NumPy would read beyond
            raise ValueError(f"position {position}")
        torch.Generator().set_state(_byte_tensor(state.torch_cpu))
    except Exception as error:
        raise ValueError(f"not the state of a generator: {error}") from error


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def preserved() -> Generator[None]:
    """Whatever is drawn inside, every generator is afterwards as it was before."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
