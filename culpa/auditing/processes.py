"""Replays side by side, in processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType

from culpa.auditing.elsewhere import Case, Make, execute
from culpa.auditing.tasks import Bench, Outcome, Task
from culpa.errors import OptionError, UnsupportedError
from culpa.progress import Progress, Silent


class Processes:
    """Runs the replays of an audit in ``workers`` processes of this machine: an executor.

    What can run side by side does (the replays of all stages, the groups of a search); an audit
    that replays one stage after the other, each time deciding on the next, gains nothing. A worker
    that dies takes its task with it, which another then runs. Use it as a context manager, or
    ``close`` it: the workers wait for more work until then.

    Every worker holds a model of its own, and uses the threads that the run was recorded with:
    with ``workers`` times these threads beyond the machine's cores they slow each other down.

    Args:
        make: the function that the problem and the behaviours of the audit come from, importable
            (at the top of a module, or of a script whose main part stands under
            ``if __name__ == "__main__":``). Every worker calls it once.
        workers: how many; default: the cores that this process may use.
        retries: how often a task may be run again because its worker died.

    Raises:
        OptionError: for no workers, or a function that cannot be imported.
    """

    def __init__(self, make: Make, workers: int | None = None, retries: int = 2) -> None:
        if workers is not None and workers < 1:
            raise OptionError(f"Processes needs at least one worker, got {workers}.")
        if "<" in getattr(make, "__qualname__", ""):  # <lambda>, <locals>
            raise OptionError(
                f"Processes cannot hand {make!r} to another process, which imports it by its name."
                " Define the function at the top of a module."
            )
        self.make = make
        self.workers = workers or len(os.sched_getaffinity(0))
        self.retries = retries
        self.lost = 0
        """How many workers died so far."""
        self._pool: ProcessPoolExecutor | None = None

    def map(self, work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
        """``work(task)`` for every task, in their order.

        Raises:
            OptionError: if ``work`` is no bench of an audit.
            UnsupportedError: if workers died more often than ``retries`` over one task.
            and whatever a task raises.
        """
        if not isinstance(work, Bench):
            raise OptionError(f"Processes runs the tasks of an audit, got {work!r}.")
        if len(tasks) < 2:  # here is where nothing needs to be built first
            yield from map(work, tasks)
            return
        watch: Progress = work.progress or Silent()
        watch.start("replays", len(tasks))
        try:
            for outcome in self._outcomes(Case.of(work, self.make), tasks):
                watch.advance()
                yield outcome
        finally:
            watch.finish()

    def close(self) -> None:
        """End the workers; what waits for one is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Processes:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _outcomes(self, case: Case, tasks: Sequence[Task]) -> Iterator[Outcome]:
        futures: list[Future[Outcome]] = []
        deaths = at = 0
        try:
            while at < len(tasks):
                try:
                    if not futures:
                        futures = [self._submit(case, task) for task in tasks]
                    yield futures[at].result()
                    at, deaths = at + 1, 0
                except BrokenProcessPool as error:
                    self.lost, deaths = self.lost + 1, deaths + 1
                    self.close()
                    if deaths > self.retries:
                        raise UnsupportedError(
                            f"{deaths} worker processes died over the task {tasks[at].name!r}. Too"
                            " little memory for so many? Use fewer workers, or none."
                        ) from error
                    futures = (
                        [
                            future if _succeeded(future) else self._submit(case, task)
                            for future, task in zip(futures, tasks, strict=True)
                        ]
                        if futures
                        else []
                    )
        finally:
            for future in futures:
                future.cancel()

    def _submit(self, case: Case, task: Task) -> Future[Outcome]:
        if self._pool is None:
            # spawn: a forked child inherits torch's threads as they are not
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        return self._pool.submit(execute, case, task)


def _succeeded(future: Future[Outcome]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
