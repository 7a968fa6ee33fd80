"""An experiment as a record: what it is called, where it stands in the paper, how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from culpa.errors import OptionError
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.findings import Findings
from culpa.experiments.frame.work import Work


@dataclass(frozen=True)
class Setup:
    """What an experiment is run with.

    Attributes:
        scale: ``"paper"``, ``"small"`` or ``"smoke"``.
        options: the experiment's own options of that scale.
        seeds: of initial weights, shuffling and choices; one part each, usually.
        data: where data sets are looked for.
        work: keeps finished parts.
    """

    scale: str
    options: Any
    seeds: tuple[int, ...]
    data: DataFolder
    work: Work


@dataclass(frozen=True)
class Experiment:
    """One row of the paper's experiments; ``culpa.experiments`` says how to write one."""

    name: str
    title: str
    paper: str
    must_show: str
    scales: Mapping[str, Any]
    run: Callable[[Setup], Findings]

    def options(self, scale: str) -> Any:
        """The options of a scale; raises ``OptionError`` naming those that exist."""
        if scale not in self.scales:
            raise OptionError(
                f"{self.name} has no scale {scale!r}; it has {', '.join(self.scales)}."
            )
        return self.scales[scale]
