"""``culpa.embed``: one forward sweep that embeds stages."""

from __future__ import annotations

from collections.abc import Sequence

from culpa import tree
from culpa.dynamics import choice as choices
from culpa.dynamics.local import LocalLoss
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.secant import Secant
from culpa.dynamics.updates import Rules
from culpa.errors import OptionError, StageError
from culpa.estimators import second_order
from culpa.estimators.by_replay import REPLAYED_UP_TO, embed_by_replay
from culpa.estimators.effects import running_statistics
from culpa.estimators.embedding import StageEmbeddings, StageTrust
from culpa.estimators.from_checkpoints.embed import embed_checkpoints
from culpa.estimators.from_checkpoints.run import CheckpointRun
from culpa.estimators.remainder import probes
from culpa.estimators.tangent import FORMS, Additive, Carried
from culpa.estimators.trust import DOUBTFUL, NOT_IDENTIFIED, TRUSTED, grade_stage
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.ranks import afterwards
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage
from culpa.trajectory.state import on_cpu
from culpa.trajectory.walk import forward, session


def embed(
    run: Run | CheckpointRun,
    problem: Problem,
    *,
    stages: Sequence[str] | None = None,
    updates: Sequence[int] = (),
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
        stages: names; default all, or none where ``updates`` are given.
        updates: single updates to embed as well, by index: ``emb["update 7"]`` (Estimator 4.1;
            with ``order=2`` its second-order terms too, which ``culpa.attribute`` leaves out).
        propagator: default, where no more than two stages are to be embedded in the block form:
            none, they are replayed exactly, which costs less than any sweep (``facts["strategy"]``
            says so). Else ``Exact(at="gauss")``: at practical learning rates the paper's curvature,
            at the observed parameters, is the largest source of error. ``Secant(0.25)`` costs a
            tenth of it; ``Secant(1)`` a fifth, and is exact: retraining without each stage, side
            by side.
        form: ``"block"`` (the paper's Appendix B; more accurate and cheaper) or ``"additive"``
            (Estimator 4.3).
        order: 1; or 2, with the second-order terms of the update map in D (third derivatives of
            the loss, all of the optimizer's), and of the behaviour in ``score``. At the observed
            parameters, ``Exact()``; it helps while D is small and diverges where it is not, which
            the midpoint and Gauss points do not (docs/results/order2.md).
        counterfactual, allow_drift: see ``culpa.replay``; ``facts["claim"]`` is the outcome.
        progress: see ``culpa.progress``.

    Returns:
        The embeddings. Cost: one replay of the run from the first stage on and, per stage and
        update after it, two Hessian products (5 gradients; ``culpa.replay`` takes one). Memory:
        per stage one displacement and one optimizer state.

    Raises:
        StageError: an unknown stage, or none at all.
        UnsupportedError: for an optimizer without a differentiable rule, for changing buffers other
            than running statistics, for a propagator or an order that the model cannot support.
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
    propagator = second_order.first_propagator(propagator, form, order)
    wanted = _wanted(run, stages, updates)
    if not wanted:
        raise StageError(
            f"no stage to embed: {run.path} has {len(run.stages)} and stages={stages!r}."
        )
    if propagator is None and form == "block" and len(wanted) <= REPLAYED_UP_TO:
        return embed_by_replay(
            run,
            problem,
            wanted,
            counterfactual=counterfactual,
            allow_drift=allow_drift,
            progress=progress,
        )
    running = running_statistics(run, problem)
    afterwards.refuse(
        {
            "order=2": order == 2,
            f"embeddings through running statistics ({', '.join(running[:1])})": bool(running),
        }
    )
    wanted, chosen = sorted(wanted, key=lambda s: s.start), propagator or Exact(at="gauss")
    first, watch = wanted[0].start, progress or Silent()
    rules = Rules(problem.optimizers)
    if chosen.moves and not isinstance(chosen, Secant):
        for stage in run.stages:
            rules.require_differentiable(run.step(stage.start).groups)
    carried = [FORMS[form](s, counterfactual, running) for s in wanted]
    where = probes(wanted, run.num_steps)
    watch.start("embed", run.num_steps - first)
    try:
        with session(run, problem, allow_drift) as engine:
            carrying = min(s.stop if form == "block" else s.start + 1 for s in wanted)
            length = run.num_steps - carrying
            surveyed = choices.surveyed(run, engine, problem, carrying) if length else []
            choice = choices.settle(chosen, surveyed, [], length=length, along=form == "block")
            if order == 2:
                choice = second_order.second(choice, surveyed)
            for transition in forward(run, engine, first, run.num_steps):
                local = LocalLoss(problem, transition)
                for one in carried:
                    one.advance(
                        rules,
                        transition,
                        local,
                        choice.propagator,
                        where[one.stage.name].get(transition.index, 0),
                    )
                watch.advance()
    finally:
        watch.finish()
    final = run.final_state()
    size = tree.norm(run.state(run.num_steps).params)
    trust = {one.stage.name: _trust(one, size) for one in carried}
    facts = {
        "form": form,
        "order": str(order),
        "propagator": repr(choice.propagator),
        "strategy": choice.reason,
        "counterfactual": counterfactual,
        "root_digest": run.root_digest,
        "claim": engine.fidelity.claim,
    }
    displacements = {one.stage.name: on_cpu(one.displacement) for one in carried}
    statistics = {one.stage.name: on_cpu(one.statistics) for one in carried}
    return StageEmbeddings(
        wanted, displacements, trust, final, run.final_buffers(), facts, problem, statistics
    )


def _wanted(run: Run, stages: Sequence[str] | None, updates: Sequence[int]) -> Sequence[Stage]:
    """The stages asked for, single updates among them as stages of one."""
    for k in updates:
        if not 0 <= k < run.num_steps:
            raise StageError(
                f"there is no update {k} in {run.path}: it has {run.num_steps}, from 0."
            )
    names = (s.name for s in run.stages) if stages is None and not updates else stages or ()
    single = [Stage(f"update {k}", k, k + 1) for k in dict.fromkeys(updates)]
    return [*(run.stage(name) for name in dict.fromkeys(names)), *single]


def _trust(one: Carried, size: float) -> StageTrust:
    """The residual is the error that the remainders measured add up to, relative to D."""
    now = tree.norm(one.displacement)
    growth = now / one.at_stage_end if one.at_stage_end > 0.0 else 1.0
    residual = one.error / now if now > 0.0 else one.error
    relative = now / size if size > 0.0 else float("inf")
    diverged = not tree.is_finite(one.displacement)
    grade = NOT_IDENTIFIED if diverged else grade_stage(growth, residual)
    if isinstance(one, Additive) and grade == TRUSTED:
        grade = DOUBTFUL  # that the stage's updates add up is assumed, and not measured
    return StageTrust(relative, growth, residual, grade)
