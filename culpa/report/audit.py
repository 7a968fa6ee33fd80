"""``culpa.audit``: judge a run, and hold the findings together with their views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from culpa.auditing.judge import judge
from culpa.auditing.record import AuditRecord, decode, encode
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Propagator
from culpa.errors import StoreError
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.report import html, table
from culpa.trajectory.files import write_durably
from culpa.trajectory.run import Run


@dataclass(frozen=True)
class Audit:
    """What an audit found. ``record`` is plain data; the methods are views of it."""

    record: AuditRecord

    def table(self) -> str:
        """The verdicts and, per behaviour, one row a stage, as plain text at 80 columns."""
        lines = "".join(f"* {verdict}\n" for verdict in self.record.verdicts)
        return f"{lines}\n{table.to_text(self.record)}"

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained HTML page. Needs ``pip install 'culpa[report]'``."""
        html.write(self.record, path)

    def to_json(self, path: str | Path) -> None:
        """Write the record as JSON, which ``Audit.load`` and ``culpa report`` read."""
        try:
            write_durably(Path(path), encode(self.record))
        except OSError as error:
            raise StoreError(f"cannot write the audit to {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read what ``to_json`` wrote.

        Raises:
            StoreError: if the file cannot be read or holds no audit.
        """
        try:
            return cls(decode(Path(path).read_bytes()))
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error}.") from error


def audit(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    budget: float = 1.0,
    counterfactual: str = "skip",
    propagator: Propagator | None = None,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> Audit:
    """Find out which stages are to be credited or blamed, and prove the main ones by replay.

    Screens every update (``attribute``) and every stage (``embed``), then replays history without
    the most blamed and the most credited stage of each behaviour, largest part first, while the
    budget lasts.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        behaviours: what to explain; differentiable, with different names.
        budget: how much to spend on replays, in units of the run's own training cost. 0: none.
        counterfactual: see ``culpa.replay``.
        propagator: see ``culpa.attribute``.
        allow_drift: see ``culpa.replay``; the largest drift stands in the options and cautions.
        progress: see ``culpa.progress``.

    Returns:
        The audit. Cost: two replays of the run, per update about 1.5 gradients and one for every
        behaviour and every earlier stage, and the budget.

    Raises:
        StageError: if the run has no stages.
        OptionError: for a negative budget or two behaviours of one name.
        and whatever ``attribute`` and ``embed`` raise.
    """
    return Audit(
        judge(
            run,
            problem,
            behaviours,
            budget=budget,
            counterfactual=counterfactual,
            propagator=propagator,
            allow_drift=allow_drift,
            progress=progress,
        )
    )
