"""From the results of an audit to its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from culpa.auditing import verdicts as words
from culpa.auditing.contest import SOURCE as CONTEST
from culpa.auditing.drill import example_findings
from culpa.auditing.experiments import Experiments
from culpa.auditing.floor import floor_at
from culpa.auditing.intervals import Estimate
from culpa.auditing.ranking import Ranking
from culpa.auditing.record import (
    AuditRecord,
    BehaviourFacts,
    LayerFindings,
    RunFacts,
    Source,
    Spending,
    StageFinding,
    UpdateFindings,
)
from culpa.auditing.screen import Embedded, Screened, number
from culpa.auditing.search import SOURCE as GROUP_TESTING
from culpa.auditing.search import Search
from culpa.auditing.tasks import Outcome
from culpa.dynamics.updates import Rules
from culpa.errors import UnsupportedError
from culpa.estimators.layers import SOURCE as LAYERS
from culpa.estimators.trust import NOT_IDENTIFIED, TRUSTED
from culpa.trajectory.fidelity import weakest
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage

AA_SCORE = (
    "Zhang, Du, Ma, Lakkaraju, Who Gets Credit or Blame? Attributing Accountability in Modern AI "
    "Systems, arXiv 2506.00175"
)
BLOCK, ADDITIVE = "block (Appendix B)", "additive (Estimator 4.3): sums of update scores"
EXACT = "none: every stage was replayed"
REPLAYS = "none: replays alone"


def record(
    experiments: Experiments,
    *,
    screened: Screened,
    embedded: Embedded | None,
    estimates: Mapping[str, Estimate],
    truths: Mapping[str, Outcome],
    ranking: Ranking,
    search: Search | None,
    stopped: str,
    notes: Sequence[str],
    options: dict[str, str],
    version: str,
) -> AuditRecord:
    """Everything that was found, as the record holds it."""
    run, problem = experiments.bench.run, experiments.bench.problem
    behaviours = experiments.bench.observed
    used = None if embedded is None or embedded.refused else embedded
    stages = [
        _stage(i, stage, used, estimates[stage.name], truths.get(stage.name), ranking, screened)
        for i, stage in enumerate(run.stages)
    ]
    updates = _updates(run, screened, experiments, len(behaviours))
    claims = [screened.claim, *experiments.claims, *([used.claim] if used else [])]
    claim = weakest(claims)
    counterfactual = experiments.bench.counterfactual
    return AuditRecord(
        culpa_version=version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=_run_facts(run, counterfactual),
        behaviours=behaviours,
        stages=stages,
        updates=updates,
        verdicts=[*words.verdicts(stages, behaviours), *_culprits(search, behaviours)],
        cautions=[
            *words.not_bitwise(claim),
            *words.cautions(stages, behaviours, updates.grades, counterfactual),
            *notes,
            *words.not_screened(screened.refused),
            *words.without_placebo(stages),
        ],
        spent=[*_sweeps(screened, used), *experiments.spent],
        options=options
        | {
            "propagator": screened.propagator if used is None else used.propagator,
            "asked for": options["propagator"],
            "form": _form(used, stages),
            "claim": claim,
        },
        sources=_sources(run, Rules(problem.optimizers), screened, search),
        budget=experiments.budget,
        used=experiments.used,
        stopped=stopped,
        settled=ranking.settled,
        placebos=experiments.placebos,
        tradeoffs=words.tradeoffs(stages, behaviours),
        windows=[] if search is None else search.windows,
        layers=_layers(behaviours, truths),
        examples=example_findings(screened.examples, [b.name for b in behaviours]),
    )


def _stage(
    i: int,
    stage: Stage,
    embedded: Embedded | None,
    estimate: Estimate,
    truth: Outcome | None,
    ranking: Ranking,
    screened: Screened,
) -> StageFinding:
    displacement, growth, residual = math.nan, math.nan, None
    if embedded is not None:
        displacement, growth, residual = (
            number(of[i]) for of in (embedded.displacement, embedded.growth, embedded.residual)
        )
    exact = truth is not None and embedded is None
    unknown = truth is None and embedded is None and not screened.steps
    grade, reason = estimate.grade, words.reason(estimate.grade, growth, residual)
    if exact:
        grade, reason = TRUSTED, "it was replayed, not estimated"
    elif unknown:
        reason = "it was neither estimated nor replayed"
    width = len(estimate.effects)
    rows = screened.steps[stage.start : stage.stop]
    return StageFinding(
        name=stage.name,
        start=stage.start,
        stop=stage.stop,
        scores=list(estimate.scores if truth is None else truth.scores),
        effects=list(truth.effects if truth is not None and exact else estimate.effects),
        replayed=[None] * width if truth is None else [*truth.effects],
        grade=grade,
        reason=reason,
        displacement=displacement if truth is None else truth.displacement,
        growth=growth,
        residual=math.nan if residual is None else residual,
        intervals=ranking.intervals[stage.name],
        floors=ranking.floors[stage.name],
        grades=ranking.grades[stage.name],
        estimated=not exact and not unknown,
        sums=[math.fsum(number(row[q]) for row in rows) for q in range(width)] if rows else [],
    )


def _form(embedded: Embedded | None, stages: Sequence[StageFinding]) -> str:
    if embedded is not None:
        return BLOCK
    if any(stage.estimated for stage in stages):
        return ADDITIVE
    return REPLAYS if any(None in stage.replayed for stage in stages) else EXACT


def _updates(run: Run, screened: Screened, experiments: Experiments, width: int) -> UpdateFindings:
    """The scores; an update all of whose scores lie inside of the noise floor is not identified."""
    scores = [[number(v) for v in row] for row in screened.steps]
    grades = list(screened.grades)
    floors = {
        s.start: [floor_at(experiments.placebos, s.start, q, run.num_steps) for q in range(width)]
        for s in run.stages
    }
    for stage in run.stages:
        for k in stage.updates if scores else ():
            if all(0.0 < abs(v) <= f for v, f in zip(scores[k], floors[stage.start], strict=True)):
                grades[k] = NOT_IDENTIFIED
    return UpdateFindings(
        scores=scores,
        growth=[number(v) for v in screened.growth],
        displacement=[number(v) for v in screened.displacement],
        grades=grades,
        learning_rates=[float(run.step(k).hypers[0]["lr"]) for k in range(len(scores))],
    )


def _culprits(search: Search | None, behaviours: Sequence[BehaviourFacts]) -> list[str]:
    found = [] if search is None else search.culprits()[:1]
    return [
        words.culprit(window, behaviours, search.replays) for window in found if search is not None
    ]


def _layers(
    behaviours: Sequence[BehaviourFacts], truths: Mapping[str, Outcome]
) -> list[LayerFindings]:
    return [
        LayerFindings(
            stage=name,
            behaviour=behaviour.name,
            effects=split,
            rest=truth.effects[q] - math.fsum(split.values()),
        )
        for name, truth in truths.items()
        for q, (behaviour, split) in enumerate(zip(behaviours, truth.layers, strict=False))
    ]


def _sweeps(screened: Screened, embedded: Embedded | None) -> list[Spending]:
    spent = [
        Spending(
            what="scores of every update: replayed and differentiated",
            updates=screened.updates,
            seconds=screened.seconds,
        )
    ]
    if embedded is not None:
        spent.append(
            Spending(
                what="embeddings of every stage: replayed and differentiated",
                updates=embedded.updates,
                seconds=embedded.seconds,
            )
        )
    return [s for s in spent if s.updates]


def _run_facts(run: Run, counterfactual: str) -> RunFacts:
    state = run.state(run.num_steps)
    return RunFacts(
        name=run.path.name,
        root_digest=run.root_digest,
        num_steps=run.num_steps,
        num_parameters=sum(p.numel() for p in state.params.values()),
        optimizer=", ".join(_optimizers(run)),
        counterfactual=counterfactual,
        bytes_on_disk=run.bytes_on_disk,
        kept_states=len(run.kept_states),
        environment=run.manifest.environment,
    )


def _optimizers(run: Run) -> list[str]:
    """Their classes, in the order of the run."""
    names = (group.optimizer for s in run.stages for group in run.step(s.start).groups)
    return list(dict.fromkeys(names))


def _sources(run: Run, rules: Rules, screened: Screened, search: Search | None) -> list[Source]:
    found = [Source(what="AA-Score, Estimators 4.1 to 4.3, Appendix B", citation=AA_SCORE)]
    if screened.citation:
        found.append(Source(what="propagation through an update", citation=screened.citation))
    for name in _optimizers(run):
        try:
            rule = rules.named(name)
        except UnsupportedError:  # replays need no rule
            continue
        found.append(Source(what=f"update rule {rule.name}", citation=rule.source))
    found += [
        Source(
            what="replayed effects",
            citation="skip-and-retrain: the recorded updates, executed again",
        ),
        Source(what="which stage to replay next, and when to stop", citation=CONTEST),
        Source(what="effects by layer", citation=LAYERS),
    ]
    if search is not None:
        found.append(Source(what="search for single updates", citation=GROUP_TESTING))
    return found
