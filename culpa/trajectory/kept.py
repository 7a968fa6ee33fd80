"""Reading the states that a run keeps, each a file."""

from __future__ import annotations

from culpa.errors import CulpaError, IntegrityError
from culpa.trajectory import tensors
from culpa.trajectory.fits import require_state
from culpa.trajectory.ranks.afterwards import cut_of
from culpa.trajectory.schema import Manifest
from culpa.trajectory.source import Source, physical_memory
from culpa.trajectory.state import State


def read_state(source: Source, manifest: Manifest, name: str, out: frozenset[str] | None) -> State:
    """The state in a file, or the parts of its tensors that this process holds.

    Args:
        source, manifest: of the run.
        name: of the file.
        out: the parameters that are not in it; ``None``: it is the file of frozen parameters.

    Raises:
        IntegrityError: naming the file, if it is not what the manifest says.
    """
    try:
        data = source.read(name)
        if len(data) > physical_memory():
            raise IntegrityError(f"it has {len(data)} bytes, more than this machine's memory")
        found = {path: entry for path, entry, _ in tensors.entries(data)}
        state = State.decode(data, cut_of({path: entry.shape for path, entry in found.items()}))
        described = {path: tensors.described(entry) for path, entry in found.items()}
        require_state(manifest, described, out)
        return state
    except CulpaError as error:
        raise _about(source, name, error) from error


def _about(source: Source, name: str, error: CulpaError) -> CulpaError:
    """The error with the file's name, unless it has it."""
    where = f"{source.where}/{name}"
    return error if where in str(error) else IntegrityError(f"{where} is damaged: {error}.")
