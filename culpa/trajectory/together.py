"""Several optimizers over disjoint parameters that make every update together, seen as one.

An update is one step of each. Their parameters are disjoint and the gradients are there before the
first of them steps, so the order among them changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from culpa.errors import OptionError, ProblemError
from culpa.trajectory.optimizers import build, optimizer_class
from culpa.trajectory.schema import OptimizerSpec
from culpa.tree import Tree


@runtime_checkable
class Stepper(Protocol):
    """What a recorder and an engine need of an optimizer, or of several."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, hyperparameters included."""
        ...

    @property
    def state(self) -> Any:
        """By parameter its slots; can be cleared and written to."""
        ...

    def step(self) -> Any:
        """One update."""
        ...


class States:
    """The states of several optimizers as one mapping."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = members

    def __bool__(self) -> bool:
        return any(member.state for member in self._members)

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        for member in self._members:
            if any(p is param for group in member.param_groups for p in group["params"]):
                return member.state[param]
        raise KeyError(param)

    def items(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """As of a dictionary."""
        for member in self._members:
            yield from member.state.items()

    def clear(self) -> None:
        """Forget all of it."""
        for member in self._members:
            member.state.clear()


class Together:
    """Optimizers as one. Their groups follow each other in the order of ``members``.

    Raises:
        ProblemError: if a parameter is held by two of them.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = tuple(members)
        held = [p for group in self.param_groups for p in group["params"]]
        if len({id(p) for p in held}) != len(held):
            raise ProblemError(
                "two of the optimizers hold the same parameter; an update is one step of each, so"
                " every parameter must belong to one of them."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all members."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> States:
        """Of all members."""
        return States(self.members)

    def step(self) -> None:
        """One step of each."""
        for member in self.members:
            member.step()


def members_of(optimizer: Stepper) -> tuple[Optimizer, ...]:
    """The torch optimizers behind it: itself, or several."""
    return optimizer.members if isinstance(optimizer, Together) else (cast("Optimizer", optimizer),)


def as_one(optimizers: Optimizer | Sequence[Optimizer]) -> Stepper:
    """What ``culpa.record`` was given, as one.

    Raises:
        OptionError: if it is no optimizer, nor a list of them.
    """
    given: list[Any] = [*optimizers] if isinstance(optimizers, Sequence) else [optimizers]
    if not given or not all(isinstance(one, Optimizer) for one in given):
        kinds = ", ".join(type(one).__name__ for one in given) or "an empty list"
        raise OptionError(
            f"optimizer must be a torch.optim.Optimizer or a list of them, got {kinds}. Pass the"
            " very object whose step() the loop calls."
        )
    return given[0] if len(given) == 1 else Together(given)


def rebuilt(
    spec: OptimizerSpec,
    hypers: Sequence[Mapping[str, Any]],
    params: Tree,
    given: Sequence[type[Optimizer]],
) -> Stepper:
    """The optimizers of a record, fresh, over live parameters.

    Args:
        spec, hypers: of the update.
        params: by name.
        given: the user's own classes (``Problem(optimizers=...)``).
    """
    groups = [
        {"params": [params[name] for name in names], **hyper}
        for names, hyper in zip(spec.groups, hypers, strict=True)
    ]
    made: list[Optimizer] = []
    for name, count in spec.members or ((spec.name, len(groups)),):
        mine, groups = groups[:count], groups[count:]
        made.append(build(optimizer_class(name, given), mine))
    return as_one(made)


class Stateful:
    """Schedulers, and a scaler: what is put back beside the optimizers when a run is resumed."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = tuple(parts)

    def state_dict(self) -> dict[str, Any]:
        """Of each, by its number."""
        return {str(at): part.state_dict() for at, part in enumerate(self._parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for at, part in enumerate(self._parts):
            part.load_state_dict(state[str(at)])


def all_of(parts: Any) -> Any:
    """One object with a state for several; as it is if there is but one, ``None`` if none."""
    listed = [p for p in (parts if isinstance(parts, (list, tuple)) else [parts]) if p is not None]  # pyright: ignore[reportUnknownVariableType]
    return Stateful(listed) if len(listed) > 1 else next(iter(listed), None)
