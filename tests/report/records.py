"""Records of audits that could have happened, made without training anything."""

from __future__ import annotations

import math
import random

from culpa.auditing.record import (
    AuditRecord,
    BehaviourFacts,
    RunFacts,
    Source,
    Spending,
    StageFinding,
    UpdateFindings,
)

NAMES = ["upright digits", "digits rotated by 45°", "mislabelled 4s and 9s", "fine-tuning"]
BEHAVIOURS = [
    ("log-likelihood of clean digits", "nats"),
    ("log-likelihood of rotated digits", "nats"),
    ("accuracy on digit 4", "points"),
]


def make_record(
    *,
    stages: list[str] | None = None,
    behaviours: list[tuple[str, str]] | None = None,
    steps: int = 240,
    replayed: bool = True,
    seed: int = 0,
) -> AuditRecord:
    """A record of ``steps`` updates in stages of equal length, numbers drawn from ``seed``."""
    draw = random.Random(seed)
    names = NAMES if stages is None else stages
    facts = BEHAVIOURS if behaviours is None else behaviours
    edges = [round(i * steps / len(names)) for i in range(len(names) + 1)]
    grades = ["not identified", "doubtful", "trusted", "trusted"]
    lean = [1.1, 0.35, -0.42, 0.2]
    scores: list[list[float]] = []
    update_grades: list[str] = []
    for k in range(steps):
        i = next(i for i in range(len(names)) if edges[i] <= k < edges[i + 1])
        early = math.exp(-4.0 * k / steps)
        update_grades.append(grades[0 if k < 0.12 * steps else 1 if k < 0.3 * steps else 2])
        scores.append(
            [
                (lean[i % 4] * (1 if q != 1 else 0.6) + draw.gauss(0.0, 0.6 + 2.5 * early))
                * 4.0
                / steps
                for q in range(len(facts))
            ]
        )
    findings = [
        _stage(
            name,
            edges[i],
            edges[i + 1],
            [sum(row[q] for row in scores[edges[i] : edges[i + 1]]) for q in range(len(facts))],
            grades[min(i, 3)] if len(names) > 1 else "trusted",
            replayed and i > 0,
            draw,
        )
        for i, name in enumerate(names)
    ]
    return AuditRecord(
        culpa_version="0.1.0",
        created="2026-01-05T20:14:09Z",
        run=RunFacts(
            name="mnist-three-jobs",
            root_digest="blake3:6b1f0ce2b54d3f4c8c50a5a8f9f0b9a8f1e7d1c3b5a79788694a3b2c1d0e9f80",
            num_steps=steps,
            num_parameters=118_282,
            optimizer="SGD(lr=0.003, momentum=0.9)",
            counterfactual="skip",
            bytes_on_disk=12_345_678,
            kept_states=17,
            environment={
                "torch": "2.13.0+cpu",
                "python": "3.12.4",
                "threads": "1",
                "device": "cpu",
            },
        ),
        behaviours=[
            BehaviourFacts(name=name, unit=unit, value=-0.412 + 0.2 * q, count=200)
            for q, (name, unit) in enumerate(facts)
        ],
        stages=findings,
        updates=UpdateFindings(
            scores=scores,
            growth=[1.0 + 6.0 * math.exp(-5.0 * k / steps) for k in range(steps)],
            displacement=[0.004 * draw.random() + 1e-4 for _ in range(steps)],
            grades=update_grades,
            learning_rates=[0.003 * (1.0 - 0.9 * k / steps) for k in range(steps)],
        ),
        verdicts=[
            "“mislabelled 4s and 9s” is to blame: without it the model would be 0.418 nats better "
            "on clean digits, confirmed by re-running history.",
            "“upright digits” earned most of the credit, but its estimate is not identified: "
            "re-run it before you rely on the number.",
            "“fine-tuning” changed little: +0.05 nats on clean digits, trusted.",
        ],
        cautions=[
            "Early training is chaotic: the first 28 updates redraw the rest of the run.",
            "The placebo spread of this run is ±0.012 nats; smaller effects mean nothing.",
        ],
        spent=[
            Spending(what="adjoint sweep", updates=steps, seconds=14.2),
            Spending(what="stage embeddings", updates=2 * steps, seconds=31.9),
            Spending(what="replays", updates=round(1.5 * steps), seconds=125.0),
        ],
        options={"propagator": "Secant(0.25)", "form": "block", "budget": "1.0"},
        sources=[
            Source(
                what="AA-Score, Estimators 4.1 to 4.3",
                citation="Zhang, Du, Ma, Lakkaraju. Who Gets Credit or Blame? Attributing "
                "Accountability in Modern AI Systems. arXiv 2506.00175.",
            ),
            Source(what="Digest", citation="BLAKE3, https://github.com/BLAKE3-team/BLAKE3-specs."),
        ],
    )


def _stage(
    name: str,
    start: int,
    stop: int,
    scores: list[float],
    grade: str,
    replayed: bool,
    draw: random.Random,
) -> StageFinding:
    spread = {"trusted": 0.04, "doubtful": 0.25, "not identified": 0.7}[grade]
    effects = [score * (1.0 + draw.gauss(0.0, spread)) for score in scores]
    true = [e * (1.0 + draw.gauss(0.0, spread)) if replayed else None for e in effects]
    trust = ["replayed" if replayed else grade] * len(scores)
    growth = {"trusted": 0.92, "doubtful": 3.1, "not identified": 43.0}[grade]
    return StageFinding(
        name=name,
        start=start,
        stop=stop,
        scores=scores,
        effects=effects,
        replayed=list(true),
        grade=grade,
        reason=f"Its displacement grew {growth:g} times until the end of training, where "
        "trusted estimates stay below 2 and doubtful ones below 10.",
        displacement=0.137,
        growth=growth,
        residual=0.021 * growth,
        intervals=[0.03 * growth] * len(scores),
        floors=[0.012] * len(scores),
        grades=trust,
        sums=[1.1 * score for score in scores],
    )
