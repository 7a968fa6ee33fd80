"""Whatever draws random numbers, a replay sees the numbers that training saw: or it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import culpa
from oracles.compare import assert_bitwise

UPDATES = 9


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_torch() -> Tensor:
    return torch.rand(5)


def of_python() -> Tensor:
    return torch.tensor([random.random() for _ in range(5)])


def of_numpy() -> Tensor:
    return torch.from_numpy(np.random.rand(5)).float()  # noqa: NPY002 (the global one)


def of_all() -> Tensor:
    return of_torch() + of_python() + of_numpy()


SOURCES: dict[str, Callable[[], Tensor]] = {
    "torch": of_torch,
    "python": of_python,
    "numpy": of_numpy,
    "all": of_all,
}


def with_noise(model: nn.Module, batch: Any, noise: Tensor) -> Tensor:
    inputs, labels, _ = batch
    return nn.functional.cross_entropy(model(inputs * (0.5 + noise)), labels)


class Noisy:
    """A loss that draws, and remembers by batch what it drew while somebody listens."""

    def __init__(self, source: Callable[[], Tensor]) -> None:
        self.source = source
        self.seen: dict[int, Tensor] = {}
        self.listening = False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        noise = self.source()
        if self.listening:
            self.seen[int(batch[2][0])] = noise
        return with_noise(model, batch, noise)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 5, generator=generator),
            torch.randint(0, 3, (4,), generator=generator),
            torch.full((4,), i),
        )
        for i in range(count)
    ]


def nothing(k: int) -> None:
    """What a loop does besides training."""


def look(k: int) -> None:
    """Evaluation: draws from everything, never the same amount."""
    for _ in range(k % 3):
        of_all()


def look_sometimes(k: int) -> None:
    if k == 4:
        of_all()


@dataclass(frozen=True)
class Loop:
    """``micro`` batches an update, handed over by ``recorder.step`` or by ``recorder.batches``."""

    micro: int = 1
    by_step: bool = False
    between: Callable[[int], None] = nothing
    before_step: Callable[[int], None] = nothing

    def train(self, path: Path, loss: Noisy) -> tuple[culpa.Run, culpa.Problem]:
        model = net()
        optimizer, problem = sgd(model), culpa.Problem(model, loss)
        everything = batches(UPDATES * self.micro)
        with culpa.record(path, problem, optimizer) as recorder:
            for name, low, high in (("first", 0, 5), ("second", 5, UPDATES)):
                part = everything[low * self.micro : high * self.micro]
                with recorder.stage(name):
                    drawn = iter(part if self.by_step else recorder.batches(part))
                    for k in range(low, high):
                        if self.by_step:
                            own = [next(drawn) for _ in range(self.micro)]
                            with recorder.step(*own):
                                self.update(model, optimizer, loss, iter(own), k)
                        else:
                            self.update(model, optimizer, loss, drawn, k)
                        self.between(k)
        return culpa.open_run(path), problem

    def update(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Noisy,
        drawn: Iterator[Any],
        k: int,
    ) -> None:
        optimizer.zero_grad()
        for _ in range(self.micro):
            batch = next(drawn)
            loss.listening = True
            value = loss(model, batch)
            loss.listening = False
            (value / self.micro if self.micro > 1 else value).backward()
        self.before_step(k)
        optimizer.step()

    def retrained(self, seen: dict[int, Tensor], removed: frozenset[int]) -> dict[str, Tensor]:
        """The same training without the removed updates, told what to draw; culpa has no part."""
        model = net()
        optimizer, everything = sgd(model), batches(UPDATES * self.micro)
        for k in range(UPDATES):
            if k in removed:
                continue
            optimizer.zero_grad()
            for batch in everything[k * self.micro : (k + 1) * self.micro]:
                value = with_noise(model, batch, seen[int(batch[2][0])])
                (value / self.micro if self.micro > 1 else value).backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}


LOOPS = {
    "plain": Loop(),
    "recorder.step": Loop(by_step=True),
    "accumulation": Loop(micro=3),
    "accumulation in recorder.step": Loop(micro=3, by_step=True),
    "evaluation between updates": Loop(between=look),
    "evaluation between accumulated updates": Loop(micro=2, by_step=True, between=look),
    "something drawn before every step": Loop(before_step=lambda k: [None, of_all()][0]),
    "drawn before accumulated steps": Loop(
        micro=2, by_step=True, before_step=lambda k: [None, of_all()][0]
    ),
}


@pytest.mark.parametrize(
    ("loop", "source"),
    [(loop, source) for loop in LOOPS for source in ("torch", "all")]
    + [("plain", "python"), ("plain", "numpy"), ("accumulation in recorder.step", "numpy")],
)
def test_a_replay_and_its_counterfactuals_draw_what_training_drew(
    loop: str, source: str, tmp_path: Path
) -> None:
    loss, how = Noisy(SOURCES[source]), LOOPS[loop]
    run, problem = how.train(tmp_path / "run", loss)
    drawn = dict(loss.seen)
    assert len(drawn) == UPDATES * how.micro
    assert len({tuple(noise.tolist()) for noise in drawn.values()}) == len(drawn)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    for removed in (frozenset[int](), frozenset({3}), frozenset({1, 2, 7}), frozenset(range(5))):
        loss.seen.clear()
        loss.listening = True
        found = culpa.replay(run, problem, without=removed)
        loss.listening = False
        for k, noise in loss.seen.items():
            if k // how.micro not in removed:
                assert torch.equal(noise, drawn[k]), f"batch {k} without {set(removed)}"
        assert_bitwise(found.state, how.retrained(drawn, removed))
        assert found.claim == "bitwise"
    run.verify(problem, level="replay")


@pytest.mark.parametrize("by_step", [False, True])
def test_dropout_masks_of_a_module_with_accumulation(by_step: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer, problem = sgd(model), culpa.Problem(model, loss)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder, recorder.stage("only"):
        drawn = iter(recorder.batches(batches(12)))
        mine = iter(batches(12))
        for _ in range(6):
            optimizer.zero_grad()
            if by_step:
                own = [next(mine), next(mine)]
                with recorder.step(*own, weights=(0.25, 0.75)):
                    for batch, weight in zip(own, (0.25, 0.75), strict=True):
                        (loss(model, batch) * weight).backward()
                    optimizer.step()
            else:
                for _ in range(2):
                    (loss(model, next(drawn)) / 2).backward()
                optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_bitwise(culpa.replay(run, problem).state, trained)


class Augmented(torch.utils.data.Dataset[Any]):
    """Every access draws from all three generators."""

    def __init__(self) -> None:
        self.rows = TensorDataset(*[torch.cat(part) for part in zip(*batches(8), strict=True)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        inputs, label, number = self.rows[index]
        return inputs + of_all(), label, number


def no_worker_seed(_: int) -> None:
    """Workers are seeded by torch."""


@pytest.mark.parametrize(
    "options",
    [{}, {"own": True}, {"workers": 2}, {"own": True, "workers": 2}],
    ids=["global", "own generator", "workers", "own generator, workers"],
)
def test_a_loader_that_shuffles_and_augments_needs_nothing_for_replay(
    options: dict[str, Any], tmp_path: Path
) -> None:
    # What it drew is in the batches, and they are in the run: its generators are not needed again.
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 3))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer, problem = sgd(model), culpa.Problem(model, loss)
    loader = DataLoader(
        Augmented(),
        batch_size=4,
        shuffle=True,
        collate_fn=default_collate,
        generator=torch.Generator().manual_seed(8) if options.get("own") else None,
        num_workers=options.get("workers", 0),
        worker_init_fn=no_worker_seed,
        multiprocessing_context="fork" if options.get("workers") else None,
    )
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for _ in range(2):
            for batch in recorder.batches(loader):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    del loader
    torch.manual_seed(1234)
    run = culpa.open_run(tmp_path / "run")
    assert run.num_steps == 16
    assert run.num_examples == 64  # augmentation made each one new
    assert_bitwise(culpa.replay(run, problem).state, trained)
    removed = culpa.replay(run, problem, without=[4]).state
    again = culpa.replay(run, problem, without=[4]).state
    assert_bitwise(removed, again)


def private(generator: torch.Generator) -> Tensor:
    return torch.rand(5, generator=generator)


def private_numpy(generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.random(5)).float()


def private_python(generator: random.Random) -> Tensor:
    return torch.tensor([generator.random() for _ in range(5)])


UNACCOUNTED: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "torch.Generator": lambda: partial(private, torch.Generator().manual_seed(0)),
    "numpy.random.Generator": lambda: partial(private_numpy, np.random.default_rng(0)),
    "random.Random": lambda: partial(private_python, random.Random(0)),
    "the operating system": lambda: partial(private_python, random.SystemRandom()),
}


@pytest.mark.parametrize("source", UNACCOUNTED)
def test_a_generator_of_the_losss_own_is_refused(source: str, tmp_path: Path) -> None:
    loss = Noisy(UNACCOUNTED[source]())
    with pytest.raises(culpa.NotReproducibleError, match="no generator of Python, NumPy or torch"):
        Loop().train(tmp_path / "run", loss)


def test_a_generator_seeded_inside_of_the_loss_is_no_randomness(tmp_path: Path) -> None:
    loss = Noisy(lambda: torch.rand(5, generator=torch.Generator().manual_seed(7)))
    run, problem = Loop().train(tmp_path / "run", loss)
    run.verify(problem, level="replay")


def test_what_is_drawn_before_a_single_later_step_is_found_by_verify(tmp_path: Path) -> None:
    # Only the first update of a stage is executed twice while recording.
    loss = Noisy(of_torch)
    run, problem = Loop(before_step=lambda k: look_sometimes(k - 2)).train(tmp_path / "run", loss)
    with pytest.raises(culpa.IntegrityError, match=r"update 7 .*randomness drawn elsewhere"):
        run.verify(problem, level="replay")
