"""CivilComments as WILDS lays it out, or the Wikipedia comments that stand in for it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from culpa.errors import IntegrityError, OptionError
from culpa.experiments.data.folder import DataFolder

CSV = "civilcomments_v1.0/all_data_with_identities.csv"
PACKED = "toxicity.parquet"
THRESHOLD = 0.5
"""From this share of annotators on a comment is toxic, or mentions an identity (WILDS)."""
IDENTITIES = ("male", "female", "christian", "muslim", "other_religions", "black", "white")
RENAMED = {"id_other_religion": "other_religions"}
"""The stand-in's columns that are not called as WILDS calls them."""
HOW = (
    "WILDS has it: wilds.stanford.edu/datasets, CivilComments, version 1.0 (Borkan et al., CC0);"
    " unpack it so that the folder civilcomments_v1.0 is there."
)
STAND_IN = (
    "11,401 Wikipedia talk comments (Jigsaw 2018) for CivilComments; identities are found by their"
    " words, not by annotators."
)


@dataclass(frozen=True)
class Comments:
    """Texts in the file's order, with flags bool ``[n]``."""

    texts: tuple[str, ...]
    toxic: Bool[Tensor, " comments"]
    identities: Mapping[str, Bool[Tensor, " comments"]]
    train: Bool[Tensor, " comments"]
    name: str
    stand_in: str = ""

    def mentions(self, identity: str) -> Bool[Tensor, " comments"]:
        """Which comments mention it."""
        if identity not in self.identities:
            known = ", ".join(self.identities)
            raise OptionError(f"{self.name} has no identity {identity!r}; it has {known}.")
        return self.identities[identity]


def civilcomments(data: DataFolder, *, required: bool = False) -> Comments:
    """CivilComments, or, unless it is ``required``, ``toxicity.parquet``.

    Raises:
        OptionError: neither is in the folders, or polars is not installed.
        IntegrityError: a table has not the columns it should have.
    """
    table = data.first(CSV)
    if table is not None:
        return _wilds(table)
    packed = None if required else data.first(PACKED)
    if packed is None:
        raise data.absent("CivilComments", (CSV,) if required else (CSV, PACKED), HOW)
    return _parquet(packed)


def _wilds(file: Path) -> Comments:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        _require(file, reader.fieldnames or (), ("comment_text", "toxicity", "split"))
        present = [i for i in IDENTITIES if i in (reader.fieldnames or ())]
        rows = list(reader)
    try:
        toxic = [float(row["toxicity"]) >= THRESHOLD for row in rows]
        flags = {i: [float(row[i] or 0) >= THRESHOLD for row in rows] for i in present}
    except (TypeError, ValueError) as error:
        raise IntegrityError(f"{file} has a share that is no number: {error}.") from error
    return Comments(
        tuple(row["comment_text"] for row in rows),
        torch.tensor(toxic, dtype=torch.bool),
        {i: torch.tensor(values, dtype=torch.bool) for i, values in flags.items()},
        torch.tensor([row["split"] == "train" for row in rows], dtype=torch.bool),
        "CivilComments",
    )


def _parquet(file: Path) -> Comments:
    try:
        import polars
    except ImportError as error:
        raise OptionError(
            f"{file.name} is read by polars, which is not installed. Run: pip install"
            " 'culpa[experiments]'."
        ) from error
    columns: dict[str, list[Any]] = polars.read_parquet(file).to_dict(as_series=False)
    _require(file, list(columns), ("comment", "toxic"))
    toxic = torch.tensor(columns["toxic"], dtype=torch.bool)
    return Comments(
        tuple(columns["comment"]),
        toxic,
        {
            RENAMED.get(name, name.removeprefix("id_")): torch.tensor(values, dtype=torch.bool)
            for name, values in columns.items()
            if name.startswith("id_")
        },
        torch.ones(len(toxic), dtype=torch.bool),
        "Jigsaw 2018",
        STAND_IN,
    )


def _require(file: Path, given: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in given]
    if missing:
        raise IntegrityError(f"{file} has no column {missing[0]!r}; it has {', '.join(given)}.")
