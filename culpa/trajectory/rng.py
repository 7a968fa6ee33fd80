"""The state of every random number generator that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch


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


def capture() -> RandomState:
    """The generators as they are now (about 30 microseconds, 10 kB)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the user's own)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return RandomState(
        python=msgspec.msgpack.encode([version, np.array(words, dtype=np.uint32).tobytes(), gauss]),
        numpy=msgspec.msgpack.encode(
            [str(kind), np.asarray(keys, dtype=np.uint32).tobytes(), position, has_gauss, cached]
        ),
        torch_cpu=torch.get_rng_state().numpy().tobytes(),
        torch_cuda=tuple(s.numpy().tobytes() for s in torch.cuda.get_rng_state_all())
        if cuda
        else (),
    )


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
