"""Which states to keep: policies as objects. Others are recomputed from the nearest kept one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from culpa.errors import OptionError


@runtime_checkable
class CheckpointPolicy(Protocol):
    """Decides which states s_k are kept. The first and the last always are."""

    def keep(self, index: int) -> bool:
        """Whether s_index is to be written when training gets there."""
        ...

    def obsolete(self, kept: int, index: int) -> bool:
        """Whether s_kept, written earlier, may be dropped now that training is at ``index``."""
        ...


@dataclass(frozen=True)
class Thinned:
    """The default: about 1.4 sqrt(K) states for a run whose length K nobody knows beforehand.

    The distance between kept states doubles whenever it falls below sqrt(k / 2), and those in
    between are dropped. Kept states and states recomputed at a time are both at most
    sqrt(2 K) + 1, so a backward sweep needs one replay of the run and O(sqrt(K)) memory.
    """

    def stride(self, index: int) -> int:
        """The distance between kept states at update ``index``: the least 2^j with k <= 2 * 4^j."""
        stride = 1
        while index > 2 * stride * stride:
            stride *= 2
        return stride

    def keep(self, index: int) -> bool:
        """See ``CheckpointPolicy``."""
        return index % self.stride(index) == 0

    def obsolete(self, kept: int, index: int) -> bool:
        """See ``CheckpointPolicy``."""
        return kept % self.stride(index) != 0


@dataclass(frozen=True)
class Every:
    """Every n-th state: ``Every(1)`` keeps all, for the fastest sweeps and the most disk."""

    n: int

    def __post_init__(self) -> None:
        """Check ``n``."""
        if self.n < 1:
            raise OptionError(f"Every(n) keeps each n-th state, n >= 1; got {self.n}.")

    def keep(self, index: int) -> bool:
        """See ``CheckpointPolicy``."""
        return index % self.n == 0

    def obsolete(self, kept: int, index: int) -> bool:
        """See ``CheckpointPolicy``: never."""
        return False
