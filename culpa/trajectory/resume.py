"""Going on with a recording that a crash, an exception or a full disk ended.

The training script runs again, unchanged, with ``resume=True``. The record knows every update up
to its last commit, n of them, and a point shortly before it (point.py): everything that update r
of them started from. So:

- ``recorder.batches(loader)`` draws the batches of the updates before r, checks by digest that
  they are the recorded ones, and drops them: the loop's body does not run for them. Generators
  are put where they were before every draw that moved them, and at the end of every loop, so that
  loaders that shuffle or augment, and code between the loops, draw what they drew.
- At update r the module, the optimizer, the scheduler and the generators are put into s_r, which
  was recomputed by exact replay from the nearest kept state.
- From r on the body runs. Updates r to n - 1 are in the record already: they must come out bit
  for bit as recorded, which proves that the script is the same. From n on it records.

What lives in the loop's body alone (a counter, an early stop, ``for ... else``) does not see the
updates before r; count from ``recorder.num_steps``. Loops with ``recorder.step`` have no loader to
draw from: they begin at update ``recorder.num_steps`` themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from culpa.errors import RecordError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import digest, files, jobs, log, rng, walk
from culpa.trajectory.batches import encode
from culpa.trajectory.observer import Observer
from culpa.trajectory.point import Point, plain, shaped
from culpa.trajectory.rng import RandomState
from culpa.trajectory.run import Run
from culpa.trajectory.schema import MANIFEST, Stage
from culpa.trajectory.seal import as_recording
from culpa.trajectory.state import State
from culpa.trajectory.store import Store
from culpa.tree import Tree


@dataclass(frozen=True)
class Loop:
    """A loop over batches as the record has it, up to its end or to the point."""

    number: int
    start: int
    stop: int
    draws: int
    exhausted: bool
    checked: bool
    after: RandomState | None
    """The generators after it; ``None``: it goes on at the point."""


class Resumption:
    """What a script that runs again must pass through, and the state it arrives in.

    All that is needed of the record is read here: the folder may be written on afterwards.

    Args:
        run: what was recorded, open.
        rank, ranks: of this process, and how many record together.
        point, loops, draws: of this rank.
    """

    def __init__(
        self,
        run: Run,
        rank: int,
        ranks: int,
        point: Point,
        loops: list[Loop],
        draws: dict[int, bytes],
    ) -> None:
        self.path, self.manifest, self.base = run.path, run.manifest, jobs.base_of(run)
        self.point = point
        self.num_steps = run.num_steps
        self.stages = {stage.name: stage for stage in run.stages}
        self.begins_with = {*run.manifest.parameters} - run.tables.frozen_before(self.base.index)
        """The parameters that the job's first optimizer holds."""
        self.record = run.step(point.index)
        """The update that comes next."""
        self.state = State({})
        self.frozen: Tree = {}
        self._loops = {loop.number: loop for loop in loops}
        self._loops |= {
            o.number: Loop(o.number, o.start, point.index, o.draws, False, o.checked, None)
            for o in point.loops
        }
        self._draws = draws
        self._made = {k: run.step(k).digest for k in range(point.index, self.num_steps)}
        layouts = [blake3(layout.encode()).digest() for layout in run.tables.layouts]
        rows = run.tables.digests()
        self._contents: dict[int, list[tuple[int, bytes]]] = {}
        for number, loop in self._loops.items():
            found = self._contents[number] = []
            for k in range(loop.start, min(loop.stop, self.num_steps) if loop.checked else 0):
                micro = run.step(k).micro_batches
                share = len(micro) // ranks
                found += [
                    (k, digest.combine([layouts[one.layout], *(rows[i] for i in one.rows)]))
                    for one in micro[rank * share : (rank + 1) * share]
                ]

    def open_store(self, folder: Path) -> Store:
        """The folder to write on. As in jobs.py, its manifest is replaced before the log."""
        growing = as_recording(self.manifest)
        files.write_durably(folder / MANIFEST, growing.encode())
        return Store.reopen(folder, growing)

    def recompute(self, run: Run, problem: Problem) -> None:
        """s_r by exact replay from the nearest kept state."""
        r = self.point.index
        with walk.session(run, jobs.of_this_job(run, problem)) as engine:
            self.frozen = run.frozen_parameters()
            if r in run.kept_states:
                self.state = run.state(r)
            else:
                for transition in walk.forward(run, engine, r - 1, r):
                    self.state = transition.after

    def skip(self, number: int, loader: Any) -> tuple[Iterator[Any], Loop]:
        """Draw what a loop drew before the point; returns its iterator and the recorded loop."""
        loop = self._loops.get(number)
        if loop is None:
            raise RecordError(
                f"loop {number} over recorder.batches begins before update {self.point.index} is"
                " reached, where the record goes on; the recorded script had no such loop there."
                " Resume with the script and the data that were recorded."
            )
        self._restore_before(number, 0)
        iterator = iter(loader)
        expected = [*self._contents[number]]
        for n in range(loop.draws):
            if n:
                self._restore_before(number, n)
            try:
                batch = next(iterator)
            except StopIteration:
                raise RecordError(
                    f"the loader of loop {number} ended after {n} batches; {loop.draws} were drawn"
                    " when it was recorded. Resume with the same data."
                ) from None
            if expected and _content(batch) == expected[0][1]:
                expected.pop(0)
            elif loop.checked and loop.draws - n - 1 < len(expected):
                raise RecordError(
                    f"update {expected[0][0]} was made of another batch than batch {n} of loop"
                    f" {number} is now. Resume with the same data, seeds and loader; if the loop's"
                    " batches come in an order that nothing repeats, record a new run."
                )
        if loop.after is not None:
            if loop.exhausted and next(iterator, iterator) is not iterator:
                raise RecordError(
                    f"the loader of loop {number} yields more than the {loop.draws} batches it had"
                    " when it was recorded. Resume with the same data."
                )
            rng.restore(loop.after)
        elif loop.draws:
            self._restore_before(number, loop.draws)
        return iterator, loop

    def _restore_before(self, number: int, n: int) -> None:
        """The generators before the n-th draw of a loop, if drawing moved them."""
        random = self._draws.get(log.draw_id(number, n))
        if random is not None:
            rng.restore(RandomState.decode(random))

    def put(self, observer: Observer, scheduler: Any) -> None:
        """Put the module, the optimizer, the scheduler and the generators into s_r."""
        point, optimizer = self.point, observer.optimizer
        observer.write(self.state, self.frozen)
        optimizer.state.clear()
        if point.has_slots:
            for slot, values in self.state.slots.items():
                for name, value in values.items():
                    param = observer.held[name]
                    elsewhere = slot == "step" and not _on_device(optimizer, param)
                    optimizer.state[param][slot] = (
                        value if elsewhere else observer.placed(name, value)
                    )
        for group, hyper in zip(optimizer.param_groups, point.hypers, strict=True):
            for name, value in hyper.items():
                group[name] = _typed(value, group.get(name))
        if scheduler is not None:
            if point.refused:
                raise UnsupportedError(
                    f"this run cannot be resumed: the scheduler's state is not plain data"
                    f" ({point.refused}), so it was not recorded."
                )
            scheduler.load_state_dict(shaped(point.scheduler, scheduler.state_dict()))
        rng.restore(point.random)

    def check(self, index: int, after: State) -> None:
        """Raise unless an update that was made again is the recorded one."""
        if digest.combine(after.step_digests()) != self._made[index]:
            raise RecordError(
                f"update {index}, made again, is not what {self.path} has recorded. Resume with"
                " the same script, data and hyperparameters. A loop with recorder.step begins at"
                " recorder.num_steps; what the loop's body counts or changes by itself (a learning"
                " rate, say) must be taken from there too."
            )


def scheduler_state(scheduler: Any) -> tuple[Any, str]:
    """A scheduler's state as data, or why it is not."""
    if scheduler is None:
        return None, ""
    try:
        return plain(scheduler.state_dict(), type(scheduler).__name__), ""
    except UnsupportedError as error:
        return None, str(error)


def stage_of(resumption: Resumption, name: str) -> Stage:
    """The recorded stage that a script passes through, by name."""
    stage = resumption.stages.get(name)
    if stage is None or stage.start > resumption.point.index:
        raise RecordError(
            f"stage {name!r} begins before update {resumption.point.index} is reached, where the"
            f" record goes on; recorded stages are {', '.join(map(repr, resumption.stages))}."
            " Resume with the script that was recorded."
        )
    return stage


def _content(batch: Any) -> bytes:
    """What tells a batch from others: the digest of its layout and its rows."""
    encoded = encode(batch)
    prefix = blake3(encoded.layout.encode()).digest()
    rows = (blake3(prefix + row.tobytes()).digest() for row in encoded.rows)
    return digest.combine([prefix, *rows])


def _on_device(optimizer: Any, param: Tensor) -> bool:
    """Whether the optimizer keeps its step counter beside the parameter."""
    for group in optimizer.param_groups:
        if any(p is param for p in group["params"]):
            return bool(group.get("capturable") or group.get("fused"))
    return False


def _typed(value: Any, live: Any) -> Any:
    """A recorded hyperparameter in the type that the group has."""
    if isinstance(live, Tensor):
        return live.fill_(value)
    return tuple(value) if isinstance(live, tuple) else value
