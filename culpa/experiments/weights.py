"""Where pretrained weights are looked for: ``models`` in a data folder, or beside it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from culpa.errors import OptionError
from culpa.experiments.data.folder import DataFolder

FOLDERS = ("models", "../models")


def find(data: DataFolder, name: str, how: str) -> Path:
    """The file or folder ``models/<name>``; ``how`` tells a user without it how to get it.

    Raises:
        OptionError: if it is in none of the data folders, nor beside one.
    """
    names = tuple(f"{folder}/{name}" for folder in FOLDERS)
    found = data.first(*names)
    if found is None:
        raise data.absent(f"the pretrained model {name}", names, how)
    return found


def load(model: nn.Module, file: Path, *, new: tuple[str, ...] = ()) -> None:
    """Copy the file's tensors into ``model``; those of layers in ``new`` stay as they are.

    Batch counts of normalisation layers may be absent from the file, and nothing else; nor may it
    hold more.

    Raises:
        OptionError: naming tensors that are missing, unknown, or of another shape.
    """
    given, wanted = load_file(file), model.state_dict()
    for layer in new:
        given = {n: t for n, t in given.items() if not n.startswith(f"{layer}.")}
        wanted = {n: t for n, t in wanted.items() if not n.startswith(f"{layer}.")}
    wanted = {n: t for n, t in wanted.items() if not n.endswith("num_batches_tracked")}
    given = {n: t for n, t in given.items() if not n.endswith("num_batches_tracked")}
    wrong = _differences(given, wanted)
    if wrong:
        raise OptionError(
            f"{file} has not the weights of a {type(model).__name__} of this size:"
            f" {'; '.join(wrong[:3])}."
        )
    model.load_state_dict(given, strict=False)


def _differences(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [
        *(f"{n} is missing" for n in wanted if n not in given),
        *(f"{n} is unknown" for n in given if n not in wanted),
        *(
            f"{n} has shape {tuple(given[n].shape)}, expected {tuple(t.shape)}"
            for n, t in wanted.items()
            if n in given and given[n].shape != t.shape
        ),
    ]
