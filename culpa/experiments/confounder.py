"""Which stages teach a shortcut, and what does training without them do? (§5.3, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from culpa.behaviour import Behaviour
from culpa.estimators.adjoint import attribute
from culpa.experiments import measures
from culpa.experiments.frame import charts
from culpa.experiments.frame.findings import Claim, Figure, Table
from culpa.problem import Problem
from culpa.trajectory.replay import replay
from culpa.trajectory.run import Run


def removed(
    run: Run, problem: Problem, behaviours: Sequence[Behaviour], *, top: int, bottom: int
) -> dict[str, Any]:
    """Leave out the stages that score highest, or lowest, for the confounder, and retrain.

    Args:
        run: of many stages within one job, so they are skipped inside of it.
        problem: it was recorded with.
        behaviours: the real task's, and the confounder's.
        top, bottom: how many stages of either kind.

    Returns:
        ``scores[behaviour][stage]``, sums of AA-Scores; ``top`` and ``bottom``: which stages,
        ``change[behaviour]``, retrained minus observed, in nats, and ``predicted``.
    """
    scores = attribute(run, problem, behaviours).stages
    order = scores[:, 1].argsort().tolist()
    found: dict[str, Any] = {"scores": scores.T.tolist()}
    for name, chosen in (("top", order[len(order) - top :]), ("bottom", order[:bottom])):
        without = replay(run, problem, without=[run.stages[at].name for at in chosen])
        found[name] = {
            "stages": sorted(chosen),
            "change": [-float(without.effect(b).mean()) for b in behaviours],
            "predicted": [-float(scores[chosen, b].sum()) for b in range(len(behaviours))],
        }
    return found


def table(found: list[Any], paper: dict[str, float] | None, top: int, bottom: int) -> Table:
    """Changes of log-likelihood by skipping, over seeds."""
    rows: list[tuple[str, ...]] = []
    for name, count in (("top", top), ("bottom", bottom)):
        several = f"stage{'s' * (count > 1)}"

        def over(key: str, which: int, name: str = name) -> str:
            return measures.spread([f[name][key][which] for f in found], 4, signed=True)

        rows.append(
            (
                f"{name} {count} {several}",
                "not given" if paper is None else f"{paper[name]:+.4f}",
                over("change", 1),
                over("predicted", 1),
                over("change", 0),
            )
        )
    return Table(
        "Without the stages that score highest, or lowest, for the confounder: change, nats",
        (
            "left out",
            "confounder, the paper",
            "retrained",
            "by AA-Score",
            "the real task, retrained",
        ),
        tuple(rows),
        "Change of the mean log-likelihood on the test set when these stages are skipped.",
    )


def claims(found: list[Any], top: int, bottom: int) -> tuple[Claim, ...]:
    """Whether retraining moves the confounder the way that was predicted."""

    def made(name: str, count: int, sign: int, verb: str) -> Claim:
        changes = [f[name]["change"][1] for f in found]
        right = sum(sign * change > 0 for change in changes)
        several = f"stage{'s' * (count > 1)}"
        return Claim(
            f"Skipping the {name} {count} {several} {verb} the confounder.",
            right == len(found),
            f"It does in {measures.of(right, len(found))}; change {fmean(changes):+.4f} nats.",
        )

    pairs = [
        (f[name]["predicted"][1], f[name]["change"][1]) for f in found for name in ("top", "bottom")
    ]
    right = sum(predicted * change > 0 for predicted, change in pairs)
    return (
        made("top", top, -1, "lowers"),
        made("bottom", bottom, 1, "raises"),
        Claim(
            "Retraining moves the confounder in the direction that AA-Scores predict.",
            right == len(pairs),
            f"It does in {right} of {len(pairs)} removals. (The stages that score highest need not"
            " score above zero.)",
        ),
    )


def figure(found: Any, names: Sequence[str]) -> Figure:
    """The scores of the first seed's stages; marked those that were left out."""
    marked = {*found["top"]["stages"], *found["bottom"]["stages"]}
    rows = [
        {"panel": name, "x": at + 1, "value": value, "marked": at in marked}
        for name, values in zip(names, found["scores"], strict=True)
        for at, value in enumerate(values)
    ]
    return Figure(
        "stages",
        "AA-Scores of the stages of one run (seed 0) for the real task and for the confounder;"
        " orange: those that score highest and lowest for the confounder, which were left out.",
        charts.strips(rows, x="stage", y="effect [nats]", panel="panel", panels=names),
    )
