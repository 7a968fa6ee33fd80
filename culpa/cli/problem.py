"""``--problem module:function``: the user's own code that builds the problem."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from culpa.auditing.forecasting.plan import Plan
from culpa.behaviour import Behaviour
from culpa.errors import OptionError
from culpa.problem import Problem
from culpa.report.showing import Show

AS_IT_IS = "as-is"
"""Shows pictures and numbers without a function of the user's."""


def load_show(name: str | None) -> Show | None:
    """``--show``: the user's ``module:function``, or ``None`` for an example as it is.

    Raises:
        OptionError: if there is no such function.
    """
    return None if name in (None, AS_IT_IS) else load_function("--show", name)


def load_problem(name: str) -> tuple[Problem, list[Behaviour]]:
    """Call ``module:function``, which returns ``(problem, behaviours)``.

    Raises:
        OptionError: if there is no such function or it returns something else.
    """
    made: Any = load_function("--problem", name)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Problem)):  # pyright: ignore[reportUnknownArgumentType]
        raise OptionError(f"--problem {name} must return (culpa.Problem, [culpa.Behaviour, ...]).")
    return made  # pyright: ignore[reportUnknownVariableType]


def load_plan(name: str) -> tuple[Plan, list[Behaviour]]:
    """Call ``module:function``, which returns a plan, or ``(plan, behaviours)``.

    Raises:
        OptionError: if there is no such function or it returns something else.
    """
    made: Any = load_function("--problem", name)()
    plan, behaviours = made if isinstance(made, tuple) and len(made) == 2 else (made, [])  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not isinstance(plan, Plan):
        raise OptionError(
            f"without a RUN, --problem {name} must return a culpa.Plan, or (culpa.Plan,"
            " [culpa.Behaviour, ...])."
        )
    return plan, behaviours  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True)
class Loaded:
    """``load_problem`` of one name, for the workers of an audit: from the folder of the command."""

    problem: str
    folder: str = field(default_factory=os.getcwd)

    def __call__(self) -> tuple[Problem, list[Behaviour]]:
        """Call it."""
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        return load_problem(self.problem)


def load_function(option: str, name: str) -> Any:
    """``module:function``, found like an import from the current folder.

    Raises:
        OptionError: if there is none.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise OptionError(
            f"{option} takes MODULE:FUNCTION, such as my_training:{option.strip('-')}; got"
            f" {name!r}."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise OptionError(
            f"{option} {name}: {error}. It is looked up from the current folder."
        ) from error
