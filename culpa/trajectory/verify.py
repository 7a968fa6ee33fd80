"""Proving that a run folder holds what was recorded."""

from __future__ import annotations

from blake3 import blake3

from culpa.errors import IntegrityError, OptionError
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory import chain, digest, log, writer
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.walk import forward, session

LEVELS = ("digest", "replay")


def verify_run(run: Run, problem: Problem | None, level: str, progress: Progress | None) -> None:
    """See ``Run.verify``."""
    if level not in LEVELS:
        raise OptionError(f"level must be one of {', '.join(map(repr, LEVELS))}, got {level!r}.")
    if level == "replay" and problem is None:
        raise OptionError("verify(level='replay') executes the training again: pass the problem.")
    progress = progress or Silent()
    _digests(run)
    if problem is not None and level == "replay":
        progress.start("verify", run.num_steps)
        try:
            with session(run, problem) as engine:
                for _ in forward(run, engine, 0, run.num_steps):
                    progress.advance()
        finally:
            progress.finish()


def _digests(run: Run) -> None:
    """Recompute every digest, link and the root from the bytes on disk."""
    where = run.path / writer.LOG
    if run.manifest.status not in ("complete", "interrupted"):
        raise IntegrityError(
            f"{run.path} was not closed (status {run.manifest.status!r}): it has no root digest."
        )
    if run.num_steps != run.manifest.num_steps:
        raise IntegrityError(
            f"{where} holds {run.num_steps} updates; the manifest says {run.manifest.num_steps}."
        )
    layouts = dict(log.rows(run.connection, "SELECT id, json FROM layout"))
    optimizers = dict(log.rows(run.connection, "SELECT id, json FROM optimizer"))
    hypers = dict(log.rows(run.connection, "SELECT id, json FROM hypers"))
    randoms = {
        i: blake3(s).digest() for i, s in log.rows(run.connection, "SELECT id, state FROM random")
    }
    rows = _row_digests(run, layouts)
    link = bytes(digest.DIGEST_BYTES)
    found = run.connection.execute(
        "SELECT k, optimizer, hypers, micro_batches, detail, digest, fingerprints, chain FROM step"
        " ORDER BY k"
    )
    for expected, (k, optimizer, hyper, _, detail, step, prints, chained) in enumerate(found):
        if k != expected:
            raise IntegrityError(f"{where}: update {expected} is missing.")
        batches = [
            (
                layouts[m.layout],
                [rows[i] for i in m.rows],
                None if m.random is None else randoms[m.random],
                m.placements,
            )
            for m in run.step(k).micro_batches
        ]
        content = chain.link_content(
            k, optimizers[optimizer], hypers[hyper], batches, detail, step, prints
        )
        link = digest.chain(link, content)
        if link != chained:
            raise IntegrityError(
                f"{where}: update {k} was changed, removed or reordered after recording."
            )
    states = [(k, _state_digest(run, k)) for k in run.kept_states]
    frozen = State(run.frozen_parameters()).digest()
    root = chain.root_digest(run.manifest, link, run.stages, states, frozen)
    if root != run.manifest.root_digest:
        raise IntegrityError(
            f"{run.path}: the root digest is {root}, the manifest says"
            f" {run.manifest.root_digest or 'nothing'}. Stages, environment, frozen parameters or"
            " the list of kept states were changed."
        )


def _row_digests(run: Run, layouts: dict[int, bytes]) -> dict[int, bytes]:
    pack = (run.path / writer.PACK).open("rb")
    found: dict[int, bytes] = {}
    with pack:
        for i, expected, layout, offset, size in log.rows(
            run.connection, "SELECT id, digest, layout, offset, size FROM example ORDER BY id"
        ):
            pack.seek(offset)
            found[i] = chain.row_digest(layouts[layout], pack.read(size))
            if found[i] != expected:
                raise IntegrityError(
                    f"{run.path / writer.PACK}: training example {i} was changed (byte {offset})."
                )
    return found


def _state_digest(run: Run, k: int) -> bytes:
    expected = log.rows(run.connection, "SELECT digest FROM state WHERE k = ?", (k,))[0][0]
    state = run.state(k)
    if state.digest() != expected:
        raise IntegrityError(
            f"{writer.state_file(run.path, k)} was changed: its tensors have another digest."
        )
    if k > 0 and digest.combine(state.step_digests()) != run.step(k - 1).digest:
        raise IntegrityError(
            f"{writer.state_file(run.path, k)} is not the state that update {k - 1} led to."
        )
    return expected
