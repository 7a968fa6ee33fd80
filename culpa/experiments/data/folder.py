"""Where data sets are looked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from culpa.errors import OptionError

VARIABLE = "CULPA_DATA"


@dataclass(frozen=True)
class DataFolder:
    """Folders that hold data sets in their public layouts, in the order they are looked at.

    Attributes:
        roots: each may hold ``MNIST/raw``, ``cifar-10-batches-bin`` and so on, as torchvision's
            ``root`` does, or packed files such as ``mnist.npz``.
        download: whether what is absent may be fetched into the first of them.
    """

    roots: tuple[Path, ...]
    download: bool = False

    @staticmethod
    def find(named: Path | None = None, *, download: bool = False) -> DataFolder:
        """The folder named, else that of the variable ``CULPA_DATA``, else usual places.

        Those are ``data`` in the current folder, and ``shared/data`` beside the checkout.

        Raises:
            OptionError: if the folder named, or the variable's, does not exist.
        """
        given = named or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
        if given is not None:
            if not given.is_dir() and not download:
                raise OptionError(
                    f"the data folder {given} does not exist. Name one that does (--data, or the"
                    f" variable {VARIABLE}), or add --download to make it."
                )
            return DataFolder((given,), download)
        beside = Path(__file__).resolve().parents[4] / "shared" / "data"
        return DataFolder((Path("data"), beside), download)

    def first(self, *names: str) -> Path | None:
        """The first that exists of these files or folders, by name, then by root."""
        for name in names:
            for root in self.roots:
                if (root / name).exists():
                    return root / name
        return None

    def absent(self, what: str, names: tuple[str, ...], how: str) -> OptionError:
        """The error that says what was looked for, where, and how to get it."""
        looked = ", ".join(str(root.absolute()) for root in self.roots)
        return OptionError(
            f"{what} is not in {looked}: none of {', '.join(names)} is there. {how} Name its folder"
            f" with --data or the variable {VARIABLE}."
        )
