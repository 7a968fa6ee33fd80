"""Stage embeddings from stage checkpoints alone: exact at a stage's end, then reconstructed."""

from __future__ import annotations

from collections.abc import Sequence

from culpa import tree
from culpa.dynamics.krylov import Krylov
from culpa.dynamics.propagator import Propagator
from culpa.errors import OptionError, StageError, UnsupportedError
from culpa.estimators.embedding import StageEmbeddings
from culpa.estimators.from_checkpoints.run import INSTEAD, CheckpointRun
from culpa.estimators.from_checkpoints.segment import floating, split, trained
from culpa.estimators.from_checkpoints.sweep import Carried, Sweep
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.borrowing import borrowed
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.state import State, largest_difference, on_cpu


def embed_checkpoints(
    run: CheckpointRun,
    problem: Problem,
    *,
    stages: Sequence[str] | None = None,
    propagator: Propagator | None = None,
    form: str = "block",
    order: int = 1,
    counterfactual: str = "skip",
    progress: Progress | None = None,
) -> StageEmbeddings:
    """D_S ~ theta_K - theta_K(without S) of each stage, from the checkpoints between the stages.

    At the end of its stage D is the difference of two checkpoints: exact. Through each later stage
    both paths are reconstructed, from theta and from theta - D, by ``Krylov`` segments on the same
    rows, and D becomes the difference of their ends: what the reconstruction misses of both, such
    as the order of the batches, cancels to first order in D.

    Args:
        run: from ``culpa.from_checkpoints``.
        problem: the model and the loss it was trained with, a mean over rows.
        stages: names; default all.
        propagator: a ``Krylov``; default ``Krylov()``.
        form, order: ``"block"`` and 1; there is nothing else without a recording.
        counterfactual: ``"skip"`` or ``"restart"``: the same where every stage began with a fresh
            optimizer.
        progress: see ``culpa.progress``.

    Returns:
        The embeddings. The last stage's is exact. Cost: for each segment of a later stage
        ``rank`` products and two gradients on ``examples`` rows, once for the run's own path and
        once per stage embedded, however many updates there were. Trust: ``residual`` is the
        relative error of D that the quadratic models leave, estimated from their gradients at the
        segments' ends; what the sampling of rows adds is not in it, nor what batches nobody knows
        did to a momentum that one stage left to the next: such stages are *doubtful* at best.

    Raises:
        UnsupportedError: another propagator, form, order or counterfactual; running statistics
            that changed; a model without second derivatives.
        ProblemError: checkpoints that do not fit the model; a reconstruction that diverges.
        StageError: an unknown stage, or none.
        OptionError: a stage without data.
    """
    chosen = _checked(propagator, form, order, counterfactual)
    wanted = run.stages if stages is None else [run.stage(n) for n in dict.fromkeys(stages)]
    if not wanted:
        raise StageError(f"no stage to embed: stages={stages!r}. Name some, or leave it out.")
    names, watch = trained(problem), progress or Silent()
    last = len(run.stages)
    final = split(problem, run.checkpoint(last), last)
    _refuse_running_statistics(split(problem, run.checkpoint(0), 0), final)
    carried = [Carried(stage) for stage in sorted(wanted, key=lambda stage: stage.start)]
    with borrowed(problem.model):
        sweep = Sweep(run, problem, chosen, counterfactual, names)
        watch.start("embed", sweep.segments(carried))
        try:
            for at in range(last):
                sweep.advance(at, carried, watch)
        finally:
            watch.finish()
    size = tree.norm({name: final.params[name] for name in names})
    facts = {
        "form": form,
        "order": str(order),
        "propagator": repr(chosen),
        "counterfactual": counterfactual,
        "root_digest": run.root_digest,
        "source": "stage checkpoints",
    }
    return StageEmbeddings(
        [one.stage for one in carried],
        {one.stage.name: on_cpu(one.displacement) for one in carried},
        {one.stage.name: one.trust(size) for one in carried},
        on_cpu(final.params),
        on_cpu(final.buffers),
        facts,
        problem,
    )


def _checked(propagator: Propagator | None, form: str, order: int, counterfactual: str) -> Krylov:
    chosen = Krylov() if propagator is None else propagator
    if not isinstance(chosen, Krylov):
        raise UnsupportedError(
            f"{chosen!r} follows single updates, which stage checkpoints do not hold. Use"
            f" culpa.Krylov(rank). {INSTEAD}."
        )
    check_counterfactual(counterfactual)
    if counterfactual == "zero-gradient":
        raise UnsupportedError(
            "counterfactual='zero-gradient' needs the momentum at every update of the stage, which"
            f" checkpoints do not hold; 'skip' and 'restart' work. {INSTEAD}."
        )
    if form != "block":
        raise OptionError(
            f"form={form!r}: checkpoints hold the displacement of whole stages, form='block'."
            f" {INSTEAD}."
        )
    if order != 1:
        raise UnsupportedError(
            f"order={order!r}: from checkpoints there is order=1 only. {INSTEAD}."
        )
    return chosen


def _refuse_running_statistics(first: State, last: State) -> None:
    name, _ = largest_difference(floating(first.buffers), floating(last.buffers))
    if name:
        raise UnsupportedError(
            f"training changed the buffer {name!r} (running statistics), and how it would have"
            f" ended cannot be told from checkpoints. {INSTEAD}."
        )
