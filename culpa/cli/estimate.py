"""``culpa replay --estimate``: the model without a stage as its embedding has it."""

from __future__ import annotations

import culpa
from culpa.cli.outcome import ESTIMATED
from culpa.errors import OptionError
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.replay import Counterfactual
from culpa.trajectory.run import Run


def estimated(
    run: Run,
    problem: Problem,
    without: list[str],
    *,
    counterfactual: str,
    allow_drift: bool,
    progress: Progress,
) -> Counterfactual:
    """The estimated model without one stage; its claim is the estimate's grade.

    Raises:
        OptionError: unless exactly one stage is left out: displacements do not add up.
        and whatever ``culpa.embed`` raises.
    """
    if len(without) != 1:
        raise OptionError(
            f"--estimate leaves out one stage, --without given once; got {len(without)} stages."
            " Leave out several by replay."
        )
    (name,) = without
    found = culpa.embed(
        run,
        problem,
        stages=[name],
        counterfactual=counterfactual,
        allow_drift=allow_drift,
        progress=progress,
    )
    model = found.counterfactual(name)
    return Counterfactual(
        {n: value for n, value in model.items() if n in found.final},
        {n: value for n, value in model.items() if n in found.buffers},
        tuple(run.stage(name).updates),
        counterfactual,
        0,
        f"{ESTIMATED}{found.trust[name].grade}",
        run,
        problem,
    )
