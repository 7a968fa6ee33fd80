"""How a re-executed training compares with a checkpoint that the original one left."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor

from culpa.errors import StoreError
from culpa.integrations.trainer_folder import (
    OPTIMIZER,
    RANDOM,
    SCALER,
    SCHEDULER,
    Saved,
    Weights,
    tensors_of,
)
from culpa.trajectory import files
from culpa.trajectory.digest import raw_bytes
from culpa.trajectory.run import Run


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint against the re-executed training after as many updates.

    Attributes:
        start, step: the updates ``[start, step)`` lie between this checkpoint and the one before.
        compared: ``"model"`` or ``"adapters"``, and of ``"optimizer"``, ``"scheduler"`` and
            ``"scaler"`` those that the checkpoint holds.
        differing: those of them that are not the same bit for bit.
        drift: how far the re-executed weights lie from those of the checkpoint, as a fraction of
            how far training moved them since the checkpoint before; 0 if they are the same bits,
            1 if re-execution was no better than no training.
        worst_tensor: where weights differ most, relative to the largest of that tensor.
        worst_difference: by how much there.
        optimizer_difference: the same, over the tensors of the optimizer's state.
        generators: whether the generators stood as in the checkpoint; ``None`` if not compared.
            If they do not, later updates may drift; they need not.
    """

    start: int
    step: int
    compared: tuple[str, ...]
    differing: tuple[str, ...]
    drift: float
    worst_tensor: str
    worst_difference: float
    optimizer_difference: float
    generators: bool | None

    @property
    def bitwise(self) -> bool:
        """Whether everything compared is the same bit for bit."""
        return not self.differing

    def __str__(self) -> str:
        where = f"checkpoint-{self.step}: "
        if self.bitwise:
            return f"{where}{', '.join(self.compared)} the same bit for bit"
        if self.drift == 0:
            return f"{where}the weights the same bit for bit, not the {', '.join(self.differing)}"
        return (
            f"{where}weights off by {self.drift:.2g} of what updates {self.start} to"
            f" {self.step - 1} moved them, at most by {self.worst_difference:.2g} of the largest"
            f" value, in {self.worst_tensor}"
        )


class _Checks(msgspec.Struct, frozen=True):
    root_digest: str
    folder: str
    checks: tuple[Check, ...]


def file_of(path: Path) -> Path:
    """Where the checks of a run are kept: beside it, since nothing but a run belongs inside."""
    return path.with_name(f"{path.name}.checkpoints.json")


def write_checks(run: Run, folder: Path, checks: tuple[Check, ...]) -> None:
    """Keep them beside the run."""
    kept = _Checks(run.root_digest, str(folder), checks)
    encoded = msgspec.json.format(msgspec.json.encode(kept, order="sorted"), indent=2)
    files.write_durably(file_of(run.path), encoded + b"\n")


def checks_of(run: Run) -> tuple[Check, ...]:
    """The checks of a run that ``culpa.from_trainer_output`` made, checkpoint by checkpoint.

    Raises:
        StoreError: if there is no such file beside the run, or it is of another run.
    """
    file = file_of(run.path)
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_Checks)
    except (OSError, msgspec.MsgspecError) as error:
        raise StoreError(
            f"{file} cannot be read: {error}. culpa.from_trainer_output writes it beside its run."
        ) from error
    if found.root_digest != run.root_digest:
        raise StoreError(
            f"{file} is of the run {found.root_digest}, and {run.path} is {run.root_digest}."
        )
    return found.checks


def compare(
    saved: Saved, before: Weights, here: Path, live: Mapping[str, Any], start: int
) -> Check:
    """Compare a checkpoint with the training that is at the same update now.

    Args:
        saved: the checkpoint.
        before: the weights that the updates since ``start`` moved.
        here: a folder with the weights as they are now, as the trainer saves them.
        live: the state dicts of ``"optimizer"``, ``"scheduler"`` and ``"scaler"``, or ``None``;
            ``"generators"``: whether they are to be compared.
        start: the number of updates before this segment.

    Cost: reads the weights of three checkpoints once, a tensor at a time.
    """
    theirs, ours = Weights(saved.path), Weights(here)
    kind = "adapters" if theirs.adapters else "model"
    if theirs.names != ours.names:
        odd = sorted(set(theirs.names) ^ set(ours.names))
        raise StoreError(
            f"{saved.path} and the trainer's model do not hold the same tensors: {odd[0]!r} is only"
            f" in {'the checkpoint' if odd[0] in theirs.names else 'the model'} ({len(odd)} such)."
            " Build the trainer with the model that was trained."
        )
    off = moved = worst = 0.0
    worst_tensor = ""
    for name in theirs.names:
        there, now = theirs[name], ours[name]
        if there.shape != now.shape:
            raise StoreError(
                f"{name} has the shape {list(there.shape)} in {saved.path} and {list(now.shape)} in"
                " the trainer's model. Build the trainer with the model that was trained."
            )
        moved += _square(there, before[name]) if name in before.names else _square(there, 0 * there)
        if not _same(there, now):
            off += _square(there, now)
            difference = _relative(there, now)
            if difference >= worst:
                worst, worst_tensor = difference, name
    compared, differing = [kind], [kind] if worst_tensor else []
    optimizer_difference = 0.0
    for part, file in (("optimizer", OPTIMIZER), ("scheduler", SCHEDULER), ("scaler", SCALER)):
        state = saved.loaded(file)
        if state is None or live.get(part) is None:
            continue
        compared.append(part)
        difference = _states_differ(state, live[part])
        if difference is not None:
            differing.append(part)
            optimizer_difference = difference if part == "optimizer" else optimizer_difference
    return Check(
        start=start,
        step=saved.step,
        compared=tuple(compared),
        differing=tuple(differing),
        drift=0.0 if not worst_tensor else math.sqrt(off / moved) if moved > 0 else math.inf,
        worst_tensor=worst_tensor,
        worst_difference=worst,
        optimizer_difference=optimizer_difference,
        generators=_generators(saved) if live.get("generators") else None,
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and raw_bytes(one.cpu()) == raw_bytes(other.cpu())


def _square(one: Tensor, other: Tensor) -> float:
    """||one - other||^2 in float64; infinite where it is no number."""
    found = float((one.double() - other.double()).square().sum())
    return found if math.isfinite(found) else math.inf


def _relative(there: Tensor, now: Tensor) -> float:
    """max |there - now| / max |there|."""
    if not there.numel():
        return 0.0
    difference = float((there.double() - now.cpu().double()).abs().max())
    size = float(there.double().abs().max())
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def _states_differ(there: Any, now: Any) -> float | None:
    """``None`` if two state dicts are the same; else the largest relative difference of tensors."""
    tensors, plain = tensors_of(there)
    others, values = tensors_of(now)
    same = plain.keys() == values.keys() and tensors.keys() == others.keys()
    same = same and all(_equal(value, values[name]) for name, value in plain.items())
    shared = [
        name for name in tensors if name in others and tensors[name].shape == others[name].shape
    ]
    unlike = [name for name in shared if not _same(tensors[name], others[name])]
    if same and not unlike and len(shared) == len(tensors):
        return None
    return max((_relative(tensors[name].cpu(), others[name]) for name in unlike), default=0.0)


def _equal(one: Any, other: Any) -> bool:
    """Of plain values; tuples and lists were taken apart already."""
    return type(one) is type(other) and (one == other or (one != one and other != other))


def settings_of(optimizer_state: Any) -> list[dict[str, Any]]:
    """What the groups of an optimizer's state dict are set to, but for the current rates."""
    groups = cast("list[dict[str, Any]]", optimizer_state["param_groups"])
    return [
        {name: value for name, value in group.items() if name not in ("lr", "params")}
        | {"number of parameters": len(group["params"])}
        for group in groups
    ]


def _generators(saved: Saved) -> bool | None:
    """Whether the process's generators stand as when the checkpoint was made."""
    found = saved.loaded(RANDOM)
    if found is None:
        return None
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())  # noqa: NPY002 (the user's)
    same = found["python"] == random.getstate() and torch.equal(found["cpu"], torch.get_rng_state())
    return bool(
        same
        and found["numpy"][0] == kind
        and np.array_equal(found["numpy"][1], keys)
        and list(found["numpy"][2:]) == rest
    )
