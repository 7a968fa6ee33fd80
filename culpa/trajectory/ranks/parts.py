"""What a rank says of its part of an update, as bytes, and the update that they are parts of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from culpa.errors import RecordError
from culpa.trajectory.batches import EncodedBatch
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.commits import Commit
from culpa.trajectory.digest import raw_bytes
from culpa.trajectory.forms import Form, Placement
from culpa.trajectory.items import Noted
from culpa.trajectory.layout import Layout, dtype_of, leaves_of
from culpa.trajectory.log import of_rank
from culpa.trajectory.rng import RandomState


class SentBatch(msgspec.Struct, frozen=True, array_like=True):
    """A micro-batch: its form, its rows, the bytes of its tensors, the generators before it."""

    layout: bytes
    placements: tuple[Placement, ...]
    rows: int
    leaves: list[bytes]
    random: RandomState | None


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One rank's part of one update."""

    index: int
    stage: str
    hypers: bytes
    detail: StepDetail
    batches: list[SentBatch]
    notes: list[Noted]
    """Where this rank is to go on after a crash, as its log would keep it."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """What a rank sends at an exchange."""

    parts: list[Part]
    state: bytes
    """The digest of the parameters after the last update, if the recording ends; else empty."""


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What the first rank answers.

    ``error`` is raised by all of them, ``alive``: whether the recording goes on, ``after``: the
    next exchange comes after so many updates.
    """

    error: str
    alive: bool
    after: int


def part_of(commit: Commit, ended: Sequence[Noted] = ()) -> Part:
    """What to send of a commit, and of the loops that ended before it."""
    sent = [_sent(batch, random) for batch, random in commit.batches]
    notes = [*ended, *commit.notes()]
    return Part(commit.index, commit.stage.name, commit.hypers, commit.detail, sent, notes)


def _sent(batch: EncodedBatch, random: RandomState | None) -> SentBatch:
    rows = batch.leaves[0].shape[0] if batch.layout.per_row else 0
    leaves = [bytes(raw_bytes(leaf)) for leaf in batch.leaves]
    return SentBatch(batch.form.json, batch.form.placements, rows, leaves, random)


def _received(sent: SentBatch) -> tuple[EncodedBatch, RandomState | None]:
    layout = Layout.decode(sent.layout)
    leaves: list[Tensor] = []
    for node, data in zip(leaves_of(layout.root), sent.leaves, strict=True):
        shape = (sent.rows, *node.shape) if layout.per_row else node.shape
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        leaves.append(flat.view(dtype_of(node)).reshape(shape) if data else flat.reshape(shape))
    return EncodedBatch(Form(layout, sent.layout, sent.placements), leaves), sent.random


def joined(commit: Commit, others: Sequence[Part]) -> Commit:
    """The update of which the first rank made ``commit``, and the other ranks the rest.

    Raises:
        RecordError: if they are parts of different updates.
    """
    own = part_of(replace(commit, batches=(), draws=(), point=None))
    for rank, part in enumerate(others, 1):
        for what, here, there in (
            ("update", own.index, part.index),
            ("stage", own.stage, part.stage),
            ("hyperparameters", own.hypers, part.hypers),
            ("micro-batches", len(commit.batches), len(part.batches)),
            ("modes or gradients", _common(own.detail), _common(part.detail)),
        ):
            if here != there:
                raise RecordError(
                    f"update {own.index}: rank 0 and rank {rank} differ in {what} ({_shown(here)}"
                    f" and {_shown(there)}). Every rank must run the same loop, with as many"
                    " batches, on data of its own."
                )
    details = [own.detail, *(part.detail for part in others)]
    detail = msgspec.structs.replace(
        own.detail,
        weights=_weights(own.index, details),
        drew_randomness=any(d.drew_randomness for d in details),
    )
    received = [_received(batch) for part in others for batch in part.batches]
    batches = [*commit.batches, *received]
    notes = [
        (of_rank(r, key), content) for r, p in enumerate(others, 1) for key, content in p.notes
    ]
    return replace(commit, batches=batches, detail=detail, others=notes)


def _common(detail: StepDetail) -> StepDetail:
    return msgspec.structs.replace(detail, weights=None, drew_randomness=False)


def _weights(index: int, details: Sequence[StepDetail]) -> tuple[float, ...] | None:
    """Of all micro-batches, in the mean over ranks; ``None``: 1/n each."""
    weights = [d.weights for d in details]
    if all(one is None for one in weights):
        return None
    shares = [w / len(details) for one in weights for w in one or ()]
    exact = [share * len(details) for share in shares] == [w for one in weights for w in one or ()]
    if None in weights or not exact:
        raise RecordError(
            f"update {index}: the weights {weights} of its micro-batches cannot be kept exactly as"
            f" shares of {len(details)} ranks. Give every rank weights, on 2, 4, 8, ... ranks."
        )
    return tuple(shares)


def _shown(value: object) -> str:
    return f"{value!r}"[:200]
