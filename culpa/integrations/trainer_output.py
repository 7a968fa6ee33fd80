"""``culpa.from_trainer_output``: a run of a training that is over, from what its trainer left.

Put it where the training script called ``trainer.train()``:

    run = culpa.from_trainer_output("output", trainer)

Training is executed once more, recorded, and compared with every checkpoint it passes. The façade
has this name, so transformers is imported only by those who call it.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from culpa.errors import CulpaError, NotReproducibleError, OptionError, UnsupportedError
from culpa.integrations.attributes import replaced
from culpa.integrations.trainer_checks import Check, file_of, write_checks
from culpa.integrations.trainer_folder import Saved, checkpoints_of
from culpa.progress import Progress, Silent
from culpa.trajectory import rng
from culpa.trajectory.run import Run, open_run


class Drifted(CulpaError, UserWarning):  # noqa: N818 (a warning, not an error)
    """A warning: the re-executed training is close to the original, not the same bit for bit."""


def from_trainer_output(
    folder: str | Path,
    trainer: Any,
    *,
    path: str | Path | None = None,
    stage: str = "train",
    segments: Mapping[str, int] | None = None,
    start: int = 0,
    stop: int | None = None,
    resumed: Sequence[int] = (),
    tolerance: float = 0.01,
    progress: Progress | None = None,
    **options: Any,
) -> Run:
    """Re-execute a training of ``transformers.Trainer``, record it, check it by its checkpoints.

    The call stands where ``trainer.train()`` stood in the script that trained: same data, same
    arguments, same seed, nothing else drawn from the generators before. It does not write into
    ``folder`` (but the run, unless ``path`` says where), reports to no tracker, and leaves the
    trainer's model as training did at ``stop``.

    Args:
        folder: the trainer's ``output_dir``, with its ``checkpoint-N`` folders.
        trainer: the ``transformers.Trainer``, built as it was then, not trained.
        path: the run folder to make; by default ``culpa`` in ``folder``.
        stage: what the segments between two checkpoints are called: ``"train 0-500"``, ``"train
            500-1000"``, one stage each; a single one has this very name.
        segments: stages of your own instead: the name of each and the number of updates after
            which it ends, in order; the last at ``stop``.
        start: the checkpoint to begin at, ``N`` of its ``checkpoint-N``; 0: the model as the
            trainer was constructed. The run's update 0 is then the trainer's update ``N``.
        stop: the checkpoint to end at; by default the last one.
        resumed: the checkpoints at which the original training was stopped and resumed. That is
            done again: what is drawn may differ from a training that was not stopped. Each part
            is a job of the run, which then needs ``culpa.Problem.by_stage({stage.name: problem
            for stage in run.stages})``.
        tolerance: the largest ``Check.drift`` to accept; 0: bitwise or nothing.
        progress: told of updates.
        options: of ``culpa.record``: ``checkpoints``, ``examples``, ``overwrite``, ...

    Returns:
        The run. How each checkpoint compares is in ``<path>.checkpoints.json`` beside it, and
        ``culpa.integrations.trainer_checks.checks_of(run)`` reads it. The problem is
        ``culpa.integrations.transformers.problem_of(trainer)``.

    Raises:
        StoreError: if there is nothing in ``folder`` to compare with, or it is damaged.
        OptionError: for a start, stop or segment that is not there.
        NotReproducibleError: if re-execution is another training: other arguments (before the
            first update), or weights farther from a checkpoint than ``tolerance``. What was
            executed till then is kept as an interrupted run.
        UnsupportedError: for several processes, pickled weights, or a start without its
            optimizer. Where re-execution is impossible, ``culpa.from_checkpoints`` may do.
        and whatever ``record_trainer`` raises.

    Warns:
        Drifted: where a checkpoint is within ``tolerance`` but not the same bit for bit.

    Cost: the original training once more, evaluations included, and a copy of the weights written
    beside the run at each checkpoint.
    """
    from culpa.integrations.trainer_again import Again, Plan
    from culpa.integrations.trainer_ranks import require_one_process
    from culpa.integrations.transformers import record_trainer

    require_one_process(trainer, "checkpoints are compared with a training")
    folder = Path(folder)
    saved = checkpoints_of(folder)
    end = saved[-1].step if stop is None else stop
    bounds = _bounds(saved, folder, start, end, resumed)
    within = [one for one in saved if start < one.step <= end]
    names = _named(stage, segments, [start, *(one.step for one in within)])
    _require_stages(names, bounds)
    where = Path(path) if path is not None else folder / "culpa"
    _require_unfinished(trainer)
    shown = progress or Silent()
    checks: list[Check] = []
    begun = rng.capture()
    shown.start("re-executing updates", end - start)
    try:
        with (
            ExitStack() as undone,
            tempfile.TemporaryDirectory(prefix="culpa-", dir=_existing(where)) as scratch,
        ):
            _quieten(trainer, undone)
            for first, last in pairwise(bounds):
                plan = Plan(first, last, names, saved, tolerance, Path(scratch))
                again = Again(trainer, plan, checks, shown)
                undone.enter_context(replaced(trainer, "_save_checkpoint", again.save_checkpoint))
                further = {} if first == start else {"append": True, "overwrite": False}
                with (
                    again.watching(),
                    record_trainer(
                        trainer, where, stage=names[first], **{**options, **further}
                    ) as recording,
                ):
                    again.recording = recording
                    rng.restore(begun)  # the process that resumed had run the same script
                    trainer.train(resume_from_checkpoint=_resumed_from(saved, first))
                    again.finish()
                if last < end and not checks[-1].bitwise:
                    raise NotReproducibleError(
                        f"training cannot be resumed at {checks[-1]}: what was recorded would not"
                        f" go on from there. Leave {last} out of resumed=, or begin behind it with"
                        f" start={last}."
                    )
    finally:
        shown.finish()
    run = open_run(where)
    write_checks(run, folder, tuple(checks))
    off = [str(check) for check in checks if not check.bitwise]
    if off:
        warnings.warn(
            f"the training re-executed into {where} is not bitwise that of {folder}:"
            f" {'; '.join(off)}. All of it: {file_of(where)}.",
            Drifted,
            stacklevel=2,
        )
    return run


def _bounds(
    saved: Sequence[Saved], folder: Path, start: int, stop: int, resumed: Sequence[int]
) -> list[int]:
    """Where each call of ``train()`` begins and ends."""
    known = {one.step: one for one in saved}
    bounds = [start, *sorted(set(resumed)), stop]
    for at in bounds:
        if at not in known and not at == start == 0:
            raise OptionError(
                f"there is no checkpoint-{at} in {folder}; there are"
                f" {', '.join(map(str, sorted(known)))}. start, stop and resumed are such numbers"
                " (start=0: the trainer's model as constructed)."
            )
    if any(one >= other for one, other in pairwise(bounds)):
        raise OptionError(
            f"start={start}, resumed={sorted(set(resumed))}, stop={stop} must follow each other:"
            " the re-executed updates are those from start to stop."
        )
    for at in bounds[:-1]:
        if at in known and not known[at].resumable:
            raise UnsupportedError(
                f"{known[at].path} holds no state of the optimizer, the scheduler or the"
                " generators (saved with save_only_model?), so training cannot go on from it as it"
                " did. Begin at start=0 with the model that the script built; the weights alone"
                " are enough to check that."
            )
    return bounds


def _named(stage: str, segments: Mapping[str, int] | None, ends: Sequence[int]) -> dict[int, str]:
    """The stage that begins after so many updates."""
    if segments is None:
        if len(ends) == 2:
            return {ends[0]: stage}
        return {first: f"{stage} {first}-{last}" for first, last in pairwise(ends)}
    stops = [ends[0], *segments.values()]
    if any(one >= other for one, other in pairwise(stops)) or stops[-1] != ends[-1]:
        raise OptionError(
            f"segments={dict(segments)} must end one after another, after update {ends[0]}, and"
            f" the last after {ends[-1]} updates, where the last checkpoint is."
        )
    return dict(zip(stops[:-1], segments, strict=True))


def _require_stages(names: Mapping[int, str], bounds: Sequence[int]) -> None:
    inside = [at for at in bounds[:-1] if at not in names]
    if inside:
        raise OptionError(
            f"the original training was resumed after update {inside[0]}, so a stage must end"
            " there; segments has none that does."
        )


def _require_unfinished(trainer: Any) -> None:
    if trainer.state.global_step:
        raise OptionError(
            f"the trainer has made {trainer.state.global_step} updates already: its model is not"
            " the one training began with. Build it anew, and call from_trainer_output in place of"
            " trainer.train()."
        )


def _existing(path: Path) -> Path:
    """The nearest folder above that is there, on the disk that the run will be on."""
    return next(above for above in path.absolute().parents if above.is_dir())


def _resumed_from(saved: Sequence[Saved], step: int) -> str | None:
    return next((str(one.path) for one in saved if one.step == step), None)


def _quieten(trainer: Any, undone: ExitStack) -> None:
    """No reports to trackers, nothing deleted, and the last weights at the end, not the best."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__module__.startswith("transformers.integrations"):
            trainer.remove_callback(callback)
            undone.callback(trainer.add_callback, callback)
    for name, value in (
        ("save_total_limit", None),
        ("load_best_model_at_end", False),
        ("push_to_hub", False),
    ):
        undone.enter_context(replaced(trainer.args, name, value))
