"""How closely a walk reproduces its run: bit for bit, or with a drift that is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from culpa import tree
from culpa.trajectory.state import State
from culpa.tree import Tree

BITWISE = "bitwise"


@dataclass
class Fidelity:
    """What a walk may say about its numbers.

    Attributes:
        allow_drift: whether an update that does not reproduce is measured instead of refused.
        exact: whether the environment is the recorded one and every compared update agreed.
        drift: the largest relative difference from a kept state so far; ``None``: none was met.
    """

    allow_drift: bool = False
    exact: bool = True
    drift: float | None = None

    @property
    def claim(self) -> str:
        """``"bitwise"``, or ``"drift 3.1e-7"``: every number made on the walk carries it."""
        if self.exact:
            return BITWISE
        return "drift not measured" if self.drift is None else f"drift {_short(self.drift)}"

    def measure(self, here: State, recorded: State) -> None:
        """Compare with a kept state."""
        self.drift = max(self.drift or 0.0, relative_difference(here, recorded))


def weakest(claims: Iterable[str]) -> str:
    """The claim that all of several results can make."""
    return max(claims, key=_weakness, default=BITWISE)


def _weakness(claim: str) -> float:
    if claim == BITWISE:
        return -1.0
    try:
        return float(claim.removeprefix("drift "))
    except ValueError:  # not measured
        return float("inf")


def relative_difference(here: State, recorded: State) -> float:
    """||here - recorded|| / ||recorded||, of the parameters or of the buffers, whichever is larger.

    Euclidean norms over all tensors of a kind; infinite where a number is none.
    """
    kinds = ((here.params, recorded.params), (_floating(here), _floating(recorded)))
    return max(_relative(a, b) for a, b in kinds)


def _relative(a: Tree, b: Tree) -> float:
    difference = tree.subtract(tree.map_values(Tensor.cpu, a), tree.map_values(Tensor.cpu, b))
    gap, size = tree.norm(difference), tree.norm(b)
    if gap == 0.0 and tree.is_finite(difference):
        return 0.0
    return gap / size if size > 0.0 and tree.is_finite(difference) else float("inf")


def _floating(state: State) -> Tree:
    return {name: value for name, value in state.buffers.items() if value.is_floating_point()}


def _short(value: float) -> str:
    """``3.1e-7``; 0 and infinity as words of their own."""
    if value in (0.0, float("inf")):
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
