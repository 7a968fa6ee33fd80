"""An audit's findings in words: the verdicts, and the cautions that belong to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from culpa.auditing.record import BehaviourFacts, StageFinding
from culpa.estimators.trust import NOT_IDENTIFIED, TRUSTED
from culpa.trajectory.fidelity import BITWISE

TOLERANCE = 0.2
"""A trusted estimate further than this from its replayed truth, relatively, is pointed out."""
NO_VERDICT_ON_PEOPLE = (
    "A score is evidence for inspecting a stage of training. It is no verdict on the people who "
    "made it: they may have had reasons that no behaviour measured here shows."
)
MEANINGS = {
    "skip": (
        "at the updates of the stage nothing happened to parameters and optimizer; later updates"
        " kept their recorded data and learning rates"
    ),
    "restart": (
        "the updates of the stage did not happen, and the next stage began with a fresh optimizer"
    ),
    "zero-gradient": "the updates of the stage were made with a gradient of zero",
}


def known(stage: StageFinding, behaviour: int) -> float | None:
    """The best number there is: the replayed effect, else an estimate that is identified."""
    truth = stage.replayed[behaviour]
    if truth is not None:
        return truth
    return None if stage.grade == NOT_IDENTIFIED else stage.effects[behaviour]


def verdicts(stages: Sequence[StageFinding], behaviours: Sequence[BehaviourFacts]) -> list[str]:
    """For each behaviour the stage to blame and the stage to credit, blame first."""
    blame: list[str] = []
    credit: list[str] = []
    for q, behaviour in enumerate(behaviours):
        ranked = sorted(
            (value, i) for i, s in enumerate(stages) if (value := known(s, q)) is not None
        )
        of_those = "" if len(ranked) == len(stages) else " whose effect is known"
        for said, (value, i), found in (
            (blame, ranked[0] if ranked else (0.0, 0), "lowered"),
            (credit, ranked[-1] if ranked else (0.0, 0), "raised"),
        ):
            if value < 0 if found == "lowered" else value > 0:
                said.append(_sentence(stages[i], q, value, behaviour))
            else:
                said.append(f"No stage{of_those} {found} {behaviour.name}.")
    return blame + credit


def _sentence(stage: StageFinding, q: int, value: float, behaviour: BehaviourFacts) -> str:
    truth = stage.replayed[q]
    verb = "lowered" if value < 0 else "raised"
    size = f"{abs(value):.3g} {behaviour.unit}"
    said = f"Stage {stage.name!r} {verb} {behaviour.name} by {size}"
    if truth is not None:
        estimate = f"{stage.effects[q]:+.3g}".replace("-", "\N{MINUS SIGN}")
        return f"{said}, proved by replay (estimated {estimate}, {stage.grade})."
    return f"{said}, estimated only ({stage.grade})."


def not_bitwise(claim: str) -> list[str]:
    """The caution of an audit whose replays were not bit for bit what was recorded."""
    if claim == BITWISE:
        return []
    return [
        "The audit ran in another environment than the recording, or an update did not reproduce."
        f" No number is bitwise: the replays it rests on have {claim} from the record (relative, at"
        " the kept states)."
    ]


def cautions(
    stages: Sequence[StageFinding],
    behaviours: Sequence[BehaviourFacts],
    update_grades: Sequence[str],
    counterfactual: str,
) -> list[str]:
    """What a reader must know before acting on the numbers."""
    said = [
        f"\N{LEFT DOUBLE QUOTATION MARK}Without a stage\N{RIGHT DOUBLE QUOTATION MARK} means:"
        f" {MEANINGS[counterfactual]}."
    ]
    for stage in stages:
        if stage.grade == NOT_IDENTIFIED and None in stage.replayed:
            said.append(
                f"The effect of stage {stage.name!r} is not identified by its estimate"
                f" ({stage.reason}): replay it before relying on it."
            )
        opposed = [
            b.name
            for q, b in enumerate(behaviours)
            if (best := known(stage, q)) is not None and stage.scores[q] * best < 0
        ]
        if opposed:
            said.append(
                f"The AA-Score of stage {stage.name!r} has another sign than its effect on"
                f" {', '.join(opposed)}: it is linear in the behaviour too, and the stage moved the"
                " model further than that holds. The effect counts."
            )
        for q, behaviour in enumerate(behaviours):
            truth = stage.replayed[q]
            if truth is not None and stage.grade == TRUSTED and _apart(stage.effects[q], truth):
                said.append(
                    f"The estimate for stage {stage.name!r} on {behaviour.name}"
                    f" ({stage.effects[q]:+.3g}) was graded trusted, but replay gave {truth:+.3g}"
                    f" {behaviour.unit}: use the replayed number."
                )
    missing = sum(grade == NOT_IDENTIFIED for grade in update_grades)
    if missing:
        said.append(
            f"The scores of {missing} of {len(update_grades)} single updates are not identified:"
            " the training after them amplifies small changes too much for a first-order score."
        )
    said.append(NO_VERDICT_ON_PEOPLE)
    return said


def _apart(estimate: float, truth: float) -> bool:
    return abs(estimate - truth) > TOLERANCE * abs(truth)


def reason(grade: str, growth: float, residual: float) -> str:
    """Why a stage's estimate has its grade, in one sentence."""
    if math.isnan(residual):
        return "the last stage: nothing was linearised after it, so the estimate is exact"
    return (
        f"after the stage its displacement grew {growth:.2g}-fold, and along it the linearised "
        f"gradients were off by up to {residual:.0%}, hence {grade}"
    )
