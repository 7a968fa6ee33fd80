"""What recording reads by a shortcut is what the long way gives: generators, copies, forms."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import culpa
from culpa.trajectory import memory, rng
from culpa.trajectory.arena import Arena
from culpa.trajectory.batches import decode, encode
from culpa.trajectory.commits import copied
from culpa.trajectory.observer import Observer
from culpa.trajectory.snapshot import Camera
from culpa.trajectory.state import State


def asked() -> tuple[Any, Any, bytes]:
    """The generators by their public functions."""
    kind, words, *rest = np.random.get_state()  # noqa: NPY002 (the global one)
    return (
        random.getstate(),
        (kind, words.tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


MOVES = {
    "nothing": lambda: None,
    "python": random.random,
    "python, a Gaussian of which one is kept": lambda: random.gauss(0.0, 1.0),
    "python, seeded": lambda: random.seed(3),
    "numpy": np.random.rand,
    "numpy, a Gaussian of which one is kept": np.random.randn,
    "numpy, 700 words": lambda: np.random.rand(350),  # noqa: NPY002
    "numpy, seeded": lambda: np.random.seed(5),  # noqa: NPY002
    "torch": lambda: torch.rand(3),
    "torch, a Gaussian": lambda: torch.randn(1),
    "torch, a Gaussian of which one is kept": lambda: torch.randn(()),
    "torch, 700 words": lambda: torch.rand(700),
    "torch, seeded": lambda: torch.manual_seed(7),
}


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_capture_is_the_state_that_the_generators_tell(moves: list[str]) -> None:
    with rng.preserved():
        before, captured = asked(), rng.capture()
        for move in moves:
            MOVES[move]()
            now, found = asked(), rng.capture()
            assert (found == captured) == (now == before)
            before, captured = now, found
            rng.restore(rng.RandomState.decode(found.encode()))
            assert asked() == now


def test_a_gaussian_that_is_kept_and_put_back_is_noticed() -> None:
    with rng.preserved():
        np.random.seed(1)  # noqa: NPY002
        np.random.randn()  # noqa: NPY002
        kept, saved = rng.capture(), np.random.get_state()  # noqa: NPY002
        np.random.randn()  # noqa: NPY002 (takes the one that was kept: no word moves)
        taken = rng.capture()
        np.random.set_state(saved)  # noqa: NPY002
        assert rng.capture() == kept != taken


def test_the_shortcut_is_taken_here() -> None:
    assert memory.of_python(random.Random(1)) is not None
    assert memory.of_numpy(np.random.RandomState(1)) is not None
    assert memory.of_torch(torch.Generator()) is not None


@pytest.mark.parametrize("where", ["python", "numpy", "torch"])
def test_without_the_shortcut_captures_are_the_same(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, f"of_{where}", lambda generator: None)
    known = rng._Global()
    with rng.preserved():
        for _ in range(3):
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
            assert known.state() == known.state() == rng.capture()


def test_a_window_that_does_not_show_every_move_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "AROUND", 0)  # torch's words alone, without its position
    assert memory.of_torch(torch.Generator()) is None


def test_a_generator_in_other_memory_has_no_window() -> None:
    class Elsewhere(random.Random):
        def setstate(self, state: Any) -> None:
            """Lets nothing be put into it."""

    assert memory.of_python(Elsewhere()) is None


class Mixed(nn.Module):
    """float32 and bfloat16 parameters, a scalar, an empty one, a channels-last one, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.small = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("flag", torch.tensor([True, False]))


def parts(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(model.named_parameters()), dict(model.named_buffers())


def test_a_snapshot_is_the_state() -> None:
    torch.manual_seed(0)
    model = Mixed()
    params, buffers = parts(model)
    camera, expected = Camera(params, buffers), State(params, buffers).clone()
    taken = camera.take()
    with torch.no_grad():
        for value in (*params.values(), *buffers.values()):
            value.zero_()
    assert taken.step_digests() == expected.step_digests()
    found = taken.state()
    assert [*found.params] == [*params]
    assert found.digest() == expected.digest()
    assert camera.take().step_digests() == State(params, buffers).step_digests()


def test_a_snapshot_of_data_that_was_exchanged() -> None:
    model = nn.Linear(4, 2)
    params, buffers = parts(model)
    camera = Camera(params, buffers)
    model.weight.data = torch.randn(4, 2).T.contiguous().T[:2]
    assert camera.take().step_digests() == State(params, buffers).step_digests()
    model.weight.data = torch.randn(2, 2)
    assert camera.take().step_digests() == State(params, buffers).step_digests()


BATCHES: list[Any] = [
    (torch.randn(4, 3), torch.arange(4)),
    [torch.randn(4, 3), torch.arange(4)],
    {"x": torch.randn(4, 3), "y": torch.arange(4)},
    (torch.randn(8, 3)[::2], torch.arange(4)),
    (torch.randn(3, 4).T, torch.arange(4)),
    (torch.randn(13)[1:].view(4, 3), torch.arange(4)),
    (torch.randn(4, 3), torch.arange(5)),
    (torch.randn(4, 3).double(), torch.arange(4)),
    (torch.tensor(1.0), torch.tensor(2)),
    {},
]


def test_forms_that_are_remembered_are_those_of_their_batches() -> None:
    """Every batch twice and in turn, against a list of one, whose form is always worked out."""
    for _ in range(2):
        for batch in BATCHES:
            short, long = encode(batch), encode([batch])
            (restored,) = decode(long.layout, long.rows, long.form.placements)
            assert short.rows.tobytes() == long.rows.tobytes()
            assert short.form.placements == long.form.placements
            again = decode(short.layout, short.rows, short.form.placements)
            assert type(again) is type(restored) is type(batch)
            values = [list(v.values()) if isinstance(v, dict) else v for v in (again, batch)]
            for a, b in zip(*values, strict=True):
                assert torch.equal(a, b)
                assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def test_a_copied_batch_is_as_it_was() -> None:
    batch = (torch.randn(4, 3), np.arange(4))
    copies, expected = copied(batch, Arena()), encode(batch).rows.copy()
    batch[0].zero_()
    batch[1][:] = 0
    assert (copies.rows == expected).all()


def test_modules_in_evaluation_are_told_whatever_was_exchanged() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model.register_module("absent", None)
    problem = culpa.Problem(model, lambda m, batch: m(batch).sum())
    observer = Observer(problem, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        assert observer.evaluating() == ()
    model[1].eval()
    assert observer.evaluating() == ("1", "1.0", "1.1")
    model[1][0] = nn.Dropout()
    assert observer.evaluating() == ("1", "1.1")
    model[1].append(nn.Tanh().eval())
    assert observer.evaluating() == ("1", "1.1", "1.2")
