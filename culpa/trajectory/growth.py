"""Models that grow between jobs: a new head, adapters around what was trained before.

A run has one set of parameters. What comes later must be in it from the beginning: a parameter that
is born at a stage boundary stood still until then, at the value that it was born with. That is also
what a counterfactual without an earlier stage has to mean: the same new head, on another trunk.

So a grown run is the old one with more frozen parameters: states, rows and chain are the very same
bytes, manifest and root digest are not. What trains later joins the state as any frozen parameter
that an optimizer takes over.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from culpa.errors import OptionError, ProblemError, StoreError, UnsupportedError
from culpa.trajectory import files
from culpa.trajectory.chain import root_digest
from culpa.trajectory.fits import describe_tensors
from culpa.trajectory.lineage import link_at
from culpa.trajectory.run import Run, open_run
from culpa.trajectory.schema import (
    FROZEN_NAME,
    LOG,
    PACK,
    STATES,
    Job,
    Manifest,
    state_name,
)
from culpa.trajectory.seal import after_job, as_recording, in_order
from culpa.trajectory.state import State
from culpa.trajectory.store import Store
from culpa.tree import Tree


class _Place(nn.Module):
    """Stands where a module stood: has its tensors under their names of then, and its mode."""

    def __init__(self, stood: nn.Module) -> None:
        mode = stood.training
        self.__dict__["_stood_here"] = stood  # no child: children have parameters of their own
        super().__init__()
        stood.training = mode
        _share(self, stood)

    @property
    def training(self) -> bool:
        """The mode of the module that stood here."""
        return self.__dict__["_stood_here"].training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["_stood_here"].training = mode


class Grown(nn.Module):
    """A module whose tensors keep their names, whatever is built around or beside it afterwards.

    Make it before the model is changed. Then assign what the model became::

        grown = culpa.Grown(model)
        grown.adapted = peft.get_peft_model(model, config)

    Parameters and buffers of ``model`` are called as ``model`` called them (so a run recorded with
    ``model`` is a run of ``grown`` too); others by where they are: ``adapted.`` or, if the model
    itself was changed in place, ``module.`` and so on. Give it to every ``Problem`` of the run; a
    loss takes the part it needs: ``lambda grown, batch: loss(grown.adapted, batch)``.

    A head that is replaced needs both models, since a replay evaluates both losses::

        tuned = Net(classes=5)
        tuned.trunk = net.trunk
        grown = culpa.Grown(net)
        grown.tuned = tuned

    Calling it calls what was assigned last. A loop that clips the norm of old and new parameters
    together takes ``grown.parameters()``, since the last bit of a norm depends on their order.

    Args:
        model: as it was recorded; it becomes ``grown.module``.

    Raises:
        OptionError: if the model has a part that is called ``module``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if hasattr(model, "module"):
            raise OptionError(
                "the model given to culpa.Grown has a part called 'module' (a wrapper?), and so"
                " has Grown. Give it the model inside of the wrapper."
            )
        known = dict(model.named_modules())
        self.__dict__["_stood"] = known
        _share(self, model)
        for name, stood in known.items():
            if name:
                parent, _, key = name.rpartition(".")
                super().get_submodule(parent).add_module(key, _Place(stood))
        self.module = model

    def get_submodule(self, target: str) -> nn.Module:
        """By the names of then the module itself, wherever it is now."""
        stood = self.__dict__["_stood"]
        return stood[target] if target in stood else super().get_submodule(target)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module assigned last says."""
        return list(self.children())[-1](*args, **kwargs)


def _share(into: nn.Module, stood: nn.Module) -> None:
    for key, parameter in stood.named_parameters(recurse=False):
        into.register_parameter(key, parameter)
    for key, buffer in stood.named_buffers(recurse=False):
        into.register_buffer(key, buffer)


def grow(run: Run, path: str | Path, model: nn.Module) -> Run:
    """Write the run once more, as one of a model that has further parameters.

    For stages that nobody thought of when recording began. Afterwards
    ``culpa.record(path, problem, optimizer, append=True)`` goes on with it; ``Problem`` is then of
    ``model``, whose recorded parameters must be as the run left them and whose new ones are kept
    as they are now. Without an earlier stage they begin with these values too.

    Args:
        run: a complete run in a folder; it stays as it is.
        path: a folder that does not exist yet.
        model: has every parameter of the run under its name there (see ``culpa.Grown``), and more.

    Returns:
        The grown run. Its updates, states and links of the chain are the run's; its root digest is
        another, and so are those it lists of its jobs. Cost: reads the run twice, writes it once.

    Raises:
        StoreError: if the run is not complete or no folder, or ``path`` exists.
        ProblemError: if the model lacks a parameter, has a new buffer, or has nothing new.
        IntegrityError: if the run is damaged.
    """
    into, manifest = Path(path), run.manifest
    if manifest.status != "complete" or not run.path.is_dir():
        raise StoreError(
            f"{run.source.where} is {manifest.status!r}; only a complete run in a folder can grow."
        )
    if manifest.frozen_by_reference:
        raise UnsupportedError(
            f"{run.source.where} was recorded with frozen='reference'; a run that is to grow keeps"
            " its frozen parameters: record it with frozen='stored'."
        )
    if into.exists():
        raise StoreError(f"{into} exists; choose a path that does not exist.")
    born = _born(manifest, model)
    run.verify(level="digest")
    frozen = State.decode(bytes(run.source.read(FROZEN_NAME))).params | born
    frozen = {name: frozen[name] for name in sorted(frozen)}
    grown = msgspec.structs.replace(
        manifest,
        parameters={**manifest.parameters, **describe_tensors(born)},
        frozen=tuple(frozen),
    )
    digest = State(frozen).digest()
    grown = _with_jobs(run, grown, digest)
    _write(run, into, grown, State(frozen))
    return open_run(into)


def _born(manifest: Manifest, model: nn.Module) -> Tree:
    """The parameters of the model that the run has not, on the CPU."""
    params: Mapping[str, Tensor] = dict(model.named_parameters())
    buffers: Mapping[str, Tensor] = dict(model.named_buffers())
    here, known = describe_tensors(dict(params)), manifest.parameters
    wrong = [
        f"{name}: recorded {described}, given {here.get(name, 'nothing')}"
        for name, described in known.items()
        if here.get(name) != described
    ]
    if wrong:
        raise ProblemError(
            f"the model given to culpa.grow is not a larger one of the run: {'; '.join(wrong[:5])}."
            " Names must be those of the record: culpa.Grown(model), made before the model is"
            " wrapped, keeps them."
        )
    if describe_tensors(dict(buffers)) != manifest.buffers:
        odd = min(buffers.keys() ^ manifest.buffers.keys(), default=min(buffers, default=""))
        raise ProblemError(
            f"the buffer {odd!r} is not as the run has it. Every state of a run has all its"
            " buffers, so none can come later: build the model with such layers (BatchNorm in a"
            " new head) before recording begins, or use layers without (LayerNorm)."
        )
    born = {name: value.detach().cpu() for name, value in params.items() if name not in known}
    if not born:
        raise ProblemError(
            "the model has no parameter that the run has not: nothing has to grow. Go on with"
            " culpa.record(path, problem, optimizer, append=True)."
        )
    return born


def _with_jobs(run: Run, grown: Manifest, frozen: bytes) -> Manifest:
    """The manifest with the root digests that its jobs have among more parameters."""
    jobs: list[Job] = []
    for number, job in enumerate(grown.earlier):
        grown = msgspec.structs.replace(grown, jobs=(*jobs, *grown.earlier[number:]))
        found = root_digest(
            after_job(grown, number),
            link_at(run, job.stop),
            [stage for stage in run.stages if stage.stop <= job.stop],
            [(k, digest) for k, (digest, _) in run.tables.states.items() if k <= job.stop],
            frozen,
            in_order({}),
        )
        jobs.append(msgspec.structs.replace(job, root_digest=found))
    return msgspec.structs.replace(grown, jobs=tuple(jobs)) if jobs else grown


def _write(run: Run, into: Path, grown: Manifest, frozen: State) -> None:
    """The folder, under another name until it is whole."""
    part = into.with_name(f"{into.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    files.make_folder(part / STATES)
    copied: Sequence[str] = (LOG, PACK, *map(state_name, run.kept_states))
    for name in copied:
        shutil.copyfile(run.path / name, part / name)
    files.write_durably(part / FROZEN_NAME, frozen.encode())
    before = grown.earlier[-1].plain_seconds if grown.earlier else 0.0
    store = Store.reopen(part, as_recording(grown))
    store.finish(None, "complete", "", grown.plain_seconds - before)
    files.flush_folder(part / STATES)
    files.rename(part, into)
    files.flush_folder(into.parent)
