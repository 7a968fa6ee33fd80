"""The records a run folder is made of, as typed structures (the format is docs/format.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

FORMAT = 2
"""Version of the run folder; a reader refuses any other."""
MANIFEST, LOG, PACK, STATES, FROZEN = (
    "culpa.json",
    "log.sqlite",
    "examples.pack",
    "states",
    "frozen",
)
"""The files of a run folder."""
FINISHED = ("complete", "interrupted")
"""The status of runs that were closed; others have no root digest."""

Hyper = bool | int | float | str | tuple[bool | int | float | str | None, ...] | None
"""What a hyperparameter may be."""
Described = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]+ \[[0-9, ]*\]$")]
"""dtype and shape of a tensor, as ``"float32 [128, 64]"``."""
Count = Annotated[int, msgspec.Meta(ge=0)]
Placement = tuple[int, tuple[int, ...]]
"""Where a tensor of a batch lay: its address modulo 64 (forms.py), and its strides in elements."""


def state_name(index: int) -> str:
    """The file of s_index, relative to the folder."""
    return f"{STATES}/{index:09d}.safetensors"


FROZEN_NAME = f"{STATES}/{FROZEN}.safetensors"


class Stage(msgspec.Struct, frozen=True):
    """A named stage of training: the updates ``[start, stop)``."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        """The number of updates."""
        return self.stop - self.start

    @property
    def updates(self) -> range:
        """The indices of its updates."""
        return range(self.start, self.stop)


Dtype = Literal["", "bfloat16", "float16", "float32", "float64"]


class Group(msgspec.Struct, frozen=True):
    """One parameter group at one update: the names it holds, its hyperparameters, and the class.

    ``optimizer`` is the class's name as the record has it (trajectory/optimizers.py).
    """

    names: tuple[str, ...]
    hyper: dict[str, Any]
    optimizer: str


class Precision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """In which dtypes a module computes that ``fully_shard`` was applied to: its policy.

    Empty: as everything is.
    """

    module: str
    names: tuple[str, ...]
    """Its parameters, of those that no module inside of it shards."""
    params: Dtype = ""
    """That they are cast to."""
    reduce: Dtype = ""
    """That their gradients are summed in."""
    output: Dtype = ""
    """That floating-point outputs are cast to."""
    inputs: bool = True
    """Whether floating-point inputs are cast as parameters are."""


class Reduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the gradients of several processes became one: the mean over ranks, bucket by bucket.

    The micro-batches of an update are those of rank 0, then those of rank 1, and so on, as many of
    each. Buffers are those of rank 0.
    """

    ranks: Annotated[int, msgspec.Meta(ge=2)]
    backend: str
    """Of torch.distributed, which sums."""
    buckets: Annotated[tuple[tuple[str, ...], ...], msgspec.Meta(min_length=1)]
    """The parameters that were summed together, in the order in which they lay there."""
    sharded: bool = False
    """By ``fully_shard``: reduce-scattered, and the optimizer stepped on every rank's shards
    (ranks/shards.py); else all-reduced by ``DistributedDataParallel`` (ranks/reduce.py)."""
    each: bool = False
    """Whether every micro-batch was reduced by itself, and the means added up."""
    precision: tuple[Precision, ...] = ()
    """Of the modules that ``fully_shard`` lets compute in other dtypes (ranks/precision.py)."""


class OptimizerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which optimizer made an update, by torch class name, and which parameters it held."""

    name: str
    """Of the class; of several optimizers, what to call them together."""
    groups: tuple[tuple[str, ...], ...]
    members: tuple[tuple[str, Annotated[int, msgspec.Meta(ge=1)]], ...] = ()
    """Of several optimizers, in order: the class of each, and how many of the groups are its."""
    reduction: Reduction | None = None
    """Of an update that several processes made together."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class of every group's optimizer."""
        members = self.members or ((self.name, len(self.groups)),)
        return tuple(name for name, count in members for _ in range(count))


class MicroBatch(msgspec.Struct, frozen=True):
    """One micro-batch of an update: its layout, its rows, and the generators before its forward.

    ``random`` is ``None`` where the generators stood as the computation before had left them.
    """

    layout: int
    rows: tuple[int, ...]
    random: int | None
    placements: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of every tensor in memory (batches.py), unless all were contiguous and aligned."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One applied update: everything needed to execute it again, and what came out."""

    index: int
    optimizer: OptimizerSpec
    hypers: tuple[dict[str, Any], ...]
    """One dictionary per parameter group."""
    micro_batches: tuple[MicroBatch, ...]
    weights: tuple[float, ...] | None
    """``None``: each micro-batch's loss was divided by their number."""
    clip_grad_norm: float | None
    reset: bool
    """The optimizer started fresh at this update (a new one, or its state was cleared)."""
    drew_randomness: bool
    evaluating: tuple[str, ...]
    """Names of submodules that were in evaluation mode."""
    without_gradient: tuple[str, ...]
    """Held parameters whose ``.grad`` was ``None`` when the optimizer stepped."""
    digest: bytes
    """Of parameters and buffers after the update (trajectory/digest.py)."""
    fingerprints: bytes
    """The first four bytes of each tensor's digest, in the order of names: they name a culprit."""
    stage: str = ""
    """The stage it belongs to."""
    loss: int = 0
    """Which of the run's problems, in the order of their first use, its loss is of."""
    clip_grad_value: float | None = None
    loss_scale: float | None = None
    """What a ``GradScaler`` multiplied the loss by, and divided the gradients by."""
    discarded: int = 0
    """So many of the first micro-batches were only passed forward: the gradients of the update
    they were drawn for overflowed, and a ``GradScaler`` skipped it."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The parameter groups with their hyperparameters at this update."""
        return tuple(
            Group(names, hyper, name)
            for names, hyper, name in zip(
                self.optimizer.groups, self.hypers, self.optimizer.classes, strict=True
            )
        )

    @property
    def contributing(self) -> tuple[MicroBatch, ...]:
        """The micro-batches that its gradient is made of."""
        return self.micro_batches[self.discarded :]

    @property
    def held(self) -> tuple[str, ...]:
        """The names of all parameters the optimizer held."""
        return tuple(name for names in self.optimizer.groups for name in names)


class Job(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A complete run that a further job went on with, as its manifest had it."""

    stop: Annotated[int, msgspec.Meta(ge=1)]
    """Its number of updates: here the further job begins."""
    plain_seconds: Annotated[float, msgspec.Meta(ge=0)]
    root_digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """What is recomputed of it, from the longer run, by every verification (jobs.py)."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``culpa.json``: what the folder is, written last of all."""

    format: int = FORMAT
    culpa_version: str
    created: str
    status: Literal["recording", "interrupted", "truncated", "complete"]
    """"recording" also after a crash; "truncated": recording failed and training went on."""
    environment: dict[str, str]
    parameters: dict[str, Described]
    """Name -> dtype and shape, as ``"float32 [128, 64]"``, of every parameter of the model."""
    buffers: dict[str, Described]
    frozen: tuple[str, ...]
    """Parameters that no optimizer held: kept once."""
    examples: Literal["stored", "reference"] = "stored"
    """Whether the rows of batches are in the folder, or only their digests."""
    frozen_values: Literal["reference"] | msgspec.UnsetType = msgspec.UNSET
    """That only digests of the frozen parameters are in the folder. Not written if they are."""
    num_steps: Count = 0
    root_digest: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """Hexadecimal; of a finished run only."""
    reason: str = ""
    """Why a run is interrupted or truncated."""
    plain_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Wall time of the updates themselves, for forecasts."""
    jobs: tuple[Job, ...] | msgspec.UnsetType = msgspec.UNSET
    """The complete runs, shorter each, that were gone on with. Not written if there is none."""

    @property
    def earlier(self) -> tuple[Job, ...]:
        """The jobs that later ones went on with, in order; none, of most runs."""
        return () if isinstance(self.jobs, msgspec.UnsetType) else self.jobs

    @property
    def frozen_by_reference(self) -> bool:
        """Whether the values of frozen parameters must be given by whoever walks the run."""
        return self.frozen_values == "reference"

    @property
    def finished(self) -> bool:
        """Whether the run was closed and so has a root digest."""
        return self.status in FINISHED or self.root_digest != ""

    def encode(self) -> bytes:
        """The bytes of the file of a finished run."""
        return msgspec.json.format(msgspec.json.encode(self))
