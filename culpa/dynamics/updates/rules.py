"""Which rule belongs to which parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch.optim import Optimizer

from culpa.dynamics.updates import adam, generic, sgd
from culpa.dynamics.updates.probe import why_not
from culpa.dynamics.updates.rule import Rule
from culpa.errors import UnsupportedError
from culpa.trajectory.optimizers import optimizer_class, qualified_name
from culpa.trajectory.schema import Group

CLOSED: dict[str, Rule] = {
    "SGD": Rule(
        "SGD", sgd.step, sgd.linearise, sgd.extend, sgd.singular, sgd.SOURCE, affine=sgd.affine
    ),
    "Adam": Rule("Adam", adam.step, adam.linearise, adam.extend, adam.singular, adam.SOURCE_ADAM),
    "AdamW": Rule(
        "AdamW",
        adam.step,
        adam.linearise,
        adam.extend,
        adam.singular,
        adam.SOURCE_ADAMW,
        # Param groups written by torch before 2.7 do not name it.
        defaults={"decoupled_weight_decay": True},
    ),
}
"""The optimizers whose derivative is written out, by their class name in ``torch.optim``."""


def rule_of(found: type[Optimizer]) -> Rule:
    """The rule of any optimizer class: written out, or its own step through autograd."""
    name = qualified_name(found)
    if name in CLOSED:
        return CLOSED[name]
    where = name if "." in name else f"torch.optim.{name}"
    return Rule(
        name,
        partial(generic.step, found),
        partial(generic.linearise, found),
        partial(generic.extend, found),
        partial(generic.singular, found),
        f"{where}: its own step(), differentiated by autograd",
        why_not=partial(why_not, found),
    )


def rule_for(name: str, given: Sequence[type[Optimizer]] = ()) -> Rule:
    """The rule of the class that a record calls ``name``; ``given`` are the user's classes.

    Raises:
        UnsupportedError: if the class is neither of torch.optim nor given.
    """
    return rule_of(optimizer_class(name, given))


class Rules:
    """The rules of a run's optimizers.

    Args:
        given: the user's classes, ``problem.optimizers``.
    """

    def __init__(self, given: Sequence[type[Optimizer]] = ()) -> None:
        self._given = tuple(given)
        self._known: dict[str, Rule] = {}

    def named(self, name: str) -> Rule:
        """See ``rule_for``."""
        if name not in self._known:
            self._known[name] = rule_for(name, self._given)
        return self._known[name]

    def of(self, group: Group) -> Rule:
        """The rule of a parameter group."""
        return self.named(group.optimizer)

    def affine(self, groups: Sequence[Group]) -> bool:
        """Whether the whole update is affine in the state and the gradient."""
        rules = [(self.of(group), group.hyper) for group in groups]
        return all(rule.affine({**rule.defaults, **hyper}) for rule, hyper in rules)

    def require_differentiable(self, groups: Sequence[Group]) -> None:
        """Refuse optimizers whose step has no useful derivative, before any work.

        Raises:
            UnsupportedError: naming the class, why, and what works instead.
        """
        for group in groups:
            rule = self.of(group)
            reason = rule.why_not({**rule.defaults, **group.hyper})
            if reason:
                raise UnsupportedError(
                    f"{rule.name} cannot be differentiated through: {reason}. culpa.replay works"
                    " (it runs the optimizer itself), and so does culpa.embed(...,"
                    " propagator=culpa.Secant(fraction)), which takes differences and no"
                    " derivatives of the optimizer."
                )
