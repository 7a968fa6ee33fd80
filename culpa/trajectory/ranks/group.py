"""The processes of one job, and what culpa says among them: bytes, over a gloo group of its own.

What the model's tensors need is summed by the group that the training itself uses.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from culpa.errors import OptionError, RecordError, StoreError

FIRST = 0
"""The rank that writes."""
T = TypeVar("T")


class Ranks:
    """One process among several, each of which makes the same calls in the same order.

    Args:
        group: over all processes; carries tensors on the CPU.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == FIRST

    def to_first(self, data: bytes) -> list[bytes]:
        """On the first rank what every rank sent, in their order; nothing on the others."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        if not self.first:
            if data:
                dist.send(_tensor(data), FIRST, group=self._group)
            return []
        found = [data]
        for rank in range(1, self.size):
            arriving = torch.empty(int(sizes[rank]), dtype=torch.uint8)
            if arriving.numel():
                dist.recv(arriving, rank, group=self._group)
            found.append(arriving.numpy().tobytes())
        return found

    def from_first(self, data: bytes) -> bytes:
        """What the first rank passed here, on every rank."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, FIRST, group=self._group)
        if int(size) == 0:
            return b""
        content = _tensor(data) if self.first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, FIRST, group=self._group)
        return content.numpy().tobytes()

    def everywhere(self, data: bytes) -> list[bytes]:
        """What every rank passed, on every rank."""
        joined = self.from_first(msgspec.msgpack.encode(self.to_first(data)))
        return msgspec.msgpack.decode(joined, type=list[bytes])

    def on_first(self, work: Callable[[], object]) -> None:
        """Let the first rank do something; all of them raise if it fails.

        Raises:
            StoreError: on the other ranks, with the first one's message.
        """
        failure, said = None, b""
        if self.first:
            try:
                work()
            except Exception as error:  # noqa: BLE001 (raised below, once the others know)
                failure, said = error, f"on rank 0: {type(error).__name__}: {error}".encode()
        said = self.from_first(said)
        if failure is not None:
            raise failure
        if said:
            raise StoreError(said.decode())

    def agreed(self, work: Callable[[], T]) -> T:
        """What every rank does by itself; all of them raise if it fails on one.

        Raises:
            StoreError: where it did not fail, with the message of a rank where it did.
        """
        failure, said, result = None, b"", list[T]()
        try:
            result.append(work())
        except Exception as error:  # noqa: BLE001 (raised below, once the others know)
            failure, said = error, f"{type(error).__name__}: {error}".encode()
        told = self.everywhere(said)
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message:
                raise StoreError(f"on rank {rank}: {message.decode()}")
        return result[0]

    def meet(self, seconds: float) -> None:
        """Wait for all ranks.

        Raises:
            RecordError: if one of them does not come within so many seconds.
        """
        try:
            meeting: Any = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
            meeting.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise RecordError(
                f"rank {self.rank} has ended its recording, and another has not in {seconds:g}"
                " seconds: it goes on, or is gone. Every rank must make as many updates: give them"
                f" loaders of the same length (DistributedSampler). ({error})"
            ) from error

    def total(self, values: Sequence[float]) -> list[float]:
        """Numbers summed over the ranks, the same bits on each."""
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, group=self._group)
        return numbers.tolist()

    def most(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        number = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return float(number)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def several() -> bool:
    """Whether this process is one of a torch.distributed job of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def backend_of(group: Any, device: str) -> str:
    """What carries tensors on a kind of device in a process group: ``"gloo"``, ``"nccl"``, ..."""
    configured = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    by_device = dict(part.split(":") for part in configured.split(",") if ":" in part)
    return by_device.get(device, dist.get_backend(group))


_known: dict[str, tuple[Any, Ranks]] = {}


def ranks() -> Ranks:
    """This process among its job's. The first call is collective: every rank must make it.

    Raises:
        OptionError: if there is no job of several processes.
    """
    if not several():
        raise OptionError(
            "this process is not one of several: torch.distributed is not initialised, or has one"
            " rank. Start the script with torchrun and call torch.distributed.init_process_group."
        )
    world = dist.group.WORLD
    known = _known.get("world")
    if known is None or known[0] is not world:
        known = _known["world"] = world, Ranks(dist.new_group(backend="gloo"))
    return known[1]


def sum_over_ranks(trees: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Trees of tensors, each replaced by its sum over the ranks: one collective a dtype.

    Every rank gets the same bits.
    """
    every = [tensor for tree in trees for tensor in tree.values()]
    found: dict[int, Tensor] = {}
    for kind in dict.fromkeys((t.dtype, t.device) for t in every):
        at = [i for i, t in enumerate(every) if (t.dtype, t.device) == kind]
        flat = torch.cat([every[i].detach().reshape(-1) for i in at])
        dist.all_reduce(flat)
        parts = flat.split([every[i].numel() for i in at])
        found |= {i: part.reshape(every[i].shape) for i, part in zip(at, parts, strict=True)}
    summed, at = list[dict[str, Tensor]](), 0
    for tree in trees:
        summed.append({name: found[at + i] for i, name in enumerate(tree)})
        at += len(tree)
    return summed


@contextmanager
def synchronised(group: Ranks) -> Generator[None]:
    """Whatever the ranks do inside, they leave together."""
    yield
    group.total([0.0])
