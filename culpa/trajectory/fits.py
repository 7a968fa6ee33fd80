"""Whether tensors are those that a manifest says: of a state's file, and of a model given later."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from culpa.errors import IntegrityError
from culpa.trajectory.digest import dtype_name
from culpa.trajectory.schema import MANIFEST, Manifest
from culpa.tree import Tree


def describe_tensors(tensors: Tree) -> dict[str, str]:
    """Name -> dtype and shape, as manifests hold them: ``"float32 [128, 64]"``."""
    return {n: f"{dtype_name(v.dtype)} {list(v.shape)}" for n, v in tensors.items()}


def different_model(manifest: Manifest, params: Tree, buffers: Tree) -> list[str]:
    """What differs between a model's tensors and those recorded, one line each."""
    recorded = _named(manifest.parameters, manifest.buffers)
    here = _named(describe_tensors(params), describe_tensors(buffers))
    return [
        f"{name.partition('/')[2]}: recorded {recorded.get(name, 'nothing')}, given"
        f" {here.get(name, 'nothing')}"
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    ]


def require_state(
    manifest: Manifest, described: Mapping[str, str], frozen: Collection[str] | None
) -> None:
    """Check the tensors of a state's file, by their names there.

    Args:
        manifest: of the run.
        described: dtype and shape of each.
        frozen: the parameters that had not trained yet, which are not in it; ``None``: it is the
            file of those that were frozen when recording began, and has no others.

    Raises:
        IntegrityError: unless exactly the parameters and buffers are there that belong there, and
            slots of trained parameters only.
    """
    trained = manifest.parameters.keys() - {*(frozen or ())}
    chosen = manifest.frozen if frozen is None else trained
    expected = _named(
        {name: manifest.parameters.get(name, "") for name in chosen},
        {} if frozen is None else manifest.buffers,
    )
    for name, found in described.items():
        kind, _, rest = name.partition("/")
        held = rest.partition("/")[2]
        if kind == "slots" and frozen is not None and held not in trained:
            raise IntegrityError(f"{name!r} belongs to no trained parameter")
        if (kind != "slots" or frozen is None) and found != expected.get(name):
            raise IntegrityError(
                f"{name!r} is {found}; {MANIFEST} says {expected.get(name, 'nothing')}"
            )
    missing = expected.keys() - described.keys()
    if missing:
        raise IntegrityError(f"it lacks the tensor {min(missing)!r}")


def _named(params: Mapping[str, str], buffers: Mapping[str, str]) -> dict[str, str]:
    return {f"params/{n}": d for n, d in params.items()} | {
        f"buffers/{n}": d for n, d in buffers.items()
    }
