"""A small honest run, and ways to change it that a forger or a failing disk would find."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import culpa
from culpa.trajectory import chain, digest, tensors
from culpa.trajectory.log import SEAL
from culpa.trajectory.schema import FROZEN_NAME, LOG, MANIFEST, state_name
from culpa.trajectory.seal import as_recording

UPDATES = 6


class Net(nn.Module):
    """Trained, frozen, normalised and random parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(4, 2)
        self.embed.weight.requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.embed(batch["x"])))))


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(model(batch), batch["y"])


def rows(count: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"x": torch.randn(3, generator=generator), "y": torch.tensor(i % 2)} for i in range(count)
    ]


def problem() -> culpa.Problem:
    torch.manual_seed(3)
    return culpa.Problem(Net(), loss)


def record(path: Path, **options: Any) -> culpa.Run:
    """Two stages of three updates of three rows each; the second sees the same rows again."""
    task = problem()
    model = task.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with culpa.record(path, task, optimizer, checkpoints=culpa.Every(2), **options) as recorder:
        for name in ("first", "second"):
            loader = DataLoader(rows(), batch_size=3, shuffle=True)  # type: ignore[arg-type]
            with recorder.stage(name):
                for batch in recorder.batches(loader):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    return culpa.open_run(path)


def append(path: Path, name: str, updates: int = 3) -> culpa.Run:
    """A further job of one stage."""
    run, task = culpa.open_run(path), problem()
    task.model.load_state_dict(run.final_state() | run.final_buffers())
    optimizer = torch.optim.SGD(task.model.head.parameters(), lr=0.1)  # type: ignore[union-attr]
    loader = DataLoader(rows(3 * updates), batch_size=3)  # type: ignore[arg-type]
    with culpa.record(path, task, optimizer, append=True) as recorder, recorder.stage(name):
        for batch in recorder.batches(loader):
            optimizer.zero_grad()
            loss(task.model, batch).backward()
            optimizer.step()
    return culpa.open_run(path)


def record_in_part(path: Path, updates: int = 4) -> Path:
    """What is left when the process dies after some updates, all of them committed."""
    task = problem()
    optimizer = torch.optim.AdamW(task.model.head.parameters(), lr=0.05)  # type: ignore[union-attr]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    options: dict[str, Any] = {"checkpoints": culpa.Every(2), "scheduler": scheduler}
    with (
        suppress(KeyboardInterrupt),
        culpa.record(path, task, optimizer, **options) as recorder,
        recorder.stage("first"),
    ):
        for _ in range(2):
            loader = DataLoader(rows(), batch_size=3, shuffle=True)  # type: ignore[arg-type]
            for batch in recorder.batches(loader):
                if recorder.num_steps == updates:
                    raise KeyboardInterrupt
                optimizer.zero_grad()
                loss(task.model, batch).backward()
                optimizer.step()
                scheduler.step()
    edit_manifest(
        path,
        lambda m: m.update(
            status="recording", reason="", root_digest="", num_steps=0, plain_seconds=0.0
        ),
    )
    return path


def copy_of(run: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, symlinks=True)
    return to


def examine(path: Path) -> None:
    """Everything a reader can ask of a run; what a hostile one must not survive silently."""
    run = culpa.open_run(path)
    run.verify()


def walk(path: Path) -> None:
    """Everything that a replay would read, without verifying first."""
    run = culpa.open_run(path)
    run.final_state()
    run.final_buffers()
    run.frozen_parameters()
    for k in run.kept_states:
        run.state(k)
    for k in range(run.num_steps):
        run.step(k)
        run.batches_of(k)
        run.randoms_of(k)
        run.example_ids(k)


def sql(path: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    """Execute statements on the log of a run, whatever it declares."""
    connection = sqlite3.connect(path / LOG)
    with connection:
        connection.execute("PRAGMA writable_schema=ON")
        for statement in statements:
            connection.execute(statement, values if "?" in statement else ())
    connection.close()


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change fields of the manifest, in the form that culpa writes it in."""
    fields = msgspec.json.decode((path / MANIFEST).read_bytes())
    change(fields)
    (path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(fields)))


def flip(file: Path, at: int, mask: int = 0xFF) -> None:
    """Invert bits of one byte in place."""
    with file.open("r+b") as handle:
        handle.seek(at)
        old = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([old ^ mask]))


def contents(log: Path) -> list[Any]:
    """All that any query of a log can answer; ``[error]`` where it cannot."""
    connection = sqlite3.connect(f"{log.as_uri()}?mode=ro&immutable=1", uri=True)
    connection.text_factory = bytes
    try:
        found: list[Any] = connection.execute("SELECT * FROM sqlite_schema").fetchall()
        for (table,) in connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
        ).fetchall():
            found.append(connection.execute(f"SELECT * FROM {table.decode()}").fetchall())
            first = connection.execute(f"PRAGMA table_info({table.decode()})").fetchone()[1]
            for row in connection.execute(f"SELECT * FROM {table.decode()}").fetchall():
                query = f"SELECT * FROM {table.decode()} WHERE {first.decode()} = ?"
                key = row[0].decode() if isinstance(row[0], bytes) else row[0]
                found.append(connection.execute(query, (key,)).fetchall())
        found.append(connection.execute("PRAGMA integrity_check").fetchall())
    except sqlite3.Error as error:
        found = [str(error)]
    connection.close()
    return found


def everything(path: Path) -> dict[str, Any]:
    """Every file; of the log what it holds, since SQLite counts how often it was opened."""
    files = [f for f in path.rglob("*") if f.is_file() and f.name != LOG]
    found: dict[str, Any] = {f.name: f.read_bytes() for f in files}
    connection = sqlite3.connect(path / LOG)
    found[LOG] = list(connection.iterdump())
    connection.close()
    return found


def covered(path: Path, run: culpa.Run) -> tuple[Any, ...]:
    """What a root digest covers besides the manifest, links kept."""
    states = []
    for k in run.kept_states:
        data = memoryview((path / state_name(k)).read_bytes())
        found = {n: tensors.entry_digest(n, e, raw) for n, e, raw in tensors.entries(data)}
        states.append((k, digest.combine(found[n] for n in sorted(found))))
    frozen = memoryview((path / FROZEN_NAME).read_bytes())
    held = {n: tensors.entry_digest(n, e, raw) for n, e, raw in tensors.entries(frozen)}
    link = run.tables.log.row("step", run.num_steps - 1)[7]
    ours = [chain.resuming_row(k, c) for k, c in run.tables.log.rows("resume") if k != SEAL]
    frozen_digest = digest.combine(held[n] for n in sorted(held))
    return link, run.stages, states, frozen_digest, chain.resuming_digest(ours)


def seal(path: Path) -> None:
    """Compute the seal of the log again, as a commit does."""
    run = culpa.open_run(path)
    sealed = chain.root_digest(as_recording(run.manifest), *covered(path, run))
    value = (bytes.fromhex(sealed),)
    sql(path, f"INSERT OR REPLACE INTO resume VALUES ({SEAL}, ?)", values=value)


def reseal(path: Path) -> None:
    """Compute seal and root digest again: what a forger does who knows the format."""
    seal(path)
    run = culpa.open_run(path)
    root = chain.root_digest(run.manifest, *covered(path, run))
    edit_manifest(path, lambda fields: fields.update(root_digest=root))
