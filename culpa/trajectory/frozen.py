"""The parameters that no optimizer holds, such as the base model under adapters.

Their values lie in ``states/frozen.safetensors``, once. By reference only their digests do, 32
bytes each: the base of a large language model has a hundred gigabytes that its user has anyway.
Then whoever walks the run gives them again, in the model, and is refused if a bit of them differs.
The digest of all of them, and so the chain, is made the same way in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from culpa.errors import CulpaError, IntegrityError, ProblemError, StoreError
from culpa.trajectory import digest, tensors
from culpa.trajectory.fits import require_state
from culpa.trajectory.schema import FROZEN_NAME, Manifest
from culpa.trajectory.source import Source
from culpa.trajectory.state import State
from culpa.tree import Tree

_VALUES, _DIGESTS = "params/", "digests/"


def encode(params: Mapping[str, Tensor], *, by_reference: bool) -> bytes:
    """The content of the file; at most one parameter is copied from its device at a time."""
    if not by_reference:
        return State(dict(params)).encode()
    found = {name: digest.tensor_digest(_VALUES + name, value) for name, value in params.items()}
    return save_tensors(
        {
            _DIGESTS + name: torch.frombuffer(bytearray(value), dtype=torch.uint8)
            for name, value in found.items()
        }
    )


def digests(data: bytes | memoryview, manifest: Manifest) -> dict[str, bytes]:
    """By the names they have in a state, from the content of the file, of either kind.

    Raises:
        IntegrityError: if these are not the frozen parameters of the manifest.
    """
    entries = list(tensors.entries(memoryview(data)))
    described = {name: tensors.described(entry) for name, entry, _ in entries}
    if not manifest.frozen_by_reference:
        require_state(manifest, described, None)
        return {name: tensors.entry_digest(name, entry, raw) for name, entry, raw in entries}
    expected = {_DIGESTS + name: f"uint8 [{digest.DIGEST_BYTES}]" for name in manifest.frozen}
    wrong = min(
        (n for n in described.keys() | expected.keys() if described.get(n) != expected.get(n)),
        default=None,
    )
    if wrong is not None:
        raise IntegrityError(
            f"{wrong!r} is {described.get(wrong, 'missing')}; expected"
            f" {expected.get(wrong, 'nothing')}"
        )
    return {_VALUES + name.removeprefix(_DIGESTS): bytes(raw) for name, _, raw in entries}


def digest_of_all(data: bytes | memoryview, manifest: Manifest) -> bytes:
    """One digest of all of them, as the root digest has it."""
    found = digests(data, manifest)
    return digest.combine(found[name] for name in sorted(found))


class Frozen:
    """The frozen parameters of a run: read from it or, by reference, given and compared."""

    def __init__(self, source: Source, manifest: Manifest, read: Callable[[], Tree]) -> None:
        self._source = source
        self._read = read
        self._manifest = manifest
        self._given: Tree = {}
        self._seen: dict[str, tuple[int, int]] = {}

    @property
    def by_reference(self) -> tuple[str, ...]:
        """The names of those whose values are not in the run."""
        return self._manifest.frozen if self._manifest.frozen_by_reference else ()

    def values(self) -> Tree:
        """All of them by name; those by reference are the given tensors themselves, no copies.

        Raises:
            StoreError: if they are by reference and were not given.
            ProblemError: if they have changed since.
        """
        if not self.by_reference:
            return self._read()
        if not self._given:
            raise StoreError(
                f"{self._source.where} was recorded with frozen='reference': its"
                f" {len(self.by_reference)} frozen parameters are not in it. Pass them:"
                " culpa.open_run(path, frozen=dict(model.named_parameters()))."
            )
        self.give(self._given)
        return dict(self._given)

    def digest(self) -> bytes:
        """See ``digest_of_all``; raises ``IntegrityError`` naming the file if it is damaged."""
        try:
            return digest_of_all(self._source.read(FROZEN_NAME), self._manifest)
        except CulpaError as error:
            where = f"{self._source.where}/{FROZEN_NAME}"
            if where in str(error):
                raise
            raise IntegrityError(f"{where} is damaged: {error}.") from error

    def give(self, params: Mapping[str, Tensor]) -> None:
        """Take the values of those by reference from ``params``, which may have others too.

        Costs a digest of them all at first; later nothing, for tensors that nobody wrote to.

        Raises:
            ProblemError: if one is missing, or is not bit for bit what was recorded.
        """
        if not self.by_reference:
            return
        given = {name: params[name].detach() for name in self.by_reference if name in params}
        nowhere = [name for name, value in given.items() if value.is_meta]
        if nowhere:
            raise ProblemError(
                f"{self._source.where} was recorded with frozen='reference', so {nowhere[0]} must"
                " be in the model, and that is on the meta device. Load the frozen parameters."
            )
        seen = {name: (params[name]._version, params[name].data_ptr()) for name in given}
        if self._given and seen == self._seen:
            return
        recorded = digests(self._source.read(FROZEN_NAME), self._manifest)
        wrong = [
            name
            for name in self.by_reference
            if name not in given
            or digest.tensor_digest(_VALUES + name, given[name]) != recorded[_VALUES + name]
        ]
        if wrong:
            raise ProblemError(
                f"{len(wrong)} of the {len(self.by_reference)} frozen parameters of"
                f" {self._source.where} are not those that were recorded by reference:"
                f" {', '.join(wrong[:3])}. Load the weights that training began from."
            )
        self._given, self._seen = given, seen
