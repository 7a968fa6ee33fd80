"""Recomputing every digest of a run from its bytes: files, rows, updates, states, root."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blake3 import blake3

from culpa.errors import CulpaError, IntegrityError
from culpa.trajectory import chain, digest, lineage, log, tensors
from culpa.trajectory.batches import row_bytes
from culpa.trajectory.examples import Missing, Pack
from culpa.trajectory.fits import require_state
from culpa.trajectory.reader import JOURNALS
from culpa.trajectory.run import Run, read_manifest
from culpa.trajectory.schema import FROZEN_NAME, LOG, MANIFEST, PACK, StepRecord, state_name
from culpa.trajectory.seal import in_order

AT_ONCE = 2**24
"""Bytes of rows read at a time."""
_UNNAMED = "the list of kept states, or what to go on from, were changed, or updates cut off."


def check_digests(run: Run) -> tuple[int, int]:
    """Bytes and examples hashed; raises ``IntegrityError`` naming file, update and field."""
    check_files(run)
    check_manifest(run)
    run.tables.log.check_pages()
    seal, resuming = check_resuming(run)
    rows = run.tables.digests()
    if len(set(rows)) != len(rows):
        raise IntegrityError(f"{run.tables.where}: two training examples are the same.")
    hashed = check_rows(run, rows)
    link = check_chain(run, rows)
    states: list[tuple[int, bytes]] = []
    for k in run.kept_states:
        found, size = check_state(run, k)
        states.append((k, found))
        hashed += size
    frozen = run.frozen.digest()
    rest = (link, run.stages, states, frozen, resuming)
    root = chain.root_digest(run.manifest, *rest)
    if run.manifest.finished and root != run.root_digest:
        raise IntegrityError(
            f"{run.source.where}: the root digest is {root}, the manifest says"
            f" {run.root_digest or 'nothing'}. The stages, a field of {MANIFEST}, the frozen"
            f" parameters, or {_UNNAMED}"
        )
    lineage.check(run, states, frozen)
    if seal not in lineage.seals(run.manifest, *rest):
        raise IntegrityError(
            f"{run.tables.where}: table resume: its seal is not that of the last update. The seal"
            f" itself, the stages, a field of {MANIFEST}, the frozen parameters, or {_UNNAMED}"
        )
    return hashed, 0 if isinstance(run.rows, Missing) else len(rows)


def check_resuming(run: Run) -> tuple[bytes, bytes]:
    """The seal, and the digest of what there is to go on from: nothing, in a complete run."""
    rows: dict[int, bytes] = {}
    seal = b""
    for key, content in run.tables.log.rows("resume"):
        if key == log.SEAL:
            seal = content
        elif run.manifest.status == "complete":
            raise IntegrityError(
                f"{run.tables.where}: table resume has the row {key}, added after the run was"
                " complete."
            )
        else:
            rows[key] = chain.resuming_row(key, content)
    return seal, in_order(rows)


def check_files(run: Run) -> None:
    """Nothing missing and, of a finished run, nothing besides."""
    present = run.source.files()
    states = {state_name(k): size for k, (_, size) in run.tables.states.items()}
    stored = run.manifest.examples == "stored"
    required = {MANIFEST, LOG, FROZEN_NAME, *states} | ({PACK} if stored else set[str]())
    missing = sorted(required - present.keys())
    if missing:
        raise IntegrityError(f"{run.source.where}/{missing[0]} is missing.")
    for name, size in states.items():
        if present[name] != size:
            raise IntegrityError(
                f"{run.source.where}/{name} has {present[name]} bytes; the log says {size}."
            )
    size, expected = present.get(PACK, 0), run.tables.pack_size
    if size < expected or (size > expected and run.manifest.finished):
        raise IntegrityError(
            f"{run.source.where}/{PACK} has {size} bytes; the log says {expected}."
        )
    extra = sorted(present.keys() - required - {PACK})
    if not run.manifest.finished:  # a crash leaves half a file, a state just replaced, journals
        extra = [name for name in extra if not _left_by_a_crash(name)]
    if extra:
        raise IntegrityError(
            f"{run.source.where}/{extra[0]} is not part of the run"
            f"{f', nor {len(extra) - 1} more' if len(extra) > 1 else ''}: it was added afterwards."
        )


def _left_by_a_crash(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    state = folder == "states" and file.removesuffix(".safetensors").isdigit()
    return name in JOURNALS or (folder in ("", "states") and name.endswith(".tmp")) or state


def check_manifest(run: Run) -> None:
    """The manifest's bytes are those that its fields have, so that each of them counts."""
    data = bytes(run.source.read(MANIFEST))
    if data != run.manifest.encode() or read_manifest(run.source) != run.manifest:
        raise IntegrityError(
            f"{run.source.where}/{MANIFEST} is not written as culpa writes it: it was edited."
        )
    said = run.manifest
    if not said.finished and (said.num_steps, said.plain_seconds) != (0, 0.0):
        raise IntegrityError(
            f"{run.source.where}/{MANIFEST} says {said.num_steps} updates and"
            f" {said.plain_seconds} seconds of a run that is not closed: it was edited."
        )
    if said.finished and said.num_steps != run.num_steps:
        raise IntegrityError(
            f"{run.tables.where} holds {run.num_steps} updates; the manifest says"
            f" {run.manifest.num_steps}."
        )


def check_rows(run: Run, expected: list[bytes]) -> int:
    """Every training example has its digest; how many bytes that were."""
    if isinstance(run.rows, Missing):
        return 0
    tables = run.tables
    encoded = [layout.encode() for layout in tables.layouts]
    seeds = [blake3(layout).digest() for layout in encoded]
    sizes = [row_bytes(layout.root) for layout in tables.layouts]
    numbers, hashed = tables.examples[:, 0].tolist(), 0
    for start, stop in _chunks(numbers, sizes):
        of, size = numbers[start], sizes[numbers[start]]
        if isinstance(run.rows, Pack):  # they lie end to end
            at = int(tables.examples[start, 1])
            whole = run.source.spans(PACK, [(at, at + size * (stop - start))])[0]
        else:
            whole = memoryview(run.rows.rows(range(start, stop), size).reshape(-1).data)
        if len(whole) != size * (stop - start):
            raise IntegrityError(f"{run.source.where}/{PACK} ends before example {stop - 1}.")
        for i in range(start, stop):
            row = whole[(i - start) * size : (i - start + 1) * size]
            if blake3(seeds[of]).update(row).digest() != expected[i]:
                raise IntegrityError(
                    f"{run.source.where}/{PACK}: training example {i} was changed (bytes"
                    f" {int(tables.examples[i, 1])} to {int(tables.examples[i, 1]) + size}), or its"
                    " digest or layout in the log."
                )
        hashed += len(whole)
    return hashed


def _chunks(numbers: list[int], sizes: list[int]) -> Iterable[tuple[int, int]]:
    """Ranges of examples of one layout, of about ``AT_ONCE`` bytes or one row."""
    start = 0
    while start < len(numbers):
        most = start + max(1, AT_ONCE // max(1, sizes[numbers[start]]))
        stop = start + 1
        while stop < min(most, len(numbers)) and numbers[stop] == numbers[start]:
            stop += 1
        yield start, stop
        start = stop


class _Used:
    """Numbers must be given in the order of first use, so that no row is there for nothing."""

    def __init__(self, run: Run, table: str, first: int = 0) -> None:
        self.run, self.table, self.next = run, table, first

    def see(self, k: int, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number > self.next:
                raise IntegrityError(
                    f"{self.run.tables.where}: update {k}: uses row {number} of table"
                    f" {self.table} before row {self.next}: rows were added or reordered."
                )
            self.next = max(self.next, number + 1)

    def finish(self, last: int | None) -> None:
        if self.run.manifest.finished and last is not None and last >= self.next:
            raise IntegrityError(
                f"{self.run.tables.where}: row {last} of table {self.table} belongs to no update."
            )


def check_chain(run: Run, rows: list[bytes]) -> bytes:
    """Every update is as recorded and in its place; the last link."""
    read = run.tables.log
    layouts, optimizers, hypers = (
        [content for _, content in read.numbered(table)]
        for table in ("layout", "optimizer", "hypers")
    )
    randoms = {i: blake3(state).digest() for i, state in read.rows("random")}
    used = {t: _Used(run, t) for t in ("layout", "optimizer", "hypers", "example")}
    used["random"] = _Used(run, "random", 1)
    link = bytes(digest.DIGEST_BYTES)
    for row in read.numbered("step"):
        record, (k, optimizer, hyper, *_) = run.tables.decode_step(row), row
        used["optimizer"].see(k, [optimizer])
        used["hypers"].see(k, [hyper])
        batches: list[chain.ChainedMicroBatch] = []
        for micro in record.micro_batches:
            used["layout"].see(k, [micro.layout])
            used["example"].see(k, micro.rows)
            drawn = None
            if micro.random is not None:
                used["random"].see(k, [micro.random])
                if micro.random not in randoms:
                    raise IntegrityError(f"{read.where}: update {k}: its random state is missing.")
                drawn = randoms[micro.random]
            chained = [rows[i] for i in micro.rows]
            batches.append((layouts[micro.layout], chained, drawn, micro.placements))
        link = _link(run, link, row, (optimizers[optimizer], hypers[hyper]), batches)
    for table, seen in used.items():
        seen.finish(read.last_key(table))
    return link


def _link(
    run: Run,
    before: bytes,
    row: Any,
    named: tuple[bytes, bytes],
    batches: list[chain.ChainedMicroBatch],
) -> bytes:
    k, _, _, _, detail, step, fingerprints, chained, fields = row
    content = chain.link_content(k, *named, batches, detail, step, fingerprints)
    link = digest.chain(before, content)
    here = chain.field_fingerprints(*named, batches, detail, step, fingerprints)
    size = digest.FINGERPRINT_BYTES
    if link != chained or here != fields:
        wrong = [
            name
            for at, name in enumerate(chain.FIELDS)
            if here[at * size : (at + 1) * size] != fields[at * size : (at + 1) * size]
        ]
        where = "its " + ", ".join(wrong) if wrong else "its link, or an update before it"
        raise IntegrityError(
            f"{run.tables.where}: update {k} was changed, removed or reordered after recording:"
            f" {where}."
        )
    return link


def check_state(run: Run, k: int) -> tuple[bytes, int]:
    """A kept state is the one its update led to; its digest, and how many bytes were hashed."""
    name = state_name(k)
    found = _digests(run, name, run.tables.frozen_before(k))
    whole = digest.combine(_in_order(found))
    moving = {n: d for n, d in found.items() if not n.startswith("slots/")}
    if k > 0:
        record = run.step(k - 1)
        if digest.combine(_in_order(moving)) != record.digest:
            raise IntegrityError(
                f"{run.source.where}/{name} is not the state that update {k - 1} led to: it"
                f" differs in {_culprits(moving, record)}."
            )
    if whole != run.tables.states[k][0]:
        where = "a slot of the optimizer" if k > 0 else "a tensor"
        raise IntegrityError(
            f"{run.source.where}/{name} was changed: {where}, or its digest in the log."
        )
    return whole, run.tables.states[k][1]


def _culprits(found: dict[str, bytes], record: StepRecord) -> str:
    size = digest.FINGERPRINT_BYTES
    prints = [record.fingerprints[i : i + size] for i in range(0, len(record.fingerprints), size)]
    names = sorted(found)
    if len(prints) != len(names):
        return "its set of tensors"
    wrong = [n for n, p in zip(names, prints, strict=True) if found[n][:size] != p]
    return ", ".join(wrong[:4]) or "a digest of the update"


def _digests(run: Run, name: str, frozen: frozenset[str]) -> dict[str, bytes]:
    """The digests of a state's file, once it holds the tensors of the manifest and slots."""
    where = f"{run.source.where}/{name}"
    try:
        entries = list(tensors.entries(run.source.read(name)))
        described = {tensor: tensors.described(entry) for tensor, entry, _ in entries}
        require_state(run.manifest, described, frozen)
        return {t: tensors.entry_digest(t, entry, raw) for t, entry, raw in entries}
    except CulpaError as error:
        if where in str(error):
            raise
        raise IntegrityError(f"{where} is damaged: {error}.") from error


def _in_order(found: dict[str, bytes]) -> list[bytes]:
    return [found[name] for name in sorted(found)]
