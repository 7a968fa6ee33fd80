"""Which states to keep: policies as objects. Others are recomputed from the nearest kept one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from culpa.errors import OptionError


@runtime_checkable
class CheckpointPolicy(Protocol):
    """Decides which states s_k are kept. The first and the last always are.

    A policy may have two more methods: ``at_boundary() -> bool``, whether the state at the end of
    every stage is kept as well, and ``sized(bytes) -> CheckpointPolicy``, which is told after the
    first update how large a state's file is and returns the policy to go on with.
    """

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


@dataclass(frozen=True)
class All:
    """Every state."""

    def keep(self, index: int) -> bool:
        """See ``CheckpointPolicy``: always."""
        return True

    def obsolete(self, kept: int, index: int) -> bool:
        """See ``CheckpointPolicy``: never."""
        return False


@dataclass(frozen=True)
class AtStages:
    """The states at the boundaries of stages and no others: the least disk that block scores need.

    A sweep backward recomputes and holds the states of a whole stage, and a crash inside of a
    stage costs the replay of it.
    """

    def keep(self, index: int) -> bool:
        """See ``CheckpointPolicy``: none inside of a stage."""
        return False

    def obsolete(self, kept: int, index: int) -> bool:
        """See ``CheckpointPolicy``: never."""
        return False

    def at_boundary(self) -> bool:
        """See ``CheckpointPolicy``."""
        return True


@dataclass(frozen=True)
class Budget:
    """As many evenly spaced states as fit into so many bytes of files.

    The distance between states doubles, and every second one is dropped, whenever the next would
    not fit. The first and the last state are kept even where the budget has no room for both.
    """

    bytes: int
    """Of all files in ``states/`` that hold a kept state, the first and the last included."""
    state_bytes: int = 0
    """Of one file; the recorder fills it in after the first update."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.bytes < 1 or self.state_bytes < 0:
            raise OptionError(f"Budget(bytes) needs a positive number of bytes, got {self.bytes}.")

    def sized(self, state_bytes: int) -> Budget:
        """See ``CheckpointPolicy``; a larger state (a new optimizer's) is never forgotten."""
        return Budget(self.bytes, max(state_bytes, self.state_bytes))

    def stride(self, index: int) -> int:
        """The least 2^j by which s_0, the multiples up to ``index`` and a last state fit.

        0 where there is room for nothing between the first and the last.
        """
        between = self.bytes // self.state_bytes - 2 if self.state_bytes else 0
        if between < 1:
            return 0
        stride = 1
        while index // stride > between:
            stride *= 2
        return stride

    def keep(self, index: int) -> bool:
        """See ``CheckpointPolicy``."""
        stride = self.stride(index)
        return stride > 0 and index % stride == 0

    def obsolete(self, kept: int, index: int) -> bool:
        """See ``CheckpointPolicy``."""
        stride = self.stride(index)
        return stride == 0 or kept % stride != 0
