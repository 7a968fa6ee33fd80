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


class StepDetail(msgspec.Struct, frozen=True, kw_only=True):
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
    """The one number that stands for a complete run, in hexadecimal."""
    facts = [manifest.format, manifest.environment, manifest.parameters, manifest.buffers]
    content = [facts, list(manifest.frozen), list(stages), [list(s) for s in states], frozen]
    return digest.chain(link, msgspec.msgpack.encode(content, order="sorted")).hex()
