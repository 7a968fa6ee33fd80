"""Many updates at once: SGD on a quadratic model of the loss, by Lanczos.

Near a point y the loss is g.x + x.H x / 2 in the way x made from there, and n updates of SGD on it
are a matrix function of H (the exponential, for small rates). In each eigendirection of H, with
eigenvalue h, weight decay l, momentum mu and rates eta_k, from x = 0:

    g' = g + (h + l) x,  v' = mu v + g',  x' = x - eta_k v'     (Nesterov: x - eta_k (g' + mu v'))

where g includes l y. Only the part of H that g and v can see matters: an orthonormal basis Q of
the Krylov space of both reduces H to the small T = Q^T H Q. The cost is one product a basis
vector, whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa import tree
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import Exact, Propagator
from culpa.errors import OptionError, ProblemError, UnsupportedError
from culpa.tree import Tree

Product = Callable[[Tree], Tree]
"""v -> H v, with one symmetric H for the time of a segment."""


@dataclass(frozen=True)
class Krylov:
    """Carry embeddings over whole stages of which only the checkpoints at their ends are known.

    Both paths through a later stage are followed, the run's and the one without the removed stage,
    from segment to segment, each on a quadratic model of the loss about where it has come to; the
    embedding is their difference, in which their common errors cancel.

    Args:
        rank: dimension of the Krylov space, products a segment and path; at least 2 (the gradient
            and the momentum).
        segments: parts into which the updates of each later stage are cut. More segments help more
            than a higher rank. A model holds near its point only: long stages at practical rates
            need short segments, and a path that diverges is refused.
        examples: rows of the stage's data on which the model of a segment is measured; the same
            rows for both paths.
        seed: of the choice of rows.
        curvature: what stands in for the Hessian, such as ``culpa.Exact()``; its ``products``
            must be those of a symmetric matrix.
    """

    rank: int = 4
    segments: int = 8
    examples: int = 500
    seed: int = 0
    curvature: Propagator = field(default_factory=Exact)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value, least in (
            ("rank", self.rank, 2),
            ("segments", self.segments, 1),
            ("examples", self.examples, 1),
        ):
            if isinstance(value, bool) or value < least:
                raise OptionError(f"Krylov({name}=...) takes an integer >= {least}, got {value!r}.")
        if isinstance(self.curvature, Krylov):
            raise OptionError("Krylov(curvature=...) must give products, as culpa.Exact() does.")

    @property
    def citation(self) -> str:
        """See ``Propagator``."""
        return (
            "exponential Rosenbrock-Euler steps by Lanczos: Hochbruck and Lubich, On Krylov"
            " Subspace Approximations to the Matrix Exponential Operator, SIAM J. Numer. Anal. 34,"
            " 1997"
        )

    @property
    def moves(self) -> bool:
        """See ``Propagator``."""
        return True

    def products(self, local: LocalLoss, vectors: Sequence[Tree]) -> list[Tree]:
        """Refused: a Krylov space spans whole stages, and single updates are no stage."""
        raise self._refusal()

    def gradient_difference(self, local: LocalLoss, displacement: Tree) -> Tree:
        """Refused, as ``products`` is."""
        raise self._refusal()

    def _refusal(self) -> UnsupportedError:
        return UnsupportedError(
            "Krylov carries displacements over whole stages of a culpa.from_checkpoints run, and"
            " this sweep goes update by update through a recording. Use culpa.Exact() or"
            " culpa.Secant(fraction) there."
        )


@dataclass(frozen=True)
class Updates:
    """Some consecutive updates of SGD: a learning rate each, and what they share."""

    rates: tuple[float, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __len__(self) -> int:
        """The number of updates."""
        return len(self.rates)

    def part(self, start: int, stop: int) -> Updates:
        """The updates [start, stop)."""
        return Updates(self.rates[start:stop], self.momentum, self.weight_decay, self.nesterov)


def transfer(
    eigenvalues: Float64[Tensor, " m"],
    gradient: Float64[Tensor, " m"],
    velocity: Float64[Tensor, " m"],
    updates: Updates,
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """The way x and the momentum after the updates, eigendirection by eigendirection (see top).

    Args:
        eigenvalues: h, in units of the loss per squared parameter.
        gradient: g where the way begins, weight decay included.
        velocity: v where it begins.
        updates: n of them.
    """
    way = torch.zeros_like(gradient)
    for rate in updates.rates:
        here = gradient + (eigenvalues + updates.weight_decay) * way
        velocity = updates.momentum * velocity + here
        way = way - rate * (here + updates.momentum * velocity if updates.nesterov else velocity)
    return way, velocity


def krylov_space(
    product: Product, starts: Sequence[Tree], rank: int
) -> tuple[list[Tree], Float64[Tensor, "m m"]]:
    """An orthonormal basis Q of the Krylov space of ``starts``, and T = Q^T H Q.

    Band Lanczos with full reorthogonalisation, coefficients in float64: with one start the
    classical method. Stops early where the space is exhausted (an invariant subspace: exact).
    Cost: at most ``rank`` products and 4 ``rank``^2 scalar products of vectors. Memory:
    ``rank`` + 1 vectors.
    """
    basis: list[Tree] = []
    for start in starts:
        _extend(basis, start, rank)
    small = torch.zeros(rank, rank, dtype=torch.float64)
    done = 0
    while done < len(basis):
        image = product(basis[done])
        # Later basis vectors are orthogonal to this image or meet it again by symmetry.
        for row in range(done + 1):
            small[row, done] = small[done, row] = tree.dot(basis[row], image)
        _extend(basis, image, rank)
        done += 1
    return basis, small[:done, :done]


@dataclass(frozen=True)
class Leap:
    """Where some updates lead: the way made, the momentum, and the gradient the model expects."""

    way: Tree
    velocity: Tree
    gradient: Tree


def leap(product: Product, gradient: Tree, velocity: Tree, updates: Updates, rank: int) -> Leap:
    """All the updates at once on the quadratic model (g, H).

    Args:
        product: H v, without weight decay.
        gradient: g of the loss where the way begins, weight decay included.
        velocity: the momentum there; a missing entry is zero.
        updates: n of them.
        rank: of the Krylov space.

    Returns:
        The leap. Exact for a quadratic loss, up to rounding, where the Krylov space is exhausted
        within ``rank`` products; otherwise the error falls faster than geometrically once ``rank``
        exceeds sqrt(n eta ||H|| / (1 - mu)).

    Raises:
        ProblemError: if a product is not finite.
    """
    basis, small = krylov_space(product, [gradient, velocity], rank)
    if not basis:
        return Leap(tree.zeros_like(gradient), velocity, gradient)
    if not bool(torch.isfinite(small).all()):
        raise ProblemError(
            "the curvature is not finite where the reconstructed path has come to: it diverged. Use"
            " Krylov with more segments, or check the learning rates and numbers of updates given."
        )
    values, vectors = torch.linalg.eigh(small)
    way, swift = transfer(
        values,
        vectors.T @ _coordinates(basis, gradient),
        vectors.T @ _coordinates(basis, velocity),
        updates,
    )
    bent = _combine(basis, vectors @ ((values + updates.weight_decay) * way))
    return Leap(
        _combine(basis, vectors @ way),
        _combine(basis, vectors @ swift),
        tree.add(gradient, bent),
    )


def _extend(basis: list[Tree], vector: Tree, rank: int) -> None:
    """Add the direction of ``vector`` that is new to the basis, if any, up to ``rank``."""
    size = tree.norm(vector)
    if len(basis) >= rank or size == 0.0:
        return
    rest = tree.scale(1.0 / size, vector)
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        for one in basis:
            rest = tree.add(rest, one, -tree.dot(one, rest))
    left = tree.norm(rest)
    precision = max(torch.finfo(value.dtype).eps for value in vector.values())
    if left > 10.0 * precision:
        basis.append(tree.scale(1.0 / left, rest))


def _coordinates(basis: Sequence[Tree], vector: Tree) -> Tensor:
    return torch.tensor([tree.dot(one, vector) for one in basis], dtype=torch.float64)


def _combine(basis: Sequence[Tree], coordinates: Tensor) -> Tree:
    total = tree.zeros_like(basis[0])
    for one, weight in zip(basis, coordinates.tolist(), strict=True):
        total = tree.add(total, one, weight)
    return total
