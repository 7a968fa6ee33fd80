"""The audit: first-order scores screen everything, replays prove the few that matter."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from culpa._version import __version__
from culpa.auditing import verdicts as words
from culpa.auditing.record import (
    AuditRecord,
    BehaviourFacts,
    RunFacts,
    Source,
    Spending,
    StageFinding,
    UpdateFindings,
)
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Propagator
from culpa.dynamics.updates import rule_for
from culpa.errors import OptionError, StageError
from culpa.estimators.adjoint import Scores, attribute
from culpa.estimators.embed import embed
from culpa.estimators.embedding import StageEmbeddings
from culpa.estimators.trust import NOT_IDENTIFIED
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.fidelity import weakest
from culpa.trajectory.replay import replay
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage

AA_SCORE = (
    "Zhang, Du, Ma, Lakkaraju, Who Gets Credit or Blame? Attributing Accountability in Modern AI "
    "Systems, arXiv 2506.00175"
)


def judge(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    budget: float = 1.0,
    counterfactual: str = "skip",
    propagator: Propagator | None = None,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> AuditRecord:
    """Find out which stages are to be credited or blamed. See ``culpa.audit``."""
    if not run.stages:
        raise StageError(f"{run.path} has no stages to audit.")
    if not budget >= 0:
        raise OptionError(
            f"budget is a number of trainings to spend on replays, >= 0; got {budget}."
        )
    names = [b.name for b in behaviours]
    if len(set(names)) != len(names):
        raise OptionError(
            f"the behaviours' names must differ, got {names}: a table is labelled with them."
        )
    spent: list[Spending] = []
    began = time.monotonic()
    scores = attribute(
        run,
        problem,
        behaviours,
        propagator=propagator,
        counterfactual=counterfactual,
        allow_drift=allow_drift,
        progress=progress,
    )
    spent.append(
        _spending("scores of every update: replayed and differentiated", run.num_steps, began)
    )
    began = time.monotonic()
    embeddings = embed(
        run,
        problem,
        propagator=propagator,
        counterfactual=counterfactual,
        allow_drift=allow_drift,
        progress=progress,
    )
    spent.append(
        _spending("embeddings of every stage: replayed and differentiated", run.num_steps, began)
    )
    aa = [embeddings.score(b).mean(1).tolist() for b in behaviours]
    effects = [embeddings.effect(b).mean(1).tolist() for b in behaviours]
    estimates = {s.name: [e[i] for e in effects] for i, s in enumerate(run.stages)}
    grades = {name: embeddings.trust[name].grade for name in embeddings}
    truths: dict[str, list[float]] = {}
    claims = [scores.claim, embeddings.facts["claim"]]
    for stage in plan(run, estimates, grades, budget):
        began = time.monotonic()
        without = replay(
            run,
            problem,
            without=stage,
            counterfactual=counterfactual,
            allow_drift=allow_drift,
            progress=progress,
        )
        claims.append(without.claim)
        truths[stage] = [float(without.effect(b).mean()) for b in behaviours]
        spent.append(_spending(f"replay without stage {stage!r}", without.updates_executed, began))
    facts = [_behaviour_facts(problem, embeddings, b) for b in behaviours]
    findings = [
        _finding(
            stage, embeddings, [a[i] for a in aa], estimates[stage.name], truths.get(stage.name)
        )
        for i, stage in enumerate(run.stages)
    ]
    updates, claim = _updates(run, scores), weakest(claims)
    return AuditRecord(
        culpa_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=_run_facts(run, counterfactual),
        behaviours=facts,
        stages=findings,
        updates=updates,
        verdicts=words.verdicts(findings, facts),
        cautions=[
            *words.not_bitwise(claim),
            *words.cautions(findings, facts, updates.grades, counterfactual),
        ],
        spent=spent,
        options={
            "budget": f"{budget:g} trainings",
            "propagator": str(embeddings.facts["propagator"]),
            "form": "block",
            "claim": claim,
        },
        sources=_sources(run, scores),
    )


def plan(
    run: Run, estimates: Mapping[str, Sequence[float]], grades: Mapping[str, str], budget: float
) -> list[str]:
    """Which stages to replay, in order, while ``budget`` (in trainings) lasts.

    First what no estimate can tell: stages not identified. Then for each behaviour the most blamed
    and the most credited stage, then the others, each by its largest part in what the stages did.
    """
    width = len(next(iter(estimates.values())))
    known = [name for name in estimates if grades[name] != NOT_IDENTIFIED]
    urgency = dict.fromkeys(estimates, 0.0)
    for q in range(width):
        total = sum(abs(estimates[name][q]) for name in known) or 1.0
        ranked = sorted(known, key=lambda name: estimates[name][q])
        for name in known:
            extreme = name in (ranked[0], ranked[-1])
            urgency[name] = max(urgency[name], abs(estimates[name][q]) / total + extreme)
    order = sorted(estimates, key=lambda name: -urgency[name] if name in known else float("-inf"))
    chosen: list[str] = []
    for name in order:
        cost = _cost(run, run.stage(name))
        if cost <= budget:
            budget -= cost
            chosen.append(name)
    return chosen


def _cost(run: Run, stage: Stage) -> float:
    """What a replay without the stage costs, in trainings."""
    return (run.num_steps - run.kept_before(stage.start) - len(stage)) / run.num_steps


def _spending(what: str, updates: int, began: float) -> Spending:
    return Spending(what=what, updates=updates, seconds=time.monotonic() - began)


def _behaviour_facts(
    problem: Problem, embeddings: StageEmbeddings, behaviour: Behaviour
) -> BehaviourFacts:
    values = embeddings.observed(behaviour)
    return BehaviourFacts(
        name=behaviour.name, unit=behaviour.unit, value=float(values.mean()), count=len(values)
    )


def _finding(
    stage: Stage,
    embeddings: StageEmbeddings,
    scores: list[float],
    effects: list[float],
    truth: list[float] | None,
) -> StageFinding:
    trust = embeddings.trust[stage.name]
    return StageFinding(
        name=stage.name,
        start=stage.start,
        stop=stage.stop,
        scores=scores,
        effects=effects,
        replayed=[None] * len(scores) if truth is None else [*truth],
        grade=trust.grade,
        reason=words.reason(trust.grade, trust.growth, trust.residual),
        displacement=trust.displacement,
        growth=trust.growth,
        residual=trust.residual,
    )


def _updates(run: Run, scores: Scores) -> UpdateFindings:
    return UpdateFindings(
        scores=scores.steps.tolist(),
        growth=[t.growth for t in scores.trust],
        displacement=[t.displacement for t in scores.trust],
        grades=[t.grade for t in scores.trust],
        learning_rates=[float(run.step(k).hypers[0]["lr"]) for k in range(run.num_steps)],
    )


def _run_facts(run: Run, counterfactual: str) -> RunFacts:
    state = run.state(run.num_steps)
    optimizers = dict.fromkeys(run.step(s.start).optimizer.name for s in run.stages)
    return RunFacts(
        name=run.path.name,
        root_digest=run.root_digest,
        num_steps=run.num_steps,
        num_parameters=sum(p.numel() for p in state.params.values()),
        optimizer=", ".join(optimizers),
        counterfactual=counterfactual,
        bytes_on_disk=run.bytes_on_disk,
        kept_states=len(run.kept_states),
        environment=run.manifest.environment,
    )


def _sources(run: Run, scores: Scores) -> list[Source]:
    names = dict.fromkeys(run.step(s.start).optimizer.name for s in run.stages)
    rules = [rule_for(name) for name in names]
    return [
        Source(what="AA-Score, Estimators 4.1 to 4.3, block form of Appendix B", citation=AA_SCORE),
        Source(what="propagation through an update", citation=scores.propagator.citation),
        *(Source(what=f"update rule {rule.name}", citation=rule.source) for rule in rules),
        Source(
            what="replayed effects",
            citation="skip-and-retrain: the recorded updates, executed again",
        ),
    ]
