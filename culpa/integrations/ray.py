"""Replays side by side on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RaySystemError, RayTaskError, WorkerCrashedError

from culpa.auditing.elsewhere import Case, Make, execute
from culpa.auditing.tasks import Bench, Outcome, Task
from culpa.errors import OptionError, UnsupportedError
from culpa.progress import Progress, Silent


class Ray:
    """Runs the replays of an audit as Ray tasks: an executor for ``culpa.audit``.

    The run must lie where every worker finds it under the same name: a shared folder, or an object
    store (``culpa.open_run("s3://...")``). A replay is bitwise only on a machine like the one that
    recorded (docs/environment.md); a worker on another refuses, or with ``allow_drift=True``
    measures. A lost worker's task runs again elsewhere. A driver that was stopped goes on where it
    was when the audit has a ``work`` folder.

    Args:
        make: the function that the problem and the behaviours of the audit come from, importable by
            the workers. Each calls it once.
        retries: how often a task may be run again because its worker was lost.
        options: what a replay needs, as ``ray.remote`` takes it: ``num_cpus=1`` (Ray's default),
            ``num_gpus=1``, ``memory=...``.

    Ray is started on this machine if ``ray.init`` was not called before.
    """

    def __init__(self, make: Make, *, retries: int = 3, **options: Any) -> None:
        self.make = make
        self._options = {"max_retries": retries, **options}

    def map(self, work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
        """``work(task)`` for every task, in their order.

        Raises:
            OptionError: if ``work`` is no bench of an audit.
            UnsupportedError: if the workers of one task were lost more often than ``retries``.
            and whatever a task raises.
        """
        if not isinstance(work, Bench):
            raise OptionError(f"Ray runs the tasks of an audit, got {work!r}.")
        if not tasks:
            return
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        case = ray.put(Case.of(work, self.make))
        remote: Any = ray.remote(execute).options(**self._options)
        waiting = [remote.remote(case, task) for task in tasks]
        watch: Progress = work.progress or Silent()
        watch.start("replays", len(tasks))
        try:
            # After an error the rest runs on: cancelling a task that is just done, which cannot be
            # told from outside, ends the driver of ray 2.60.
            for reference in waiting:
                outcome = self._outcome(reference)
                watch.advance()
                yield outcome
        finally:
            watch.finish()

    def _outcome(self, reference: Any) -> Outcome:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if not isinstance(error.cause, RaySystemError):
                raise error.cause from error
            raise UnsupportedError(
                f"a worker could not begin a task: {error.cause} The module of {self.make!r} must"
                " be importable there: ray.init(runtime_env={'working_dir': ...}), or installed."
            ) from error
        except WorkerCrashedError as error:
            raise UnsupportedError(
                f"a task lost its worker {self._options['max_retries'] + 1} times. Too little"
                " memory for so many at once? Ask for more of it: Ray(make, memory=...)."
            ) from error
