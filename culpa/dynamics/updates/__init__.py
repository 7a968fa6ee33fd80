"""Update rules of optimizers as pure maps, one a file, and their derivatives.

SGD, Adam and AdamW are written out. Any other class runs its own ``step`` (generic.py).
"""

from __future__ import annotations

from culpa.dynamics.updates.rule import Linearised as Linearised
from culpa.dynamics.updates.rule import Rule as Rule
from culpa.dynamics.updates.rules import CLOSED as CLOSED
from culpa.dynamics.updates.rules import Rules as Rules
from culpa.dynamics.updates.rules import rule_for as rule_for
from culpa.dynamics.updates.rules import rule_of as rule_of
from culpa.dynamics.updates.walk import apply as apply
from culpa.dynamics.updates.walk import carry as carry
from culpa.dynamics.updates.walk import extend as extend
from culpa.dynamics.updates.walk import linearised as linearised
from culpa.dynamics.updates.walk import pullback as pullback
from culpa.dynamics.updates.walk import pushforward as pushforward
from culpa.dynamics.updates.walk import singular as singular
