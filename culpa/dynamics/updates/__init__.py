"""Update rules of ``torch.optim`` as pure maps, one optimizer a file, and their derivatives."""

from __future__ import annotations

from culpa.dynamics.updates import adam, sgd
from culpa.dynamics.updates.rule import Linearised as Linearised
from culpa.dynamics.updates.rule import Rule as Rule
from culpa.dynamics.updates.walk import apply as apply
from culpa.dynamics.updates.walk import extend as extend
from culpa.dynamics.updates.walk import pullback as pullback
from culpa.dynamics.updates.walk import pushforward as pushforward
from culpa.dynamics.updates.walk import singular as singular
from culpa.errors import UnsupportedError

RULES: dict[str, Rule] = {
    "SGD": Rule("SGD", sgd.step, sgd.linearise, sgd.extend, sgd.singular, sgd.SOURCE),
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
"""The optimizers that can be differentiated, by their class name in ``torch.optim``."""


def rule_for(optimizer_name: str) -> Rule:
    """The rule of the ``torch.optim`` class of that name.

    Raises:
        UnsupportedError: no rule; names those there are.
    """
    if optimizer_name not in RULES:
        raise UnsupportedError(
            f"the optimizer is {optimizer_name!r}, and culpa can differentiate through "
            f"{', '.join(RULES)} only. culpa.replay works with any torch optimizer: it runs the "
            "optimizer itself and gives true effects of removed stages."
        )
    return RULES[optimizer_name]
