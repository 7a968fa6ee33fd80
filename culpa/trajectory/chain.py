"""What the hash chain of a run covers, and the root digest that stands for all of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from blake3 import blake3

from culpa.trajectory import digest
from culpa.trajectory.batches import Placement
from culpa.trajectory.schema import Manifest, Stage

StoredMicroBatch = tuple[int, bytes, int | None, tuple[Placement, ...]]
"""A micro-batch in the log: layout, row ids as little-endian uint32, generators, placements."""
ChainedMicroBatch = tuple[bytes, list[bytes], bytes | None, tuple[Placement, ...]]
"""A micro-batch by content: the layout's JSON, digests of rows and generators, placements."""


class StepDetail(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The small facts of an update that are neither data nor hyperparameters."""

    weights: tuple[float, ...] | None
    clip_grad_norm: float | None
    reset: bool
    drew_randomness: bool
    evaluating: tuple[str, ...]
    without_gradient: tuple[str, ...]


def link_content(
    index: int,
    optimizer: bytes,
    hypers: bytes,
    batches: Sequence[ChainedMicroBatch],
    detail: bytes,
    step: bytes,
    fingerprints: bytes,
) -> bytes:
    """What a step's link of the hash chain covers: everything that its row says, by content."""
    return msgspec.msgpack.encode([index, optimizer, hypers, batches, detail, step, fingerprints])


FIELDS = (
    *("optimizer", "hypers", "layout", "rows", "random", "placements"),
    *("detail", "digest", "fingerprints"),
)
"""The parts of an update that a verification can tell apart."""


def field_fingerprints(content: bytes) -> bytes:
    """The first four bytes of each field's BLAKE3: they name the field that was changed.

    Args:
        content: what ``link_content`` gave. The link covers it; this only says where to look.
    """
    _, optimizer, hypers, batches, *rest = msgspec.msgpack.decode(content)
    fields = [optimizer, hypers, *([list(c) for c in zip(*batches, strict=True)] or [[]] * 4)]
    parts = [blake3(msgspec.msgpack.encode(f)).digest()[:4] for f in [*fields, *rest]]
    return b"".join(parts)


def row_digest(layout: bytes, row: memoryview | bytes) -> bytes:
    """The content address of one row: ``BLAKE3(BLAKE3(layout JSON) || row bytes)``."""
    return blake3(blake3(layout).digest()).update(row).digest()


def root_digest(
    manifest: Manifest,
    link: bytes,
    stages: Sequence[Stage],
    states: Sequence[tuple[int, bytes]],
    frozen: bytes,
) -> str:
    """The one number that stands for a complete run, in hexadecimal.

    It covers every field of the manifest as the folder will hold it, but this one.
    """
    facts = msgspec.structs.asdict(manifest)
    del facts["root_digest"]
    named = [[stage.name, stage.start, stage.stop] for stage in stages]
    content = [facts, named, [list(s) for s in states], frozen]
    return digest.chain(link, msgspec.msgpack.encode(content, order="sorted")).hex()
