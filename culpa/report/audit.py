"""``culpa.audit``: judge a run, and hold the findings together with their views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from culpa.auditing.judge import Options, judge
from culpa.auditing.record import AuditRecord, decode, encode
from culpa.auditing.tasks import Executor
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Propagator
from culpa.errors import StoreError
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.report import figures, frames, html, markdown, table, trackers
from culpa.report.conduct import conduct
from culpa.report.showing import Show
from culpa.trajectory.files import write_durably
from culpa.trajectory.run import Run


@dataclass(frozen=True)
class Audit:
    """What an audit found. ``record`` is plain data; the methods are views of it."""

    record: AuditRecord

    def table(self) -> str:
        """The verdicts, per behaviour one row a stage, and how it was done; at 80 columns."""
        lines = "".join(f"* {verdict}\n" for verdict in self.record.verdicts)
        done = "".join(f"\n{fill(line, 80)}" for line in conduct(self.record, ascii_only=True))
        return (
            f"{lines}\n{table.to_text(self.record)}{done}\n"
            if done
            else (f"{lines}\n{table.to_text(self.record)}")
        )

    def to_html(
        self, path: str | Path, *, run: Run | None = None, show: Show | None = None
    ) -> None:
        """Write one self-contained HTML page. Needs ``pip install 'culpa[report]'``.

        Args:
            path: of the page; an existing file is replaced.
            run: the audited run. With it the page shows the most helpful and most harmful training
                examples, four of each a behaviour, as they are: image-shaped tensors as pictures,
                others as numbers. Without it no training data enters the page.
            show: turns an example, nested as the batches are but without their first dimension,
                into what is shown: a text, a tensor, or a pair of both. Such as
                ``lambda e: tokenizer.decode(e["input_ids"])``.

        Raises:
            OptionError: if ``run`` is another run, or ``show`` came without one or returned
                something else.
            StoreError: if the page cannot be written.
        """
        html.write(self.record, path, run=run, show=show)

    def to_json(self, path: str | Path) -> None:
        """Write the record as JSON, which ``Audit.load`` and ``culpa report`` read."""
        try:
            write_durably(Path(path), encode(self.record))
        except OSError as error:
            raise StoreError(f"cannot write the audit to {path}: {error}.") from error

    def to_markdown(self) -> str:
        """A section "Training accountability" for a model card, in Hugging Face's Markdown."""
        return markdown.to_markdown(self.record)

    def to_figures(self, folder: str | Path, kind: str = "png") -> list[Path]:
        """Write every chart into ``folder`` as "png" or "svg". Needs ``culpa[report]``.

        Returns:
            The files: ``stages-0.png`` and ``updates-0.png`` for the first behaviour, and so on.
        """
        return figures.write(self.record, Path(folder), kind)

    def to_parquet(self, folder: str | Path) -> list[Path]:
        """Write stages, updates, layers and examples as Parquet. Needs ``culpa[tables]``.

        Returns:
            The files; a table without rows has none.
        """
        return frames.write(self.record, Path(folder))

    def log_to(self, tracker: Any) -> None:
        """Log table, figures and report to an experiment tracker, the root digest as a tag.

        Args:
            tracker: the run in progress: the module ``mlflow`` (its active run) or an
                ``mlflow.ActiveRun``, a Weights & Biases run (``wandb.init()``), or a TensorBoard
                ``SummaryWriter``.

        Raises:
            OptionError: if it is none of these.
            UnsupportedError: without ``pip install 'culpa[report]'``.
        """
        trackers.log(self.record, self.table(), tracker)

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
    work: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Find out which stages are to be credited or blamed, and prove the main ones by replay.

    Screens every update (``attribute``). Where the budget pays for replaying history without every
    stage, and that costs less than estimating them, it does so. Else it embeds every stage
    (``embed``) and replays those whose effects are large, doubtful or close to a tie, until the
    ranking is settled: the intervals of the estimates, calibrated on the replayed ones, no longer
    overlap with the most blamed and most credited stages'. A part of the budget goes into
    placebos: an effect inside of their spread is chaos, and not identified. Where no stages were
    named they are found in the scores; where the updates of the most blamed stage are not
    identified, single culprits are looked for with what is left.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        behaviours: what to explain; differentiable, with different names.
        budget: how much to spend on replays and placebos, in units of the run's own training cost.
            0: none.
        counterfactual: see ``culpa.replay``.
        propagator: see ``culpa.attribute``.
        allow_drift: see ``culpa.replay``; the largest drift stands in the options and cautions.
        work: a folder where every result is kept as it comes. An audit that was interrupted goes
            on from there when it is called again with the same folder.
        executor: runs the replays; default: here, one after the other.
        progress: see ``culpa.progress``.

    Returns:
        The audit. Cost: one replay of the run, per update about 1.5 gradients and one for every
        behaviour (half more where there are example losses), and the budget; where stages are
        embedded, ``embed``'s besides. A model that ``attribute`` refuses is judged by replays
        alone.

    Raises:
        StageError: if the run has no stages.
        OptionError: for a negative budget or two behaviours of one name.
        StoreError: if ``work`` cannot be written.
        CulpaError: what ``attribute``, ``embed`` and ``replay`` raise besides.
    """
    options = Options(budget, counterfactual, propagator, allow_drift)
    folder = None if work is None else Path(work)
    return Audit(
        judge(run, problem, behaviours, options, work=folder, executor=executor, progress=progress)
    )
