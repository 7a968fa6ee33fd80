"""``--problem module:function``: the user's own code that builds the problem."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from culpa.behaviour import Behaviour
from culpa.errors import OptionError
from culpa.problem import Problem


def load_problem(name: str) -> tuple[Problem, list[Behaviour]]:
    """Call ``module:function``, which returns ``(problem, behaviours)``.

    Raises:
        OptionError: if there is no such function or it returns something else.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise OptionError(
            f"--problem takes MODULE:FUNCTION, such as my_training:problem; got {name!r}."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    try:
        made: Any = getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise OptionError(
            f"--problem {name}: {error}. It is looked up from the current folder."
        ) from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Problem)):  # pyright: ignore[reportUnknownArgumentType]
        raise OptionError(f"--problem {name} must return (culpa.Problem, [culpa.Behaviour, ...]).")
    return made  # pyright: ignore[reportUnknownVariableType]
