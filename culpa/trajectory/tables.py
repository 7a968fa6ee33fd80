"""What the log of a run says, decoded and checked: every name and number refers to something."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import msgspec
import numpy as np

from culpa.errors import IntegrityError, StoreError
from culpa.trajectory import batches, rng
from culpa.trajectory.chain import StepDetail, StoredMicroBatch
from culpa.trajectory.digest import DIGEST_BYTES, FINGERPRINT_BYTES
from culpa.trajectory.layout import DAMAGED, Layout, row_bytes
from culpa.trajectory.reader import LogReader
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Hyper, Manifest, MicroBatch, OptimizerSpec, Stage, StepRecord

T = TypeVar("T")
Hypers = tuple[dict[str, Hyper], ...]


class Tables:
    """The log's small tables in memory, and its updates one at a time.

    ``examples`` has a row ``(layout, offset, size)`` for each training example, int64.
    """

    def __init__(self, log: LogReader, manifest: Manifest) -> None:
        self.log = log
        self.where = log.where
        self.manifest = manifest
        last = log.last_key("step")
        self.num_steps = 0 if last is None else last + 1
        self.layouts = [
            self._read("layout", i, b, Layout.decode) for i, b in log.numbered("layout")
        ]
        self._sizes = [row_bytes(layout.root) for layout in self.layouts]
        self.optimizers = [
            self._read("optimizer", i, b, _optimizer) for i, b in log.numbered("optimizer")
        ]
        self.hypers = [self._read("hypers", i, b, _hypers) for i, b in log.numbered("hypers")]
        self.examples = self._examples()
        self.stages = self._stages()
        self.states = {k: (digest, size) for k, digest, size in log.rows("state")}
        """By index of each kept state its digest and the size of its file."""
        self._check_states()
        self._check_optimizers()

    @cached_property
    def joined(self) -> dict[str, int]:
        """Parameters that were frozen when recording began: the first update that held each."""
        groups = [{n for group in spec.groups for n in group} for spec in self.optimizers]
        later = [held & {*self.manifest.frozen} for held in groups]
        found: dict[str, int] = {}
        if any(later):
            for k, optimizer in self.log.rows("step", ("k", "optimizer")):
                for name in later[optimizer] if 0 <= optimizer < len(later) else ():
                    found.setdefault(name, k)
        return found

    def frozen_before(self, k: int) -> frozenset[str]:
        """The parameters that no optimizer held in the updates before k: s_k is without them."""
        joined = self.joined
        return frozenset(n for n in self.manifest.frozen if n not in joined or joined[n] >= k)

    def digests(self) -> list[bytes]:
        """Of every training example, by its number."""
        return [digest for _, digest in self.log.numbered("example", ("id", "digest"))]

    def step(self, k: int) -> StepRecord:
        """One update.

        Raises:
            StoreError: if there is no such update.
            IntegrityError: naming the update and the field that is damaged.
        """
        if not 0 <= k < self.num_steps:
            raise StoreError(f"{self.where} has updates 0 to {self.num_steps - 1}; got {k}.")
        found = self.log.row("step", k)
        if found is None:
            raise IntegrityError(f"{self.where}: update {k} is missing.")
        return self.decode_step(found)

    def steps(self, start: int) -> Iterator[StepRecord]:
        """The updates from ``start`` on, in turn; the errors are those of ``step``."""
        for expected, row in enumerate(self.log.rows("step", start=start), start):
            if row[0] != expected:
                raise IntegrityError(f"{self.where}: update {expected} is missing.")
            yield self.decode_step(row)

    def decode_step(self, row: Any) -> StepRecord:
        """An update from its row of the log."""
        k, optimizer, hypers, micro, detail, digest, fingerprints, *_ = row
        if not 0 <= optimizer < len(self.optimizers) or not 0 <= hypers < len(self.hypers):
            raise self._wrong(k, "optimizer or hypers", "names a row that is not there")
        spec, values = self.optimizers[optimizer], self.hypers[hypers]
        facts = self._field(k, "detail", detail, StepDetail, msgspec.json.decode)
        stored = self._field(
            k, "micro_batches", micro, list[StoredMicroBatch], msgspec.msgpack.decode
        )
        if len(spec.groups) != len(values):
            raise self._wrong(k, "hypers", "has not one entry for each parameter group")
        count = len(stored) - facts.discarded
        if count < 1 or (facts.weights is not None and len(facts.weights) != count):
            raise self._wrong(k, "micro_batches", f"has {count}, not one for each weight")
        if len(digest) != DIGEST_BYTES or len(fingerprints) % FINGERPRINT_BYTES:
            raise self._wrong(k, "digest or fingerprints", "has a wrong length")
        return StepRecord(
            index=k,
            optimizer=spec,
            hypers=values,
            micro_batches=tuple(self._micro_batch(k, *m) for m in stored),
            digest=digest,
            fingerprints=fingerprints,
            stage=self._stage_of(k),
            **msgspec.structs.asdict(facts),
        )

    def random(self, number: int) -> RandomState:
        """The generators that an update names."""
        found = self.log.row("random", number)
        if found is None:
            raise IntegrityError(f"{self.where} names random state {number}, which it lacks.")
        return self._read("random", number, found[1], _random)

    def _micro_batch(
        self, k: int, layout: int, ids: bytes, random: int | None, placements: Any
    ) -> MicroBatch:
        if not 0 <= layout < len(self.layouts):
            raise self._wrong(k, "micro_batches", f"names layout {layout}, which is not there")
        if len(ids) % 4:
            raise self._wrong(k, "micro_batches", "has row numbers of a broken length")
        rows = np.frombuffer(ids, dtype="<u4")
        if len(rows) and int(rows.max()) >= len(self.examples):
            raise self._wrong(k, "micro_batches", f"names example {rows.max()}, not there")
        if len(self.layouts) > 1 and (self.examples[rows, 0] != layout).any():
            raise self._wrong(k, "micro_batches", "mixes rows of different layouts")
        size = self._sizes[layout]
        if len(rows) * size > batches.most_spread(0):  # else there is nothing to count
            different = len(np.unique(rows))
            if len(rows) * size > batches.most_spread(different * size):
                raise self._wrong(
                    k,
                    "micro_batches",
                    f"repeats {different} rows {len(rows)} times, {len(rows) * size} bytes",
                )
        return MicroBatch(layout, tuple(rows.tolist()), random, placements)

    def _examples(self) -> Any:
        columns = ("id", "layout", "offset", "size")
        index = [row[1:] for row in self.log.numbered("example", columns)]
        try:
            found = np.array(index, dtype=np.int64).reshape(-1, 3)
        except OverflowError as error:
            raise IntegrityError(f"{self.where}: table example: {error}.") from error
        at = 0
        stored = self.manifest.examples == "stored"
        for number, (layout, offset, size) in enumerate(index):
            if not 0 <= layout < len(self.layouts) or size != self._sizes[layout]:
                raise IntegrityError(
                    f"{self.where}: example {number} of {size} bytes has not its layout's size."
                )
            if offset != (at if stored else -1):
                raise IntegrityError(
                    f"{self.where}: example {number} lies at {offset}, not where the one before"
                    f" it ends ({at if stored else -1})."
                )
            at += size
        self.pack_size = at if stored else 0
        """How long the pack is."""
        return found

    def _stage_of(self, k: int) -> str:
        at = bisect_right(self.stages, k, key=lambda stage: stage.start) - 1
        return self.stages[at].name if at >= 0 and k < self.stages[at].stop else ""

    def _stages(self) -> tuple[Stage, ...]:
        found: list[Stage] = []
        for row in self.log.rows("stage"):
            found.append(Stage(*row))
            if len(found) > self.num_steps + 1:
                raise IntegrityError(f"{self.where}: more stages than updates.")
        found.sort(key=lambda stage: stage.start)
        at = 0
        for stage in found:
            if not stage.name or not at <= stage.start < stage.stop <= self.num_steps:
                raise IntegrityError(
                    f"{self.where}: stage {stage.name!r} [{stage.start}, {stage.stop}) is empty,"
                    f" overlaps another, or is outside of the {self.num_steps} updates."
                )
            at = stage.stop
        if len({stage.name for stage in found}) != len(found):
            raise IntegrityError(f"{self.where}: two stages have one name.")
        return tuple(found)

    def _check_states(self) -> None:
        odd = [k for k in self.states if not 0 <= k <= self.num_steps]
        if odd:
            raise IntegrityError(
                f"{self.where}: state {odd[0]} is kept, of a run of {self.num_steps} updates."
            )
        if 0 not in self.states or (self.manifest.finished and self.num_steps not in self.states):
            raise IntegrityError(f"{self.where}: the first or the last state is not kept.")

    def _check_optimizers(self) -> None:
        known = self.manifest.parameters.keys()
        for spec in self.optimizers:
            names = [name for group in spec.groups for name in group]
            if sum(count for _, count in spec.members) not in (0, len(spec.groups)):
                raise IntegrityError(
                    f"{self.where}: table optimizer has {len(spec.groups)} groups, and other"
                    " numbers of them for its members."
                )
            if len(set(names)) != len(names) or not known >= {*names}:
                raise IntegrityError(
                    f"{self.where}: table optimizer names a parameter twice, or one that the"
                    " manifest does not have."
                )
            buckets = () if spec.reduction is None else spec.reduction.buckets
            summed = [name for bucket in buckets for name in bucket]
            if buckets and not (
                all(buckets) and len({*summed}) == len(summed) and known >= {*summed} >= {*names}
            ):
                raise IntegrityError(
                    f"{self.where}: table optimizer has a reduction whose buckets are not every"
                    " parameter that the optimizer holds, once."
                )

    def _read(self, table: str, number: int, data: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(data)
        except (*DAMAGED, IntegrityError) as error:
            raise IntegrityError(f"{self.where}: table {table}, row {number}: {error}") from error

    def _field(self, k: int, name: str, data: bytes, kind: Any, decode: Any) -> Any:
        try:
            return decode(data, type=kind)
        except DAMAGED as error:
            raise self._wrong(k, name, f"is damaged: {error}") from error

    def _wrong(self, k: int, name: str, what: str) -> IntegrityError:
        return IntegrityError(f"{self.where}: update {k}: {name} {what}.")


def _optimizer(data: bytes) -> OptimizerSpec:
    return msgspec.json.decode(data, type=OptimizerSpec)


def _random(data: bytes) -> RandomState:
    state = RandomState.decode(data)
    try:
        rng.check(state)
    except ValueError as error:
        raise IntegrityError(str(error)) from error
    return state


def _hypers(data: bytes) -> Hypers:
    found = msgspec.json.decode(data, type=Hypers)
    if any("params" in group for group in found):
        raise IntegrityError("a hyperparameter is called params.")
    return found
