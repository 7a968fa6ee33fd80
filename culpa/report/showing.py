"""Training examples as what they are: a picture, a text or numbers. Only where a user asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from culpa.auditing.record import AuditRecord
from culpa.errors import OptionError, StageError
from culpa.report.numbers import magnitude, visible
from culpa.report.picture import data_address, image_shaped
from culpa.trajectory.batches import row_count, take_rows
from culpa.trajectory.run import Run

Show = Callable[[Any], Any]
"""From one example, nested as the loader's batches are but without their first dimension, to a
text, a tensor, or a pair of a tensor and a text."""

SHOWN: Final = 4
"""Examples at each end that the page shows."""
LETTERS: Final = 280
VALUES: Final = 6


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One example: ``picture`` is an address with the data in it, or empty; ``text`` any words."""

    picture: str = ""
    text: str = ""


def as_it_is(example: Any) -> Shown:
    """The first image-shaped tensor as a picture, what else there is as numbers."""
    leaves = list(_leaves(example, ""))
    picture = next((v for _, v in leaves if isinstance(v, Tensor) and image_shaped(v)), None)
    said = [f"{name}{_words(v)}" for name, v in leaves if v is not picture]
    return Shown(
        picture="" if picture is None else data_address(picture), text=_cut("; ".join(said))
    )


def shown_examples(record: AuditRecord, run: Run, show: Show | None) -> dict[int, Shown]:
    """Each example that the page names, by its number in the run.

    Raises:
        OptionError: the run is not the one that was audited, or ``show`` returned something else.
    """
    if run.root_digest != record.run.root_digest:
        raise OptionError(
            f"the audit is of the run with root digest {record.run.root_digest}, the run given has"
            f" {run.root_digest}: its examples have other numbers. Give the run that was audited."
        )
    found: dict[int, Shown] = {}
    for one in record.examples:
        for i in (*one.helpful[:SHOWN], *one.harmful[:SHOWN]):
            used = one.updates.get(str(i), [])
            if i not in found and used:
                found[i] = _shown(_example(run, used[0], i), show)
    return found


def _shown(example: Any, show: Show | None) -> Shown:
    if show is None:
        return as_it_is(example)
    made = show(example)
    if isinstance(made, str):
        return Shown(text=_cut(made))
    if isinstance(made, Tensor):
        return as_it_is(made)
    if isinstance(made, tuple):
        pair = cast("tuple[Any, ...]", made)
        if len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], str):
            picture = as_it_is(pair[0])
            return Shown(picture=picture.picture, text=_cut(pair[1]))
    raise OptionError(
        f"show returns a text, a tensor or a pair of a tensor and a text; it returned {made!r:.80}."
    )


def _example(run: Run, k: int, i: int) -> Any:
    """Training example ``i``, which update ``k`` used."""
    for micro, batch in zip(run.step(k).micro_batches, run.batches_of(k), strict=True):
        rows = list(micro.rows)
        if i in rows:
            if row_count(batch) != len(rows):
                return batch  # a batch without a common first dimension is one example
            return take_rows(batch, torch.tensor(rows.index(i)))
    raise StageError(f"update {k} of {run.path} does not use training example {i}.")


def _leaves(value: Any, name: str) -> Sequence[tuple[str, Any]]:
    """Name and value of every leaf; the names of dictionaries' keys only."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return [leaf for key, item in items for leaf in _leaves(item, f"{key}: ")]
    if isinstance(value, list | tuple):
        return [leaf for item in cast("Sequence[Any]", value) for leaf in _leaves(item, name)]
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(np.asarray(value))
    return [(name, value)]


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    flat = value.detach().flatten()
    numbers = [_number(x) for x in flat[:VALUES].tolist()]
    if not value.ndim:
        return numbers[0]
    more = f", … ({'×'.join(map(str, value.shape))})" if flat.numel() > VALUES else ""
    return f"{', '.join(numbers)}{more}"


def _number(value: bool | complex) -> str:
    return magnitude(value) if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    clean = visible(text)
    return clean if len(clean) <= LETTERS else f"{clean[: LETTERS - 1]}…"
