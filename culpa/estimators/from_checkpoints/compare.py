"""What checkpoints alone miss, where the same run was recorded too."""

from __future__ import annotations

from culpa import tree
from culpa.errors import OptionError
from culpa.estimators.embedding import StageEmbeddings
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.replay import replay
from culpa.trajectory.run import Run
from culpa.trajectory.state import largest_difference


def compare_with_recording(
    found: StageEmbeddings, run: Run, problem: Problem, progress: Progress | None = None
) -> dict[str, float]:
    """The relative error of each stage's embedding, ||D - D_true|| / ||D_true||, by stage name.

    Args:
        found: embeddings, as ``culpa.embed`` makes them from the checkpoints of a run.
        run: the recording of that run, with stages of the same names.
        problem: the problem it was recorded with.
        progress: see ``culpa.progress``.

    Returns:
        The errors. The truth is replayed: one retraining a stage, from where the stage begins.

    Raises:
        OptionError: if the recording ended with another model.
        StageError: if it lacks one of the stages.
    """
    final = run.final_state()
    held = {name: found.final[name] for name in final if name in found.final}
    name, gap = largest_difference(final, held)
    if name:
        raise OptionError(
            f"{run.path} is no recording of the run that was embedded: they end with another"
            f" {name!r}, by up to {gap:.3g}. Give the recording of that very run."
        )
    errors: dict[str, float] = {}
    watch = progress or Silent()
    watch.start("compare", len(found))
    try:
        for stage in found:
            without = replay(run, problem, without=stage, counterfactual=_sense(found)).state
            truth = tree.subtract(final, without)
            truth = {name: truth[name] for name in found[stage]}
            size = tree.norm(truth)
            missed = tree.norm(tree.subtract(found[stage], truth))
            errors[stage] = missed / size if size > 0.0 else missed
            watch.advance()
    finally:
        watch.finish()
    return errors


def _sense(found: StageEmbeddings) -> str:
    return found.facts.get("counterfactual", "skip")
