"""Rows are recognised by comparison: none is taken for another, whatever their sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import culpa
from culpa.trajectory import files, log
from culpa.trajectory.batches import encode
from culpa.trajectory.chain import row_digest
from culpa.trajectory.items import Batch
from culpa.trajectory.recognition import WIDEST, Mapped, Recognition
from culpa.trajectory.rows import RowIndex


class Index:
    """A row index with a pack and a log of its own."""

    def __init__(self, folder: Path) -> None:
        self.pack = folder / "pack"
        self.log = log.create(folder / "log.sqlite")
        self.index = RowIndex(self.log, files.open_new(self.pack), stored=True)

    def find(self, *batches: Tensor) -> list[list[int]]:
        """The numbers of the rows of batches that are looked up together, once they are checked."""
        encoded = [encode((batch,)) for batch in batches]
        found: list[list[int]] = []
        given = [Batch(one.form.json, (), one.columns, None) for one in encoded]
        for one, looked_up in zip(encoded, self.index.look_up(given), strict=True):
            ids, digests = self.index.find(one.form.json, 0, looked_up)
            expected = [row_digest(one.form.json, row.tobytes()) for row in one.rows]
            assert bytes(digests) == msgspec.msgpack.encode(expected)
            found.append(ids.tolist())
        return found

    def close(self) -> None:
        self.index.close()
        log.abandon(self.log)


@pytest.fixture
def index(tmp_path: Path) -> Any:
    made = Index(tmp_path)
    yield made
    made.close()


def test_rows_keep_their_numbers(index: Index) -> None:
    rows = torch.randn(20, 3)
    assert index.find(rows[:10]) == [[*range(10)]]
    assert index.find(rows[5:15], rows[10:]) == [[*range(5, 15)], [*range(10, 20)]]
    index.index.flush()
    order = torch.randperm(20)
    assert index.find(rows[order], rows) == [order.tolist(), [*range(20)]]
    assert index.pack.read_bytes() == rows.numpy().tobytes()


def test_known_rows_are_not_hashed(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(20, 3)
    index.find(rows)
    index.index.flush()

    def refuse(*args: Any) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr(index.index, "_hash", refuse)
    assert index.find(rows.flip(0)) == [[*reversed(range(20))]]
    with pytest.raises(AssertionError, match="hashed"):
        index.find(torch.zeros(1, 3))


def test_equal_sums_of_other_rows_deceive_nobody(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recognition, "sums", lambda self, columns: [7] * len(columns[0]))
    rows = torch.randn(6, 3)
    for _ in range(3):
        assert index.find(rows) == [[*range(6)]]
        index.index.flush()


def test_what_is_unwritten_yet_is_not_compared(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.find(torch.ones(1, 3))
    index.index.flush()
    monkeypatch.setattr(Recognition, "sums", lambda self, columns: [7] * len(columns[0]))
    assert index.find(torch.full((1, 3), 2.0)) == [[1]]  # not written; the next ones have its sum
    assert index.find(torch.zeros(1, 3)) == [[2]]
    assert index.find(torch.ones(1, 3)) == [[0]]


def test_a_pack_that_somebody_changed_is_not_trusted(index: Index) -> None:
    rows = torch.randn(4, 3)
    index.find(rows)
    index.index.flush()
    data = bytearray(index.pack.read_bytes())
    data[13] ^= 1
    index.pack.write_bytes(data)
    assert index.find(rows) == [[*range(4)]]
    changed = torch.frombuffer(data, dtype=torch.float32).view(4, 3)
    assert index.find(changed) == [[0, 4, 2, 3]]


@pytest.mark.parametrize("alike", [False, True])
def test_rows_of_several_tensors_are_told_apart_by_each_of_them(
    alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two share all of one tensor, or all sums too; more rows than msgpack's short lists."""
    if alike:
        monkeypatch.setattr(Recognition, "sums", lambda self, columns: [7] * len(columns[0]))
    index = Index(tmp_path)
    x, y = torch.randn(1, 3).repeat(20, 1), torch.arange(20, dtype=torch.int16)
    first = encode((torch.cat([x, x + 1]), y.repeat(2)))
    for _ in range(2):
        (looked_up,) = index.index.look_up([Batch(first.form.json, (), first.columns, None)])
        ids, digests = index.index.find(first.form.json, 0, looked_up)
        assert ids.tolist() == [*range(40)]
        expected = [row_digest(first.form.json, row.tobytes()) for row in first.rows]
        assert bytes(digests) == msgspec.msgpack.encode(expected)
        index.index.flush()
        if not alike:  # the second time all of them are recognised
            monkeypatch.setattr(index.index, "_hash", None)
    assert index.pack.read_bytes() == first.rows.tobytes()
    index.close()


def test_several_widths_share_a_pack(index: Index) -> None:
    narrow, odd = torch.randn(5, 2), torch.randint(0, 255, (5, 13), dtype=torch.uint8)
    wide = torch.randn(3, WIDEST // 4 + 1)
    batches = (narrow, odd, wide)
    first = index.find(*batches)
    assert first == [[*range(5)], [*range(5, 10)], [*range(10, 13)]]
    index.index.flush()
    assert index.find(*batches) == first
    assert index.find(*reversed(batches)) == first[::-1]


@given(st.lists(st.binary(min_size=5, max_size=5), min_size=1, max_size=12), st.data())
@settings(max_examples=50, deadline=None)
def test_sums_are_of_the_bytes(rows: list[bytes], data: Any) -> None:
    recognition = Recognition([3, 2])
    matrix = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 5)
    columns = [matrix[:, :3], matrix[:, 3:]]
    sums = recognition.sums(columns)
    at = data.draw(st.integers(0, len(rows) - 1))
    assert recognition.sums([column[at : at + 1] for column in columns]) == [sums[at]]
    by_row = dict(zip(rows, sums, strict=True))
    assert [by_row[row] for row in rows] == sums


def test_an_empty_pack_recognises_nothing(tmp_path: Path) -> None:
    (tmp_path / "pack").touch()
    _, written = Mapped(tmp_path / "pack").columns(np.array([0]), [4])
    assert not written.any()


def test_a_recorded_run_of_several_epochs_verifies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, model = torch.randn(40, 6), nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).pow(2).mean()

    problem = culpa.Problem(model, loss)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        epochs = [rows for _ in range(6) for rows in torch.randperm(40).split(8)]
        for batch in recorder.batches((data[rows], rows) for rows in epochs):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    assert run.bytes_by_part()["examples"] == 40 * (6 * 4 + 8)
    run.verify(problem, level="replay")
