"""Reading a run folder: what was recorded, as values. Nothing in the folder is ever executed."""

from __future__ import annotations

import mmap
import sqlite3
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from culpa import tree
from culpa.errors import IntegrityError, StageError, StoreError
from culpa.trajectory import batches, log
from culpa.trajectory.chain import StepDetail, StoredMicroBatch
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import FORMAT, Manifest, MicroBatch, OptimizerSpec, Stage, StepRecord
from culpa.trajectory.state import State
from culpa.trajectory.writer import FROZEN, LOG, MANIFEST, PACK, STATES, state_file
from culpa.tree import Tree


class Run:
    """A recorded training run. Open one with ``culpa.open_run(path)``."""

    def __init__(self, path: Path, manifest: Manifest, connection: sqlite3.Connection) -> None:
        self.path = path
        self.manifest = manifest
        self.connection = connection
        self.num_steps: int = log.rows(connection, "SELECT count(*) FROM step")[0][0]
        """Number of updates."""
        found = log.rows(connection, "SELECT name, start, stop FROM stage ORDER BY start")
        self.stages: tuple[Stage, ...] = tuple(Stage(*row) for row in found)
        """The stages in order of time, updates ``[start, stop)`` each."""
        self.kept_states: tuple[int, ...] = tuple(
            k for (k,) in log.rows(connection, "SELECT k FROM state ORDER BY k")
        )
        """The k whose state s_k (before update k) is on disk; the first and last always are."""
        self.root_digest = manifest.root_digest
        """What to quote of this run in an audit: it changes if any recorded byte does."""
        self._layouts = {
            i: msgspec.json.decode(json, type=batches.Layout)
            for i, json in log.rows(connection, "SELECT id, json FROM layout")
        }
        self._optimizers = {
            i: msgspec.json.decode(json, type=OptimizerSpec)
            for i, json in log.rows(connection, "SELECT id, json FROM optimizer")
        }
        self._hypers = {
            i: tuple(_tuples(h) for h in msgspec.json.decode(json))
            for i, json in log.rows(connection, "SELECT id, json FROM hypers")
        }
        index = log.rows(connection, "SELECT layout, offset, size FROM example ORDER BY id")
        self._examples = np.array(index, dtype=np.int64).reshape(-1, 3)
        with (path / PACK).open("rb") as pack:
            size = pack.seek(0, 2)
            self._pack = mmap.mmap(pack.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self.step = lru_cache(maxsize=4096)(self._step)

    def __repr__(self) -> str:
        stages = ", ".join(f"{s.name} [{s.start}, {s.stop})" for s in self.stages)
        return f"Run({str(self.path)!r}, {self.num_steps} updates: {stages})"

    @property
    def num_examples(self) -> int:
        """The number of distinct training examples."""
        return len(self._examples)

    @property
    def bytes_on_disk(self) -> int:
        """The size of the folder."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

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
        """All parameters after the last update, by name, those that never trained included."""
        return self.frozen_parameters() | self.state(self.num_steps).params

    def final_buffers(self) -> Tree:
        """The buffers after the last update, by name."""
        return self.state(self.num_steps).buffers

    def frozen_parameters(self) -> Tree:
        """The parameters that no optimizer held."""
        return self._read_state(self.path / STATES / f"{FROZEN}.safetensors").params

    def state(self, k: int) -> State:
        """A kept state; raises ``StoreError`` for one that is not kept."""
        if k not in self.kept_states:
            raise StoreError(
                f"s_{k} is not kept in {self.path}; nearest before it: {self.kept_before(k)}."
            )
        return self._read_state(state_file(self.path, k))

    def kept_before(self, k: int) -> int:
        """The largest kept index <= k."""
        return self.kept_states[bisect_right(self.kept_states, k) - 1]

    def example_ids(self, k: int) -> tuple[int, ...]:
        """The training examples of update k, in the order of its batch (micro-batches in turn)."""
        return tuple(row for micro in self.step(k).micro_batches for row in micro.rows)

    def batches_of(self, k: int) -> list[Any]:
        """The micro-batches of update k, as the loader yielded them."""
        return [self._batch(micro) for micro in self.step(k).micro_batches]

    def randoms_of(self, k: int) -> list[RandomState | None]:
        """The generators before each micro-batch's forward, where they were disturbed."""
        return [self._random(micro.random) for micro in self.step(k).micro_batches]

    def verify(self, problem: Any = None, level: str = "digest", progress: Any = None) -> None:
        """Prove that the folder holds what was recorded.

        Args:
            problem: the ``Problem``, needed for ``level="replay"``.
            level: ``"digest"`` recomputes every digest and the hash chain (as fast as the disk);
                ``"replay"`` also executes every update again and compares bit for bit (about the
                cost of training).
            progress: see ``culpa.progress``.

        Raises:
            IntegrityError: naming the file, update and field that is wrong.
        """
        from culpa.trajectory.verify import verify_run  # verify reads runs: avoid a cycle

        verify_run(self, problem, level, progress)

    def _read_state(self, path: Path) -> State:
        try:
            return State.decode(path.read_bytes())
        except FileNotFoundError as error:
            raise IntegrityError(f"{path} is missing, though the log names it.") from error

    def _step(self, k: int) -> StepRecord:
        query = (
            "SELECT optimizer, hypers, micro_batches, detail, digest, fingerprints FROM step WHERE"
            " k = ?"
        )
        found = log.rows(self.connection, query, (k,))
        if not found:
            raise StoreError(f"{self.path} has updates 0 to {self.num_steps - 1}; got {k}.")
        optimizer, hypers, micro, detail, digest, fingerprints = found[0]
        facts = msgspec.json.decode(detail, type=StepDetail)
        return StepRecord(
            index=k,
            optimizer=self._optimizers[optimizer],
            hypers=self._hypers[hypers],
            micro_batches=tuple(
                MicroBatch(layout, _ids(ids), random, placements)
                for layout, ids, random, placements in msgspec.msgpack.decode(
                    micro, type=list[StoredMicroBatch]
                )
            ),
            digest=digest,
            fingerprints=fingerprints,
            **msgspec.structs.asdict(facts),
        )

    def _batch(self, micro: MicroBatch) -> Any:
        layout = self._layouts[micro.layout]
        where = self._examples[list(micro.rows)]
        size = batches.row_bytes(layout.root)
        if (where[:, 0] != micro.layout).any() or (where[:, 2] != size).any():
            raise IntegrityError(f"a batch in {self.path} mixes rows of different layouts.")
        if len(where) and int(where[:, 1].max()) + size > len(self._pack):
            raise IntegrityError(f"{self.path / PACK} is shorter than the log says.")
        rows = np.empty((len(where), size), dtype=np.uint8)
        for at, offset in enumerate(where[:, 1].tolist()):
            rows[at] = np.frombuffer(self._pack, dtype=np.uint8, count=size, offset=offset)
        return batches.decode(layout, rows, micro.placements)

    def _random(self, number: int | None) -> RandomState | None:
        if number is None:
            return None
        found = log.rows(self.connection, "SELECT state FROM random WHERE id = ?", (number,))
        if not found:
            raise IntegrityError(f"{self.path / LOG} names random state {number}, which it lacks.")
        return RandomState.decode(found[0][0])


def _ids(packed: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(packed, dtype="<u4").tolist())


def _tuples(hyper: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; ``torch.optim`` expects betas as one."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in hyper.items()}


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading.

    Raises:
        StoreError: if ``path`` is no run folder, or one of another format version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        what = "an existing folder" if folder.is_dir() else "nothing that exists"
        raise StoreError(
            f"{folder} is no culpa run: it is {what} without a {MANIFEST}. Pass the path that was "
            "given to culpa.record."
        )
    try:
        version = msgspec.json.decode(file.read_bytes()).get("format")
        if version != FORMAT:
            raise StoreError(f"{file} has format {version!r}; this culpa reads format {FORMAT}.")
        manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
        return Run(folder, manifest, log.open_readonly(folder / LOG))
    except (msgspec.MsgspecError, AttributeError, sqlite3.Error, OSError) as error:
        raise StoreError(f"{folder} cannot be read as a culpa run: {error}.") from error


def same_model(run: Run, params: dict[str, Tensor]) -> list[str]:
    """What differs between a model's parameters and those recorded, one line each."""
    here = describe_tensors(params)
    recorded = run.manifest.parameters
    return [
        f"{name}: recorded {recorded.get(name, 'nothing')}, given {here.get(name, 'nothing')}"
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    ]


def describe_tensors(tensors: Tree) -> dict[str, str]:
    """Name -> dtype and shape, as manifests hold them."""
    described = tree.map_values(lambda v: v, tensors)
    return {
        n: f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for n, v in described.items()
    }
