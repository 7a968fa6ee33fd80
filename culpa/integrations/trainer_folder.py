"""What ``transformers.Trainer`` leaves in its output folder, read without executing any of it.

Weights are safetensors. Optimizer, scheduler and generators are pickles: they are opened with
``torch.load(weights_only=True)``, which builds tensors and plain values and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from culpa.errors import StoreError, UnsupportedError
from culpa.tree import Tree

OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
RANDOM = "rng_state.pth"
FACTS, WEIGHTS = "trainer_state.json", "*.safetensors"
_NUMBER = re.compile(r"^checkpoint-(\d+)$")


class Facts(msgspec.Struct, frozen=True):
    """What ``trainer_state.json`` says, as far as it bears on the updates."""

    global_step: int
    max_steps: int
    num_train_epochs: float
    epoch: float | None = None
    train_batch_size: int | None = None
    log_history: list[dict[str, Any]] = []

    def logged(self, step: int) -> Mapping[str, Any]:
        """What was logged of the training loss after so many updates; empty if nothing was."""
        for entry in self.log_history:
            if entry.get("step") == step and "loss" in entry:
                return entry
        return {}


@dataclass(frozen=True)
class Saved:
    """One ``checkpoint-N``: what was known after N updates."""

    path: Path
    step: int
    facts: Facts

    @property
    def resumable(self) -> bool:
        """Whether training can go on from it as it went on then."""
        return all((self.path / name).is_file() for name in (OPTIMIZER, SCHEDULER, RANDOM))

    def loaded(self, name: str) -> Any:
        """``optimizer.pt``, ``rng_state.pth`` and their like; ``None`` if it is not there.

        Raises:
            StoreError: if it is damaged, or holds more than tensors and plain values.
        """
        file = self.path / name
        if not file.is_file():
            return None
        # NumPy keeps its generator as an array: as transformers.trainer_pt_utils.safe_globals.
        core: Any = np.ndarray.__reduce__(np.zeros(0))[0]
        allowed: list[Any] = [core, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise StoreError(
                f"{file} cannot be opened as tensors and plain values ({first}). It is damaged, or"
                " holds objects that would have to be executed, which culpa does not do."
            ) from error

    def version(self) -> str:
        """Of transformers, that wrote it; empty if it does not say."""
        try:
            found: Any = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        said = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        return str(said.get("transformers_version") or "")


def checkpoints_of(folder: Path) -> tuple[Saved, ...]:
    """The checkpoints of a trainer's output folder, by number.

    Raises:
        StoreError: if there is none, or one whose ``trainer_state.json`` is missing or damaged.
        UnsupportedError: if several processes wrote them, or their weights are pickled.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder; give the output_dir of a transformers.Trainer.")
    numbered = sorted(
        (int(found[1]), path)
        for path in folder.iterdir()
        if path.is_dir() and (found := _NUMBER.match(path.name))
    )
    if not numbered:
        hint = " It is itself a checkpoint: give the folder above." if is_one(folder) else ""
        raise StoreError(
            f"{folder} holds no checkpoint-N folder, as transformers.Trainer writes them with"
            f" save_strategy='steps' or 'epoch'.{hint} Without any, record the training itself:"
            " culpa.integrations.transformers.record_trainer."
        )
    return tuple(_saved(path, step) for step, path in numbered)


def is_one(folder: Path) -> bool:
    """Whether the folder is one checkpoint."""
    return (folder / FACTS).is_file()


def _saved(path: Path, step: int) -> Saved:
    names = {entry.name for entry in path.iterdir()}
    spread = sorted(
        name
        for name in names
        if re.match(r"(rng_state_\d+\.pth|global_step\d+|pytorch_model_fsdp.*)$", name)
    )
    if spread:
        raise UnsupportedError(
            f"{path} was written by several processes, DeepSpeed or FSDP ({spread[0]});"
            " from_trainer_output re-executes training in one process on one device."
        )
    try:
        raw = json.loads((path / FACTS).read_text(encoding="utf-8"))
        facts = msgspec.convert(raw, Facts)
    except (OSError, ValueError, RecursionError, msgspec.ValidationError) as error:
        raise StoreError(
            f"{path / FACTS} cannot be read: {error}. Every checkpoint of transformers.Trainer has"
            " one; if this checkpoint was not written to its end, remove it."
        ) from error
    if facts.global_step != step:
        raise StoreError(
            f"{path} says of itself that it was made after {facts.global_step} updates, not {step};"
            " folders must have the names that the trainer gave them."
        )
    if not Weights(path).names:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        raise UnsupportedError(
            f"{path} holds no weights as safetensors (found: {', '.join(pickled) or 'none'})."
            " Pickled weights are not opened here: load them with torch.load(...,"
            " weights_only=True) and write them with safetensors.torch.save_file as"
            " model.safetensors into the same folder."
        )
    return Saved(path, step, facts)


class Weights:
    """The tensors of a checkpoint's model or adapters, each read when it is asked for.

    Attributes:
        names: of the tensors; those of an adapter in a folder of its own begin with its name.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, tuple[Path, str]] = {}
        for file in sorted([*folder.glob(WEIGHTS), *folder.glob(f"*/{WEIGHTS}")]):
            prefix = "" if file.parent == folder else f"{file.parent.name}/"
            try:
                with safe_open(file, "pt") as opened:
                    found = list(opened.keys())
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{file} cannot be read as safetensors: {error}.") from error
            for name in found:
                if prefix + name in self._files:
                    raise StoreError(f"{folder} holds the tensor {name!r} in two files.")
                self._files[prefix + name] = (file, name)
        self.names = tuple(sorted(self._files))
        self.adapters = any("adapter_model" in file.name for file, _ in self._files.values())

    def __getitem__(self, name: str) -> Tensor:
        file, inside = self._files[name]
        with safe_open(file, "pt") as opened:
            return cast("Tensor", opened.get_tensor(inside))


def tensors_of(state: Any) -> tuple[Tree, dict[str, Any]]:
    """The tensors and the plain values of a nested state, each by its path in it."""
    tensors: Tree = {}
    plain: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", state)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
        elif isinstance(value, Mapping):
            entries = cast("Mapping[Any, Any]", value).items()
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in entries]
        elif isinstance(value, (list, tuple)):
            items = cast("list[Any]", value)
            waiting += [(f"{path}[{at}]", item) for at, item in enumerate(items)]
        else:
            plain[path] = value
    return tensors, plain
