"""Propagators that leave out part of the curvature (the paper's section C.1), and Gauss-Newton."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from culpa import tree
from culpa.dynamics.curvature import gauss_newton, hessian
from culpa.dynamics.local import LocalLoss
from culpa.errors import OptionError
from culpa.tree import Tree

PAPER = "Zhang, Du, Ma, Lakkaraju, arXiv 2506.00175, section C.1"
Blocks = Sequence[Sequence[str]]


class _Curvature(ABC):
    """What the propagators here share: they differ only in the matrix they multiply by."""

    @property
    def moves(self) -> bool:
        """See ``Propagator``."""
        return True

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """See ``Propagator``."""
        return self._at(local, local.params, vectors)

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """See ``Propagator``: the matrix in the middle of the displacement, times it."""
        middle = tree.add(local.params, displacement, -0.5)
        return self._at(local, middle, [displacement])[0]

    @abstractmethod
    def _at(self, local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
        """The matrix at the parameters ``at``, times each vector."""


@dataclass(frozen=True)
class GaussNewton(_Curvature):
    """J^T H_out J for the Hessian: never indefinite for a loss convex in the model's outputs.

    Less accurate than ``Exact`` where training is stable, far better where it is not: the sweep
    cannot grow along directions of negative curvature.
    """

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return "Schraudolph, Fast Curvature Matrix-Vector Products, Neural Computation 2002"

    def _at(self, local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
        return gauss_newton.products(local, at, vectors)


@dataclass(frozen=True)
class LayerWise(_Curvature):
    """The Hessian without products across layers: parameters of one submodule are one block."""

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return PAPER

    def _at(self, local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
        layers: dict[str, list[str]] = {}
        for name in at:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        return _blockwise(local, at, vectors, list(layers.values()))


@dataclass(frozen=True)
class BlockWise(_Curvature):
    """The Hessian without products across blocks of at most ``max_size`` numbers.

    Whole parameter tensors are put together in the model's order while they fit; a tensor larger
    than ``max_size`` is a block of its own.
    """

    max_size: int

    def __post_init__(self) -> None:
        """Check the size."""
        if self.max_size < 1:
            raise OptionError(f"BlockWise(max_size) needs a positive size, got {self.max_size}.")

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return PAPER

    def _at(self, local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
        blocks: list[list[str]] = []
        room = 0
        for name, value in at.items():
            if value.numel() > room:
                blocks.append([])
                room = self.max_size
            blocks[-1].append(name)
            room -= value.numel()
        return _blockwise(local, at, vectors, blocks)


@dataclass(frozen=True)
class Subset(_Curvature):
    """The Hessian within some parameters only; the others keep what the optimizer makes of them.

    Args:
        patterns: shell patterns of parameter names, such as ``("head.*", "*.lora_*")``.
    """

    patterns: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the patterns."""
        if isinstance(self.patterns, str) or not self.patterns:
            raise OptionError(f"Subset(patterns) takes a tuple of patterns, got {self.patterns!r}.")

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return PAPER

    def _at(self, local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
        inside = [n for n in at if any(fnmatchcase(n, pattern) for pattern in self.patterns)]
        if not inside:
            raise OptionError(
                f"no parameter matches {', '.join(map(repr, self.patterns))}; the model has "
                f"{', '.join(list(at)[:6])}, ..."
            )
        return _blockwise(local, at, vectors, [inside])


def _blockwise(local: LocalLoss, at: Tree, vectors: Sequence[Tree], blocks: Blocks) -> list[Tree]:
    """Products with the diagonal blocks of the Hessian, the others zero: one product a block."""
    found, local = [tree.zeros_like(at) for _ in vectors], local.around(at)
    for names in blocks:
        inside = {name: at[name] for name in names}
        parts = [{name: v[name] for name in names} for v in vectors]
        rows = hessian.products(local, inside, parts, "reverse-over-reverse")
        for total, row in zip(found, rows, strict=True):
            total.update(row)
    return found
