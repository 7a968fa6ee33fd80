"""Reading a run: what was recorded, as values. Nothing in the folder is ever executed."""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from culpa.errors import IntegrityError, StageError, StoreError
from culpa.trajectory import batches, examples
from culpa.trajectory.examples import given as rows_given
from culpa.trajectory.frozen import Frozen
from culpa.trajectory.kept import read_state
from culpa.trajectory.layout import DAMAGED
from culpa.trajectory.ranks.afterwards import own
from culpa.trajectory.ranks.joined import holders
from culpa.trajectory.reader import LogReader
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import (
    FORMAT,
    FROZEN_NAME,
    LOG,
    MANIFEST,
    PACK,
    STATES,
    Manifest,
    MicroBatch,
    Stage,
    state_name,
)
from culpa.trajectory.source import Source, open_source
from culpa.trajectory.state import State
from culpa.trajectory.steps import Steps
from culpa.trajectory.tables import Tables
from culpa.tree import Tree

MAX_MANIFEST = 2**26
"""Bytes of a manifest: a million parameters' names fit."""


class Run:
    """A recorded training run. Open one with ``culpa.open_run(path)``."""

    def __init__(self, source: Source, manifest: Manifest, tables: Tables) -> None:
        self.source = source
        self.path = Path(source.where)
        self.manifest = manifest
        self.tables = tables
        self.num_steps = tables.num_steps
        """Number of updates."""
        self.stages: tuple[Stage, ...] = tables.stages
        """The stages in order of time, updates ``[start, stop)`` each."""
        self.kept_states: tuple[int, ...] = tuple(tables.states)
        """The k whose state s_k (before update k) is on disk; the first and last always are."""
        self.root_digest = manifest.root_digest
        """What to quote of this run in an audit: it changes if any recorded byte does."""
        self.rows: examples.RowStore = (
            examples.Pack(source, tables.examples[:, 1])
            if manifest.examples == "stored"
            else examples.Missing(source.where)
        )
        self.frozen = Frozen(  # which must not refer to the run: its log is to be closed at once
            source, manifest, lambda: read_state(source, manifest, FROZEN_NAME, None).params
        )
        self.step = Steps(tables)

    def __repr__(self) -> str:
        stages = ", ".join(f"{s.name} [{s.start}, {s.stop})" for s in self.stages)
        return f"Run({self.source.where!r}, {self.num_steps} updates: {stages})"

    @property
    def num_examples(self) -> int:
        """The number of distinct training examples."""
        return len(self.tables.examples)

    @property
    def bytes_on_disk(self) -> int:
        """The size of the folder."""
        return sum(self.source.files().values())

    def bytes_by_part(self) -> dict[str, int]:
        """The size of the states, the examples, the log and the manifest."""
        parts = {"states": 0, "examples": 0, "log": 0, "manifest": 0}
        for name, size in self.source.files().items():
            if name.startswith(f"{STATES}/"):
                parts["states"] += size
            elif name == PACK:
                parts["examples"] += size
            elif name.startswith(LOG):
                parts["log"] += size
            elif name == MANIFEST:
                parts["manifest"] += size
        return parts

    def stage(self, name: str) -> Stage:
        """The stage by that name; raises ``StageError`` listing those that exist."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(repr(s.name) for s in self.stages) or "none"
        raise StageError(f"no stage {name!r} in {self.path}; its stages are {known}.")

    def stage_at(self, k: int) -> Stage | None:
        """The stage that update k belongs to."""
        return next((s for s in self.stages if s.start <= k < s.stop), None)

    def initial_state(self) -> State:
        """s_0."""
        return self.state(0)

    def final_state(self) -> Tree:
        """All parameters after the last update, by name, on the CPU; the never trained too."""
        return self.frozen_parameters() | self.state(self.num_steps).params

    def final_buffers(self) -> Tree:
        """The buffers after the last update, by name."""
        return self.state(self.num_steps).buffers

    def frozen_parameters(self) -> Tree:
        """The parameters that no optimizer ever held."""
        joined, values = self.tables.joined, self.frozen.values()
        values = {name: v for name, v in values.items() if name not in joined}
        return own(values) if self.frozen.by_reference else values

    def state(self, k: int) -> State:
        """A kept state; raises ``StoreError`` for one that is not kept.

        What trains at any time of the run is in it, also before an optimizer holds it.
        """
        if k not in self.tables.states:
            raise StoreError(
                f"s_{k} is not kept in {self.path}; nearest before it: {self.kept_before(k)}."
            )
        out = self.tables.frozen_before(k)
        state = read_state(self.source, self.manifest, state_name(k), out)
        joining = self._joining if holders() is None else self._read_joining()
        later = {name: v for name, v in joining.items() if name not in state.params}
        return State(state.params | later, state.buffers, state.slots) if later else state

    def held_before(self, state: State, k: int) -> State:
        """``state`` without the parameters that no optimizer held before update k."""
        if not self.tables.joined:
            return state
        out = self.tables.frozen_before(k)
        held = {name: value for name, value in state.params.items() if name not in out}
        return State(held, state.buffers, state.slots)

    @cached_property
    def _joining(self) -> Tree:
        return self._read_joining()

    def _read_joining(self) -> Tree:
        """The parameters that were frozen first and trained later, as they were at first."""
        joined = self.tables.joined
        if not joined:
            return {}
        return {name: v for name, v in self.frozen.values().items() if name in joined}

    def kept_before(self, k: int) -> int:
        """The largest kept index <= k."""
        return self.kept_states[bisect_right(self.kept_states, k) - 1]

    def example_ids(self, k: int) -> tuple[int, ...]:
        """The training examples of update k, in the order of its batch (micro-batches in turn)."""
        return tuple(row for micro in self.step(k).contributing for row in micro.rows)

    def batches_of(self, k: int) -> list[Any]:
        """The micro-batches of update k, as the loader yielded them."""
        return [self._batch(k, micro) for micro in self.step(k).micro_batches]

    def randoms_of(self, k: int) -> list[RandomState | None]:
        """The generators before each micro-batch's forward, where they were disturbed."""
        return [
            None if micro.random is None else self.tables.random(micro.random)
            for micro in self.step(k).micro_batches
        ]

    def verify(
        self,
        problem: Any = None,
        level: str = "digest",
        progress: Any = None,
        *,
        sample: int | None = None,
        root_digest: str | None = None,
    ) -> Any:
        """Prove that the folder holds what was recorded.

        Args:
            problem: the ``Problem``, needed for ``level="replay"``.
            level: ``"digest"`` recomputes every digest and the hash chain (as fast as the disk);
                ``"replay"`` also executes every update again and compares bit for bit (about the
                cost of training).
            progress: see ``culpa.progress``.
            sample: with ``level="replay"``, execute only so many segments between kept states,
                chosen at random, anew at each call.
            root_digest: the digest that was quoted of the run elsewhere. Without it the folder is
                compared with itself only: somebody could have replaced all of it.

        Returns:
            A ``Verified`` (trajectory/verify.py): what was checked. An unfinished run (a crash)
            has no root digest; ``Verified.finished`` tells.

        Raises:
            IntegrityError: naming the file, update and field that is wrong.
        """
        from culpa.trajectory.verify import verify_run  # verify reads runs: avoid a cycle

        return verify_run(self, problem, level, progress, sample, root_digest)

    def _batch(self, k: int, micro: MicroBatch) -> Any:
        layout = self.tables.layouts[micro.layout]
        rows = examples.columns(self.rows, micro.rows, batches.row_bytes(layout.root))
        try:
            return batches.decode(layout, rows, micro.placements)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise IntegrityError(
                f"{self.source.where}: update {k}: its batch cannot be put together: {error}"
            ) from error


def open_run(
    path: str | Path,
    *,
    examples: Any = None,
    collate: examples.Collate | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> Run:
    """Open a run for reading.

    Args:
        path: the folder, or an address that fsspec knows, such as ``"s3://bucket/run"``: then only
            what is needed is fetched.
        examples: for a run recorded with ``examples="reference"``, the data: an iterable of
            batches collated as they were when recording or, with ``collate``, a map-style data
            set. Every recorded row is looked up in it by digest.
        frozen: for a run recorded with ``frozen="reference"``, these parameters by name (others
            may be among them): what training began from. They are compared by digest and used as
            they are, not copied. Whatever is given a ``Problem`` takes them from its model.
        collate: makes a batch of a list of items, as ``torch.utils.data.default_collate`` does.

    Raises:
        StoreError: if ``path`` is no run folder, or one of another format version.
        IntegrityError: if something in it is not as culpa writes it, or a training example is not
            in ``examples``.
        ProblemError: if ``frozen`` is not, bit for bit, what was recorded.
    """
    source = open_source(path)
    manifest = read_manifest(source)
    try:
        run = Run(source, manifest, Tables(LogReader(source, finished=manifest.finished), manifest))
    except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{source.where} cannot be read as a culpa run: {error}.") from error
    if frozen is not None:
        run.frozen.give(frozen)
    if examples is not None:
        wanted = {digest: number for number, digest in enumerate(run.tables.digests())}
        layouts = {layout.encode() for layout in run.tables.layouts}
        run.rows = rows_given(wanted, layouts, examples, collate, source.where)
    return run


def read_manifest(source: Source) -> Manifest:
    """The manifest; raises ``StoreError`` if there is none that this version reads."""
    file = f"{source.where}/{MANIFEST}"
    folder = Path(source.where)
    if "://" not in source.where and not (folder / MANIFEST).exists():
        what = "an existing folder" if folder.is_dir() else "nothing that exists"
        raise StoreError(
            f"{folder} is no culpa run: it is {what} without a {MANIFEST}. Pass the path that was "
            "given to culpa.record."
        )
    data = source.read(MANIFEST)
    if len(data) > MAX_MANIFEST:
        raise StoreError(f"{file} has {len(data)} bytes; {MAX_MANIFEST} is the most allowed.")
    try:
        version = msgspec.json.decode(data).get("format")
        if version != FORMAT:
            raise StoreError(f"{file} has format {version!r}; this culpa reads format {FORMAT}.")
        return msgspec.json.decode(data, type=Manifest)
    except (*DAMAGED, AttributeError) as error:
        raise StoreError(f"{file} cannot be read as a culpa run's: {error}.") from error
