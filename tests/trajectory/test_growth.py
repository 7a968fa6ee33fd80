"""What a grown run is: the same updates of a larger model, in a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import culpa
from hostile.forge import everything

FORMAT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


class Net(nn.Module):
    """With statistics, masks, and a layer that may be put in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.trunk(inputs)) + self.bias


class Wrapped(nn.Module):
    """Another name for what it wraps, and a parameter of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.gain = base, nn.Parameter(torch.ones(6))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) * self.gain


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def of_module(grown: Any, batch: Any) -> Tensor:
    return loss(grown.module, batch)


def built() -> Net:
    torch.manual_seed(7)
    return Net()


def trained(path: Path, model: nn.Module, name: str, evaluating: str = "none") -> None:
    """A job of five updates, recorded of the model as it is."""
    torch.manual_seed(1)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(5)]
    if evaluating != "none":
        model.get_submodule(evaluating).eval()
    with (
        culpa.record(path, culpa.Problem(model, loss), optimizer, append=True) as recorder,
        recorder.stage(name),
    ):
        for batch in recorder.batches(data):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()


@pytest.mark.parametrize("evaluating", ["none", "trunk", "trunk.1", "trunk.2", ""])
def test_a_run_of_the_model_is_one_of_what_it_became(evaluating: str, tmp_path: Path) -> None:
    model = built()
    trained(tmp_path / "run", model, "one", evaluating)
    before = everything(tmp_path / "run")
    grown = culpa.Grown(model.train())
    model.trunk[0], model.head = Wrapped(model.trunk[0]), nn.Sequential(model.head)
    run = culpa.grow(culpa.open_run(tmp_path / "run"), tmp_path / "grown", grown)
    assert everything(tmp_path / "run") == before
    assert set(dict(grown.named_parameters())) == {
        *dict(built().named_parameters()),
        "module.trunk.0.gain",
    }
    assert run.manifest.frozen == ("module.trunk.0.gain",)
    torch.testing.assert_close(run.final_state()["module.trunk.0.gain"], torch.ones(6))
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.mul_(-2).add_(1)
        grown.get_parameter("module.trunk.0.gain").fill_(5)  # it is put back from the record
    problem = culpa.Problem(grown, of_module)
    assert run.verify(problem, level="replay").executed == 5
    behaviour = culpa.Behaviour("mean", lambda m, x: m(x).sum(1), torch.eye(3)[:2])
    carried = culpa.embed(run, problem, propagator=culpa.Secant(1)).effect(behaviour)
    truth = culpa.replay(run, problem, without="one").effect(behaviour)
    torch.testing.assert_close(carried[0], truth, rtol=1e-4, atol=1e-5)


def test_chain_and_states_are_the_very_same(tmp_path: Path) -> None:
    model = built()
    trained(tmp_path / "run", model, "one")
    trained(tmp_path / "run", model, "two")
    first = culpa.open_run(tmp_path / "run")
    model.more = nn.Linear(2, 2)
    run = culpa.grow(first, tmp_path / "grown", model)  # names did not change: no Grown needed
    assert [s.name for s in run.stages] == ["one", "two"]
    assert [run.step(k).digest for k in range(10)] == [first.step(k).digest for k in range(10)]
    assert run.kept_states == first.kept_states
    assert run.root_digest != first.root_digest
    stops = [job.stop for job in run.manifest.earlier]
    assert stops == [job.stop for job in first.manifest.earlier] == [5]
    assert run.manifest.earlier[0].root_digest != first.manifest.earlier[0].root_digest
    assert run.manifest.plain_seconds == pytest.approx(first.manifest.plain_seconds)
    assert run.verify().finished
    model.again = nn.Linear(2, 2)
    later = culpa.grow(run, tmp_path / "later", model)
    assert later.verify(root_digest=later.root_digest).finished
    trained(tmp_path / "later", model, "three")
    longest = culpa.open_run(tmp_path / "later")
    assert [job.stop for job in longest.manifest.earlier] == [5, 10]
    assert longest.manifest.earlier[1].root_digest == later.root_digest
    assert longest.verify().updates == 15
    checker = re.findall(r"^```python\n(.*?)^```$", FORMAT.read_text("utf-8"), re.M | re.S)[-1]
    command = [sys.executable, "-c", checker, str(longest.path)]  # shares nothing with the library
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == longest.root_digest


def renamed(model: Net) -> nn.Module:
    model.head = nn.Sequential(model.head)  # type: ignore[assignment]
    return model


def reshaped(model: Net) -> nn.Module:
    model.head = nn.Linear(6, 3)
    return model


def normed(model: Net) -> nn.Module:
    model.more = nn.BatchNorm1d(2)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, r"head\.bias: recorded float32 \[2\], given nothing.*culpa\.Grown"),
        (reshaped, r"head\.bias: recorded float32 \[2\], given float32 \[3\]"),
        (normed, r"buffer 'more\.num_batches_tracked'.*before recording begins"),
        (lambda model: model, r"nothing has to grow.*append=True"),
    ],
)
def test_models_that_are_no_larger_ones_are_refused(
    change: Callable[[Net], nn.Module], said: str, tmp_path: Path
) -> None:
    model = built()
    trained(tmp_path / "run", model, "one")
    with pytest.raises(culpa.ProblemError, match=said):
        culpa.grow(culpa.open_run(tmp_path / "run"), tmp_path / "grown", change(model))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_runs_that_cannot_grow_are_refused(tmp_path: Path) -> None:
    model = built()
    trained(tmp_path / "run", model, "one")
    run = culpa.open_run(tmp_path / "run")
    model.more = nn.Linear(2, 2)
    with pytest.raises(culpa.StoreError, match="exists; choose"):
        culpa.grow(run, tmp_path / "run", model)

    def fails() -> None:
        problem = culpa.Problem(model, loss)
        with culpa.record(tmp_path / "half", problem, SGD(model.parameters(), lr=0.1)):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with pytest.raises(culpa.StoreError, match="'interrupted'; only a complete run"):
        culpa.grow(culpa.open_run(tmp_path / "half"), tmp_path / "grown", model)
    damaged = tmp_path / "run" / "examples.pack"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(culpa.IntegrityError, match="row"):
        culpa.grow(run, tmp_path / "grown", model)
    assert not (tmp_path / "grown").exists()


def test_what_a_crash_left_is_no_run_and_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    trained(tmp_path / "run", model, "one")
    run = culpa.open_run(tmp_path / "run")
    model.more = nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr("culpa.trajectory.growth.files.rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            culpa.grow(run, tmp_path / "grown", model)
    assert not (tmp_path / "grown").exists()
    assert culpa.grow(run, tmp_path / "grown", model).verify().finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grown", "run"]


def test_another_start_than_that_of_the_grown_run_is_refused(tmp_path: Path) -> None:
    model = built()
    trained(tmp_path / "run", model, "one")
    model.more = nn.Linear(2, 2)
    culpa.grow(culpa.open_run(tmp_path / "run"), tmp_path / "grown", model)
    with torch.no_grad():
        model.more.bias += 1  # type: ignore[operator]
    with pytest.raises(culpa.RecordError, match=r"params/more\.bias \(by up to 1\)"):
        trained(tmp_path / "grown", model, "two")


def test_a_wrapper_is_no_model_to_grow() -> None:
    with pytest.raises(culpa.OptionError, match=r"'module'.*inside of the wrapper"):
        culpa.Grown(nn.DataParallel(built()))


def test_it_calls_what_was_assigned_last() -> None:
    model, inputs = built().eval(), torch.ones(2, 3)
    grown = culpa.Grown(model)
    assert torch.equal(grown(inputs), model(inputs))
    grown.scaled = nn.Sequential(nn.Linear(3, 5))
    assert grown(inputs).shape == (2, 5)
    assert grown.eval().get_submodule("trunk.2") is model.trunk[2]
    assert grown.train().get_submodule("trunk.2").training
