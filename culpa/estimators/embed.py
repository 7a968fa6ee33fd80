"""``culpa.embed``: one forward sweep that embeds stages."""

from __future__ import annotations

from collections.abc import Sequence

from culpa import tree
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.updates import rule_for
from culpa.errors import OptionError, StageError, UnsupportedError
from culpa.estimators.effects import refuse_running_statistics
from culpa.estimators.embedding import StageEmbeddings, StageTrust
from culpa.estimators.from_checkpoints.embed import embed_checkpoints
from culpa.estimators.from_checkpoints.run import CheckpointRun
from culpa.estimators.tangent import FORMS, Additive, Carried, probes
from culpa.estimators.trust import DOUBTFUL, TRUSTED, grade_stage
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run
from culpa.trajectory.walk import forward, session


def embed(
    run: Run | CheckpointRun,
    problem: Problem,
    *,
    stages: Sequence[str] | None = None,
    propagator: Propagator | None = None,
    form: str = "block",
    order: int = 1,
    counterfactual: str = "skip",
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> StageEmbeddings:
    """Embed stages: D_S ~ theta_K - theta_K(without S), one forward sweep for all of them.

    Args:
        run: the recorded run. One of ``culpa.from_checkpoints`` goes to ``embed_checkpoints``,
            which says what is different there.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        stages: names; default all.
        propagator: default ``Exact(at="gauss")``: at practical learning rates the paper's
            curvature, at the observed parameters, is the largest source of error. ``Secant(0.25)``
            costs a tenth of it; ``Secant(1)`` a fifth, and is exact: retraining without each
            stage, side by side.
        form: ``"block"`` (the paper's Appendix B; more accurate and cheaper) or ``"additive"``
            (Estimator 4.3).
        order: 1.
        counterfactual, allow_drift: see ``culpa.replay``; ``facts["claim"]`` is the outcome.
        progress: see ``culpa.progress``.

    Returns:
        The embeddings. Cost: one replay of the run from the first stage on and, per stage and
        update after it, two Hessian products (5 gradients; ``culpa.replay`` takes one). Memory:
        per stage one displacement and one optimizer state.

    Raises:
        StageError: an unknown stage, or none at all.
        UnsupportedError: for an optimizer without a differentiable rule, for changing running
            statistics, for models without second derivatives, and for ``order=2``.
    """
    if isinstance(run, CheckpointRun):
        return embed_checkpoints(
            run,
            problem,
            stages=stages,
            propagator=propagator,
            form=form,
            order=order,
            counterfactual=counterfactual,
            progress=progress,
        )
    check_counterfactual(counterfactual)
    if form not in FORMS:
        raise OptionError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}.")
    if order != 1:
        raise UnsupportedError(f"order={order!r}: this version has first-order embeddings only.")
    wanted = run.stages if stages is None else [run.stage(n) for n in dict.fromkeys(stages)]
    if not wanted:
        raise StageError(
            f"no stage to embed: {run.path} has {len(run.stages)} and stages={stages!r}."
        )
    refuse_running_statistics(run, "culpa.embed")
    wanted, chosen = sorted(wanted, key=lambda s: s.start), propagator or Exact(at="gauss")
    first, watch = wanted[0].start, progress or Silent()
    carried = [FORMS[form](s, counterfactual) for s in wanted]
    where = probes(wanted, run.num_steps)
    watch.start("embed", run.num_steps - first)
    try:
        with session(run, problem, allow_drift) as engine:
            for transition in forward(run, engine, first, run.num_steps):
                rule, local = (
                    rule_for(transition.record.optimizer.name),
                    LocalLoss(problem, transition),
                )
                for one in carried:
                    one.advance(
                        rule, transition, local, chosen, transition.index in where[one.stage.name]
                    )
                watch.advance()
    finally:
        watch.finish()
    final = run.final_state()
    size = tree.norm(run.state(run.num_steps).params)
    trust = {one.stage.name: _trust(one, run.num_steps, size) for one in carried}
    facts = {
        "form": form,
        "order": str(order),
        "propagator": repr(chosen),
        "counterfactual": counterfactual,
        "root_digest": run.root_digest,
        "claim": engine.fidelity.claim,
    }
    displacements = {one.stage.name: one.displacement for one in carried}
    return StageEmbeddings(wanted, displacements, trust, final, run.final_buffers(), facts, problem)


def _trust(one: Carried, num_steps: int, size: float) -> StageTrust:
    """The residual: the mean of the sampled remainders, times the updates it stands for, over D."""
    now, after = tree.norm(one.displacement), num_steps - one.stage.stop
    growth = now / one.at_stage_end if one.at_stage_end > 0.0 else 1.0
    error = tree.norm(one.remainders) * after / one.probed if one.probed else float("nan")
    residual = error / now if now > 0.0 else error
    relative = now / size if size > 0.0 else float("inf")
    grade = grade_stage(growth, residual)
    if isinstance(one, Additive) and grade == TRUSTED:
        grade = DOUBTFUL  # that the stage's updates add up is assumed, and not measured
    return StageTrust(relative, growth, residual, grade)
