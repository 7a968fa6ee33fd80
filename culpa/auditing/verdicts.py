"""An audit's findings in words: the verdicts, and the cautions that belong to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from culpa.auditing.floor import hidden
from culpa.auditing.record import BehaviourFacts, StageFinding, WindowFinding
from culpa.estimators.trust import NOT_IDENTIFIED, TRUSTED
from culpa.trajectory.fidelity import BITWISE

TOLERANCE = 0.2
"""A trusted estimate further than this from its replayed truth, relatively, is pointed out."""
WORTH_SAYING = 0.05
"""A trade-off is told if both sides are at least this part of the largest effect of any stage."""
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
    """The best number there is: the replayed effect, else an estimate; ``None``: not identified."""
    if behaviour < len(stage.grades) and stage.grades[behaviour] == NOT_IDENTIFIED:
        return None
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
    estimate = f"{stage.effects[q]:+.3g}".replace("-", "\N{MINUS SIGN}")
    if truth is None:
        return f"{said}, estimated only ({stage.grade})."
    if not stage.estimated or math.isnan(stage.effects[q]):
        return f"{said}, proved by replay."
    return f"{said}, proved by replay (estimated {estimate}, {stage.grade})."


def tradeoffs(stages: Sequence[StageFinding], behaviours: Sequence[BehaviourFacts]) -> list[str]:
    """What stages bought of one behaviour at the price of another, where both are identified.

    A sentence for every stage that raised something and lowered something, by the larger of the
    two: its best buy against its dearest price, as parts of all that stages did to the behaviour.
    """
    spans = [
        max((abs(v) for s in stages if (v := known(s, q)) is not None), default=0.0) or 1.0
        for q in range(len(behaviours))
    ]
    found: list[tuple[float, str]] = []
    for stage in stages:
        parts = [(v / spans[q], v, q) for q in range(len(spans)) if (v := known(stage, q))]
        if not parts or not (parts := sorted(parts))[0][0] < 0.0 < parts[-1][0]:
            continue
        (low, price, p), (high, gain, g) = parts[0], parts[-1]
        if min(-low, high) < WORTH_SAYING:
            continue
        bought, paid = behaviours[g], behaviours[p]
        found.append(
            (
                min(-low, high),
                f"Stage {stage.name!r} bought {gain:+.3g} {bought.unit} of {bought.name} at the"
                f" price of {-price:.3g} {paid.unit} of {paid.name}.",
            )
        )
    return [said for _, said in sorted(found, reverse=True)]


def not_bitwise(claim: str) -> list[str]:
    """The caution of an audit whose replays were not bit for bit what was recorded."""
    if claim == BITWISE:
        return []
    return [
        "The audit ran in another environment than the recording, or an update did not reproduce."
        f" No number is bitwise: the replays it rests on have {claim} from the record (relative, at"
        " the kept states)."
    ]


def not_screened(refused: str) -> list[str]:
    """The caution of an audit without first-order scores: it rests on replays alone."""
    return [f"There are no scores of single updates: {refused}"] if refused else []


def without_placebo(stages: Sequence[StageFinding]) -> list[str]:
    """The caution of an audit that could not afford to measure the noise floor everywhere."""
    missing = [repr(s.name) for s in stages if any(math.isnan(f) for f in s.floors)]
    if not missing:
        return []
    return [
        f"The budget left no placebo for {', '.join(missing)}: their effects were not held against"
        " the noise floor, and in chaotic training even a replayed effect may be chaos."
    ]


def culprit(window: WindowFinding, behaviours: Sequence[BehaviourFacts], replays: int) -> str:
    """What a search for single updates found."""
    effects = window.replayed or []
    said = "; ".join(
        f"{b.name} {e:+.3g} {b.unit}".replace("-", "\N{MINUS SIGN}")
        for b, e in zip(behaviours, effects, strict=True)
    )
    return (
        f"Of the single updates left out one at a time, update {window.start} did most harm:"
        f" {said}, proved by replay (found with {replays} replays; others may have done more)."
    )


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
    against: list[str] = []
    for stage in stages:
        chaotic = [
            f"{b.name} ({_best(stage, q):+.3g}, floor {stage.floors[q]:.2g} {b.unit})"
            for q, b in enumerate(behaviours)
            if q < len(stage.floors) and hidden(_best(stage, q), stage.floors[q])
        ]
        if chaotic:
            said.append(
                f"The effect of stage {stage.name!r} on {'; '.join(chaotic)} lies inside of the"
                " noise floor: rounding-sized noise at the same moment moves it as far. That is"
                " chaos, not accountability, and not identified."
            )
        if stage.estimated and stage.grade == NOT_IDENTIFIED and None in stage.replayed:
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
            against.append(f"{stage.name!r} ({', '.join(opposed)})")
        for q, behaviour in enumerate(behaviours):
            truth = stage.replayed[q]
            if truth is None or not stage.estimated or stage.grade != TRUSTED:
                continue
            if _apart(stage.effects[q], truth):
                said.append(
                    f"The estimate for stage {stage.name!r} on {behaviour.name}"
                    f" ({stage.effects[q]:+.3g}) was graded trusted, but replay gave {truth:+.3g}"
                    f" {behaviour.unit}: use the replayed number."
                )
    lost = [repr(s.name) for s in stages if not s.estimated and None in s.replayed]
    if lost:
        said.append(
            f"Nothing is known of {', '.join(lost)}: neither estimated nor, within the budget,"
            " replayed. A larger budget replays them."
        )
    if against:
        said.append(
            "The AA-Score has another sign than the effect for"
            f" {'stage' if len(against) == 1 else 'stages'} {', '.join(against)}: it is linear in"
            " the behaviour too, and the stage moved the model further than that holds. The effect"
            " counts."
        )
    missing = sum(grade == NOT_IDENTIFIED for grade in update_grades)
    if missing:
        said.append(
            f"The scores of {missing} of {len(update_grades)} single updates are not identified:"
            " the training after them amplifies small changes too much for a first-order score."
        )
    said.append(NO_VERDICT_ON_PEOPLE)
    return said


def _best(stage: StageFinding, q: int) -> float:
    truth = stage.replayed[q]
    return stage.effects[q] if truth is None else truth


def _apart(estimate: float, truth: float) -> bool:
    return abs(estimate - truth) > TOLERANCE * abs(truth)


def reason(grade: str, growth: float, residual: float | None) -> str:
    """Why a stage's estimate has its grade, in one sentence."""
    if residual is None:
        return f"the sum of its updates' first-order scores, which need not add up, hence {grade}"
    if math.isnan(residual):
        return "the last stage: nothing was linearised after it, so the estimate is exact"
    return (
        f"after the stage its displacement grew {growth:.2g}-fold, and along it the linearised "
        f"gradients were off by up to {residual:.0%}, hence {grade}"
    )
