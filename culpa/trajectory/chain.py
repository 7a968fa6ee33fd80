"""What the hash chain of a run covers, and the root digest that stands for all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from blake3 import blake3

from culpa.trajectory import digest
from culpa.trajectory.schema import Count, Manifest, Placement, Stage

StoredMicroBatch = tuple[int, bytes, int | None, tuple[Placement, ...]]
"""A micro-batch in the log: layout, row ids as little-endian uint32, generators, placements."""
ChainedMicroBatch = tuple[bytes, list[bytes] | msgspec.Raw, bytes | None, tuple[Placement, ...]]
"""A micro-batch by content: the layout's JSON, digests of rows and generators, placements.

A ``Raw`` is the digests of the rows as msgpack has them already.
"""


class StepDetail(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The small facts of an update that are neither data nor hyperparameters."""

    weights: tuple[float, ...] | None
    clip_grad_norm: float | None
    reset: bool
    drew_randomness: bool
    evaluating: tuple[str, ...]
    without_gradient: tuple[str, ...]
    loss: Count = 0
    clip_grad_value: float | None = None
    loss_scale: float | None = None
    discarded: Count = 0


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


def field_fingerprints(
    optimizer: bytes,
    hypers: bytes,
    batches: Sequence[ChainedMicroBatch],
    detail: bytes,
    step: bytes,
    fingerprints: bytes,
) -> bytes:
    """The first four bytes of each field's BLAKE3: they name the field that was changed.

    The link covers the same contents; these only say where to look.
    """
    layouts, rows, randoms, placements = map(list, zip(*batches, strict=True)) if batches else EMPTY
    seldom = (optimizer, hypers, layouts), (randoms, placements, detail)
    before, behind = (b"".join(map(_known_fingerprint, map(_encoded, part))) for part in seldom)
    often = b"".join(_fingerprint(_encoded(field)) for field in (step, fingerprints))
    return before + _fingerprint(_encoded(rows)) + behind + often


EMPTY: tuple[list[Any], ...] = ([], [], [], [])
_encoded = msgspec.msgpack.encode


def _fingerprint(encoded: bytes) -> bytes:
    return blake3(encoded).digest()[: digest.FINGERPRINT_BYTES]


_known_fingerprint = lru_cache(maxsize=256)(_fingerprint)
"""Of what seldom changes."""


def row_digest(layout: bytes, row: memoryview | bytes) -> bytes:
    """The content address of one row: ``BLAKE3(BLAKE3(layout JSON) || row bytes)``."""
    return blake3(blake3(layout).digest()).update(row).digest()


def resuming_row(key: int, content: bytes) -> bytes:
    """The digest of one row of the table ``resume``."""
    return blake3(msgspec.msgpack.encode([key, content])).digest()


def resuming_digest(rows: Iterable[bytes]) -> bytes:
    """Of all of its rows but the seal (seal.py), in the order of their keys."""
    return digest.combine(rows)


def root_digest(
    manifest: Manifest,
    link: bytes,
    stages: Sequence[Stage],
    states: Sequence[tuple[int, bytes]],
    frozen: bytes,
    resuming: bytes,
) -> str:
    """The one number that stands for a complete run, in hexadecimal.

    It covers every field of the manifest as the folder will hold it, but this one. ``resuming``
    is ``resuming_digest`` of what there is to go on from: of nothing, in a complete run.
    """
    facts = {n: v for n, v in msgspec.structs.asdict(manifest).items() if v is not msgspec.UNSET}
    del facts["root_digest"]
    named = [[stage.name, stage.start, stage.stop] for stage in stages]
    content = [facts, named, [list(s) for s in states], frozen, resuming]
    return digest.chain(link, msgspec.msgpack.encode(content, order="sorted")).hex()
