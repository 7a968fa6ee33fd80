"""Training examples: stored once whatever the epochs, or only named and found in the user's data.

And read from object stores, fetching only what is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    WeightedRandomSampler,
    default_collate,
)

import culpa
from oracles.compare import assert_bitwise
from oracles.retrain import parameters_of

ROWS, EPOCHS, WIDTH = 12, 3, 5


class Classifier(nn.Module):
    """Takes every kind of batch below."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            mask = batch["mask"].unsqueeze(-1)
            hidden = (self.words(batch["tokens"]) * mask).sum(1) / mask.sum(1)
        else:
            hidden = batch[0]
        return self.head(torch.tanh(hidden))


def loss(model: nn.Module, batch: Any) -> Tensor:
    targets = batch["label"] if isinstance(batch, dict) else batch[1]
    return nn.functional.cross_entropy(model(batch), targets)


def items() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(WIDTH, generator=generator), i % 3) for i in range(ROWS)]


class MapStyle(Dataset[Any]):
    def __init__(self) -> None:
        self.items = items()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from items()


class Text(Dataset[Any]):
    """Sentences of different lengths."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return {"tokens": [(index * 7 + i) % 20 for i in range(2 + index % 4)], "label": index % 3}


def pad(sentences: list[Any]) -> dict[str, Tensor]:
    longest = max(len(s["tokens"]) for s in sentences)
    rows = [s["tokens"] + [0] * (longest - len(s["tokens"])) for s in sentences]
    return {
        "tokens": torch.tensor(rows),
        "mask": torch.tensor([[i < len(s["tokens"]) for i in range(longest)] for s in sentences]),
        "label": torch.tensor([s["label"] for s in sentences]),
    }


def text_of_one_length(sentences: list[Any]) -> dict[str, Tensor]:
    return pad([{**s, "tokens": (s["tokens"] + [0] * 5)[:5]} for s in sentences])


@dataclass(frozen=True)
class Source:
    loader: Callable[[], Iterable[Any]]
    distinct: int | None = ROWS
    """Rows that differ; ``None`` where padding decides."""
    dataset: tuple[Callable[[], Any], Callable[[list[Any]], Any]] | None = None


def shuffled() -> torch.Generator:
    return torch.Generator().manual_seed(4)


SOURCES: dict[str, Source] = {
    "map-style": Source(
        lambda: DataLoader(MapStyle(), 4, shuffle=True, generator=shuffled()),
        dataset=(MapStyle, default_collate),
    ),
    "workers": Source(
        lambda: DataLoader(MapStyle(), 4, shuffle=True, generator=shuffled(), num_workers=2),
        dataset=(MapStyle, default_collate),
    ),
    "sampler": Source(
        lambda: DataLoader(
            MapStyle(), 4, sampler=WeightedRandomSampler([1.0] * ROWS, 24, generator=shuffled())
        ),
        distinct=None,
        dataset=(MapStyle, default_collate),
    ),
    "iterable": Source(lambda: DataLoader(Stream(), 4)),
    "iterable with a worker": Source(lambda: DataLoader(Stream(), 4, num_workers=1)),
    "list": Source(lambda: [default_collate(items()[i : i + 4]) for i in range(0, ROWS, 4)]),
    "generator": Source(lambda: (default_collate(items()[i : i + 4]) for i in range(0, ROWS, 4))),
    "padded text": Source(lambda: DataLoader(Text(), 4, collate_fn=pad), distinct=None),
    "text of one length": Source(
        lambda: DataLoader(
            Text(), 4, shuffle=True, generator=shuffled(), collate_fn=text_of_one_length
        ),
        dataset=(Text, text_of_one_length),
    ),
}


def train(source: Source, path: Path, epochs: int = EPOCHS, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with culpa.record(path, culpa.Problem(model, loss), optimizer, **options) as recorder:
        for _ in range(epochs):
            for batch in recorder.batches(source.loader()):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
    return model


def untrained() -> culpa.Problem:
    torch.manual_seed(77)
    return culpa.Problem(Classifier(), loss)


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_stored_once_and_replay_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    model = train(source, tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    assert_bitwise(culpa.replay(run, untrained()).state, parameters_of(model))
    run.verify(untrained(), level="replay")
    # Whatever the epochs: the third one adds no rows.
    train(source, tmp_path / "once", epochs=1)
    once = culpa.open_run(tmp_path / "once")
    assert run.num_examples == once.num_examples
    if source.distinct is not None:
        assert run.num_examples == source.distinct
    assert run.num_examples <= ROWS
    parts = run.bytes_by_part()
    assert parts["examples"] == once.bytes_by_part()["examples"] > 0
    assert sum(parts.values()) == run.bytes_on_disk
    assert parts["manifest"] == (tmp_path / "run" / "culpa.json").stat().st_size


@pytest.mark.parametrize("name", SOURCES)
def test_by_reference_the_same_data_replays_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    model = train(source, tmp_path / "run", examples="reference")
    assert culpa.open_run(tmp_path / "run").bytes_by_part()["examples"] == 0
    run = culpa.open_run(tmp_path / "run", examples=source.loader())
    assert_bitwise(culpa.replay(run, untrained()).state, parameters_of(model))
    found = run.verify(untrained(), level="replay")
    assert found.examples == run.num_examples
    if source.dataset is not None:
        dataset, collate = source.dataset
        lazy = culpa.open_run(tmp_path / "run", examples=dataset(), collate=collate)
        assert_bitwise(culpa.replay(lazy, untrained()).state, parameters_of(model))
        assert lazy.verify().examples == run.num_examples


def test_both_ways_of_keeping_examples_have_the_same_updates(tmp_path: Path) -> None:
    train(SOURCES["map-style"], tmp_path / "stored")
    train(SOURCES["map-style"], tmp_path / "named", examples="reference")
    stored, named = culpa.open_run(tmp_path / "stored"), culpa.open_run(tmp_path / "named")
    links = [
        [row[1] for row in run.tables.log.rows("step", ("k", "chain"))] for run in (stored, named)
    ]
    assert links[0] == links[1]
    assert named.bytes_on_disk < stored.bytes_on_disk


def test_without_the_data_a_run_by_reference_says_what_it_needs(tmp_path: Path) -> None:
    train(SOURCES["map-style"], tmp_path / "run", examples="reference")
    run = culpa.open_run(tmp_path / "run")
    assert run.verify().examples == 0
    with pytest.raises(culpa.CulpaError, match=r"open_run\(path, examples="):
        culpa.replay(run, untrained())


@pytest.mark.parametrize("lost", [1, 5, ROWS])
def test_other_data_are_refused_with_the_number_of_rows_missing(lost: int, tmp_path: Path) -> None:
    train(SOURCES["map-style"], tmp_path / "run", examples="reference")
    other = MapStyle()
    for index in range(lost):
        inputs, target = other.items[index]
        other.items[index] = (inputs + 1e-6, target)
    says = f"{lost} of the {ROWS} training examples"
    with pytest.raises(culpa.IntegrityError, match=says):
        culpa.open_run(tmp_path / "run", examples=DataLoader(other, 4))
    with pytest.raises(culpa.IntegrityError, match=says):
        culpa.open_run(tmp_path / "run", examples=other, collate=default_collate)


def test_data_that_change_after_opening_are_noticed(tmp_path: Path) -> None:
    train(SOURCES["map-style"], tmp_path / "run", examples="reference")
    dataset = MapStyle()
    run = culpa.open_run(tmp_path / "run", examples=dataset, collate=default_collate)
    dataset.items[3] = (dataset.items[3][0] * 2, dataset.items[3][1])
    with pytest.raises(culpa.IntegrityError, match="item 3"):
        run.verify()


def test_endless_data_are_read_only_as_far_as_needed(tmp_path: Path) -> None:
    train(SOURCES["list"], tmp_path / "run", examples="reference")
    asked = []

    def endless() -> Iterator[Any]:
        while True:
            for batch in SOURCES["list"].loader():
                asked.append(1)
                yield batch

    culpa.open_run(tmp_path / "run", examples=endless())
    assert len(asked) == ROWS // 4


@pytest.mark.parametrize(
    "options", [{"examples": 7}, {"examples": iter([]), "collate": default_collate}]
)
def test_odd_data_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    train(SOURCES["list"], tmp_path / "run", examples="reference")
    with pytest.raises(culpa.OptionError, match=r"examples|collate"):
        culpa.open_run(tmp_path / "run", **options)
    with pytest.raises(culpa.OptionError, match="'stored' or 'reference'"):
        train(SOURCES["list"], tmp_path / "other", examples="somewhere")


# Object stores.


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A run in fsspec's file system in memory; the folder it came from is gone."""
    train(SOURCES["map-style"], tmp_path / "run", checkpoints=culpa.Every(3))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "run"), "/bucket/run", recursive=True)
    shutil.rmtree(tmp_path / "run")
    yield "memory://bucket/run"
    memory.rm("/bucket", recursive=True)


def test_a_run_in_an_object_store_reads_like_a_folder(store: str, tmp_path: Path) -> None:
    model = train(SOURCES["map-style"], tmp_path / "again")
    run = culpa.open_run(store)
    assert_bitwise(run.final_state(), parameters_of(model))
    assert_bitwise(culpa.replay(run, untrained()).state, parameters_of(model))
    assert run.verify(untrained(), level="replay").executed == run.num_steps
    assert sum(run.bytes_by_part().values()) == run.bytes_on_disk


def test_only_what_is_needed_is_fetched(store: str) -> None:
    run = culpa.open_run(store)
    fetched, sizes = run.source.fetched, run.source.files()
    assert fetched == {name: sizes[name] for name in ("culpa.json", "log.sqlite")}
    run.state(3)
    name = "states/000000003.safetensors"
    assert fetched == {n: sizes[n] for n in ("culpa.json", "log.sqlite", name)}
    run.batches_of(1)
    row = 4 * WIDTH + 8
    assert fetched["examples.pack"] == 4 * row < sizes["examples.pack"] == ROWS * row


def test_rows_far_apart_are_fetched_apart() -> None:
    from culpa.trajectory.source import joined

    spans = [(100, 110), (0, 10), (10, 20), (5000, 5010), (105, 108)]
    assert joined(spans, 0) == [(0, 20), (100, 110), (5000, 5010)]
    assert joined(spans, 80) == [(0, 110), (5000, 5010)]


def test_damage_in_an_object_store_is_noticed(store: str) -> None:
    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat_file("/bucket/run/examples.pack"))
    data[30] ^= 1
    memory.pipe_file("/bucket/run/examples.pack", bytes(data))
    with pytest.raises(culpa.IntegrityError, match=r"memory://.*training example 1"):
        culpa.open_run(store).verify()
    memory.rm("/bucket/run/states/000000003.safetensors")
    with pytest.raises(culpa.IntegrityError, match=r"000000003.safetensors is missing"):
        culpa.open_run(store).verify()


@pytest.mark.parametrize("address", ["memory://nowhere/run", "nosuchstore://bucket/run"])
def test_addresses_without_a_run_are_refused(address: str) -> None:
    with pytest.raises(culpa.CulpaError, match=address.partition(":")[0]):
        culpa.open_run(address)


def test_reading_a_folder_needs_no_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    train(SOURCES["list"], tmp_path / "run")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    culpa.open_run(tmp_path / "run").verify()
    with pytest.raises(culpa.UnsupportedError, match="pip install"):
        culpa.open_run("memory://bucket/run")
