"""Recording and replay on another device than the CPU, which is simulated (tests/devices.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn, optim
from torch.nn import functional

import culpa
from culpa.trajectory.state import largest_difference
from devices import ACCELERATOR, Distant, accelerator, moved
from elsewhere import Training, batch, loss, problem_of

TRAININGS = {
    "momentum": Training(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), micro_batches=2),
    "adamw": Training(lambda p: optim.AdamW(p, lr=0.02), normalises=True, clips=True),
    "dropout": Training(lambda p: optim.AdamW(p, lr=0.02, foreach=True), drops=True, frozen=True),
    "asgd": Training(lambda p: optim.ASGD(p, lr=0.1, t0=3, foreach=True)),
    "nadam": Training(lambda p: optim.NAdam(p, lr=0.02)),
}
SLOW = {"dropout", "nadam"}
every_training = pytest.mark.parametrize(
    "kind", [k if k not in SLOW else pytest.param(k, marks=pytest.mark.slow) for k in TRAININGS]
)


@pytest.fixture(autouse=True)
def there() -> Iterator[None]:
    with accelerator():
        yield


def here(value: Any) -> Any:
    """It stays where it is."""
    return value


def points(place: Callable[[Any], Any]) -> culpa.Behaviour:
    return culpa.log_likelihood("right", place(batch(torch.Generator().manual_seed(3), 7)))


def require_same(found: Any, expected: Any) -> None:
    """The same names and bits, and all on the CPU."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert type(value) is Tensor, f"{name} is on {value.device}"
        assert torch.equal(value, expected[name]), name


def far(*shape: int) -> Tensor:
    return torch.ones(shape, device=ACCELERATOR)


COMPUTED: dict[str, Callable[[], Tensor]] = {
    "made": lambda: torch.tensor([1.0, 2.0], device=ACCELERATOR),
    "a number of the CPU": lambda: far(2, 2) * torch.tensor(3.0),
    "indices of the CPU": lambda: far(2, 2)[torch.tensor([0])],
    "a list": lambda: far(2, 2)[[0]],
    "copied from the CPU": lambda: far(2).copy_(torch.ones(2)),
    "filled with a number": lambda: far(2).masked_fill(far(2) > 0, torch.tensor(0.0)),
    "view written to": lambda: far(4).view(2, 2).zero_(),
    "forward mode": lambda: torch.func.jvp(lambda x: 2 * x.sin(), (far(2),), (far(2),))[1],
    "vmap of a gradient": lambda: torch.func.vmap(torch.func.grad(lambda x: x.sin().sum()))(
        far(3, 2)
    ),
    "foreach": lambda: torch._foreach_add([far(2)], [far(2)])[0],
}
REFUSED: dict[str, Callable[[], object]] = {
    "sum": lambda: far(2) + torch.ones(2),
    "product": lambda: far(2, 2) @ torch.ones(2, 2),
    "a number from there": lambda: torch.ones(2) + far(),
    "written to the CPU": lambda: torch.ones(()).add_(far()),
    "numbers stacked": lambda: torch.stack([far(), torch.ones(())]),
    "concatenated": lambda: torch.cat([far(2), torch.ones(2)]),
    "index_add": lambda: far(2).index_add_(0, torch.tensor([0]), far(1)),
    "gather": lambda: far(2, 2).gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "indices there": lambda: torch.ones(2)[torch.tensor([0], device=ACCELERATOR)],
    "embedding": lambda: functional.embedding(torch.tensor([0]), far(2, 2)),
    "mask": lambda: torch.where(torch.ones(2) > 0, far(2), far(2)),
    "compared": lambda: torch.equal(far(2), torch.ones(2)),
    "foreach": lambda: torch._foreach_add([far(2)], [torch.ones(2)]),
    "generator": lambda: torch.randn(2, generator=torch.Generator(), device=ACCELERATOR),
    "NumPy": lambda: np.asarray(far(2)),
    "module": lambda: nn.Linear(2, 2)(far(2)),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_the_device_computes_what_cuda_computes(what: str) -> None:
    found = COMPUTED[what]()
    assert isinstance(found, Distant)
    assert found.device == ACCELERATOR
    assert not found.is_cpu


@pytest.mark.parametrize("what", REFUSED)
def test_the_device_refuses_what_cuda_refuses(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device|convert|lazy"):
        REFUSED[what]()


@every_training
def test_a_run_recorded_there_is_verified_and_replayed_there(kind: str, tmp_path: Path) -> None:
    training = TRAININGS[kind]
    found = training.recorded(tmp_path / "there", moved)
    expected = training.recorded(tmp_path / "here", here)
    assert [found.step(k).digest for k in range(9)] == [expected.step(k).digest for k in range(9)]
    assert found.verify(problem_of(moved(training.model())), level="replay").executed == 9
    for counterfactual in ("skip", "restart", "zero-gradient"):
        one, other = (
            culpa.replay(
                run,
                problem_of(place(training.model())),
                without="two",
                counterfactual=counterfactual,
            )
            for run, place in ((found, moved), (expected, here))
        )
        require_same(one.state | one.buffers, other.state | other.buffers)
        require_same({"effect": one.effect(points(moved))}, {"effect": other.effect(points(here))})
    one.save(tmp_path / "saved")
    require_same(load_file(tmp_path / "saved"), one.state | one.buffers)


def test_a_run_recorded_on_the_cpu_does_not_go_on_elsewhere_unnoticed(tmp_path: Path) -> None:
    training = TRAININGS["momentum"]
    run = training.recorded(tmp_path / "run", here)
    with pytest.raises(culpa.EnvironmentDifference, match="device"):
        culpa.replay(run, problem_of(moved(training.model())), without="two")


def test_replays_side_by_side_and_their_drift(tmp_path: Path) -> None:
    training = TRAININGS["momentum"]
    both = []
    for place in (moved, here):
        run = training.recorded(tmp_path / place.__name__, place)
        problem = problem_of(place(training.model()))
        both.append(culpa.replay_many(run, problem, ["one", "two"], side_by_side=True))
    for one, other in zip(*both, strict=True):
        require_same(one.state | one.buffers, other.state | other.buffers)
        assert one.claim == other.claim


def test_a_run_goes_on_there_after_a_crash(tmp_path: Path) -> None:
    def train(path: Path, crash: bool, **options: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        model = moved(TRAININGS["adamw"].model())
        optimizer = optim.AdamW(model.parameters(), lr=0.02)
        batches = [moved(batch(generator)) for _ in range(8)]
        with culpa.record(path, problem_of(model), optimizer, **options) as recorder:
            for name, part in (("one", batches[:4]), ("two", batches[4:])):
                with recorder.stage(name):
                    for at, one in enumerate(recorder.batches(part)):
                        if crash and name == "two" and at == 2:
                            raise KeyboardInterrupt
                        optimizer.zero_grad()
                        loss(model, one).backward()
                        optimizer.step()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", crash=True, checkpoints=culpa.Every(3))
    train(tmp_path / "run", crash=False, checkpoints=culpa.Every(3), resume=True)
    train(tmp_path / "whole", crash=False)
    require_same(
        culpa.open_run(tmp_path / "run").final_state(),
        culpa.open_run(tmp_path / "whole").final_state(),
    )


def test_frozen_parameters_by_reference_are_the_models_own(tmp_path: Path) -> None:
    training = TRAININGS["dropout"]
    run = training.recorded(tmp_path / "run", moved, frozen="reference")
    problem = problem_of(moved(training.model()))
    removed = culpa.replay(run, problem, without="two")
    expected = culpa.replay(
        training.recorded(tmp_path / "here", here), problem_of(training.model()), without="two"
    )
    removed.save(tmp_path / "saved")
    name, _ = largest_difference(load_file(tmp_path / "saved"), expected.state)
    assert not name
    assert torch.equal(removed.effect(points(moved)), expected.effect(points(here)))
    assert float(culpa.attribute(run, problem, [points(moved)]).steps.abs().sum()) > 0.0
