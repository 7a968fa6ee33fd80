"""``lightning.Trainer.fit``: recorded, replayed bit for bit, and counterfactuals against a torch
loop written by hand from Lightning's documentation."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():  # lightning imports what its own dependencies deprecate
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")

import culpa
from culpa.errors import OptionError, RecordError, UnsupportedError
from culpa.integrations.lightning import RecorderCallback, problem_of
from oracles.compare import assert_bitwise, assert_tree_close, pearson
from oracles.retrain import parameters_of

# Lightning advises on workers, loggers and epoch lengths.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance:DeprecationWarning"),
]

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(35, 5, generator=DRAW)
TARGETS = torch.randint(3, (35,), generator=DRAW)
ROWS, EPOCHS, RATE = 5, 2, 0.02


def net(dropout: float) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3))


class Head(lightning.LightningModule):
    """A classifier; ``interval`` says when its schedule advances."""

    def __init__(self, interval: str = "", dropout: float = 0.1) -> None:
        super().__init__()
        self.net, self.interval = net(dropout), interval

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, number: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss, "number": number}

    def validation_step(self, batch: Any) -> None:
        assert not self.net.training
        torch.rand(())  # evaluation draws random numbers too

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)
        if not self.interval:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": self.interval},
        }


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | options
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        **dict.fromkeys(quiet, False),
        **settings,
    )


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=ROWS, shuffle=shuffle)


def fitted(folder: Path, module: Any, callbacks: list[Any], **options: Any) -> Any:
    torch.manual_seed(7)
    shuffle = options.pop("shuffle", True)
    trainer(folder, callbacks, **options).fit(module, loader(shuffle), loader(False))
    return module


def recorded(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The run and the trained module."""
    made = {k: options.pop(k) for k in ("interval", "dropout") if k in options}
    callback = RecorderCallback(folder / "run", stage="head")
    module = fitted(folder, Head(**made), [callback], **options)
    return culpa.open_run(folder / "run"), module


def by_hand(
    without: Collection[int], *, accumulate: int, clip: Any, interval: str
) -> dict[str, Tensor]:
    """Batches in order; every loss divided by ``accumulate``, in a partial last update too."""
    model = net(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    update = 0
    for epoch in range(EPOCHS):
        for first in range(0, 7, accumulate):
            skipped, update = update in without, update + 1
            if skipped:
                continue
            optimizer.zero_grad()
            for at in range(first, min(first + accumulate, 7)):
                rows = slice(at * ROWS, (at + 1) * ROWS)
                loss = nn.functional.cross_entropy(model(INPUTS[rows]), TARGETS[rows])
                (loss / accumulate).backward()
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            elif clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
            ticks = {"": 0, "step": update - 1, "epoch": epoch}[interval]
            optimizer.param_groups[0]["lr"] = RATE * 0.7**ticks
            optimizer.step()
    return {f"net.{n}": v for n, v in parameters_of(model).items()}


def test_fit_trains_as_before_and_every_update_replays(tmp_path: Path) -> None:
    plain = fitted(tmp_path, Head("step"), [], accumulate_grad_batches=2, gradient_clip_val=0.2)
    run, module = recorded(
        tmp_path, interval="step", accumulate_grad_batches=2, gradient_clip_val=0.2
    )
    assert_bitwise(parameters_of(module), parameters_of(plain))
    assert [(s.name, len(s)) for s in run.stages] == [("head", 8)]  # 4 updates of 7 batches, twice
    assert_bitwise(culpa.replay(run, problem_of(Head("step"))).state, parameters_of(plain))
    run.verify(problem_of(Head("step")), level="replay")


@pytest.mark.parametrize("interval", ["", "step", "epoch"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, "norm"), (3, "value")])
def test_without_an_update_against_a_loop_by_hand(
    tmp_path: Path, interval: str, accumulate: int, clip: Any
) -> None:
    clipping = {"norm": 0.2, "value": 0.05}.get(clip)
    run, module = recorded(
        tmp_path,
        interval=interval,
        dropout=0.0,
        shuffle=False,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clipping,
        gradient_clip_algorithm=clip,
    )
    problem, recipe = problem_of(Head(interval, 0.0)), (accumulate, clip, interval)
    options = dict(zip(("accumulate", "clip", "interval"), recipe, strict=True))
    assert_tree_close(parameters_of(module), by_hand((), **options), 1e-6)
    for without in ([0], [2], [run.num_steps - 1], [1, 2, 4]):
        found = culpa.replay(run, problem, without=without).state
        assert_tree_close(found, by_hand(without, **options), 1e-5)


def test_scores_and_effects_against_a_loop_by_hand(tmp_path: Path) -> None:
    run, module = recorded(
        tmp_path, dropout=0.0, shuffle=False, accumulate_grad_batches=3, gradient_clip_val=0.2
    )
    problem = problem_of(Head(dropout=0.0))
    behaviour = culpa.log_likelihood("likelihood", (INPUTS[:9], TARGETS[:9]))
    scores = culpa.attribute(run, problem, [behaviour]).steps[:, 0]

    def effect(without: Collection[int]) -> float:
        other = Head(dropout=0.0)
        other.load_state_dict(by_hand(without, accumulate=3, clip="norm", interval=""))
        other.eval()
        return float(whole - behaviour.values(other).mean())

    module.eval()
    whole = behaviour.values(module).mean()
    truths = torch.tensor([effect([k]) for k in range(run.num_steps)])
    assert pearson(scores, truths) > 0.97
    additive = culpa.embed(run, problem, form="additive").score(behaviour).mean()
    assert float(additive) == pytest.approx(float(truths.sum()), rel=0.1)


def test_two_fits_append_stages_to_one_run(tmp_path: Path) -> None:
    module, plain = Head(), Head()
    for stage, options in (("one", {}), ("two", {"append": True})):
        callback = RecorderCallback(tmp_path / "run", stage=stage, **options)
        fitted(tmp_path, module, [callback])
        fitted(tmp_path, plain, [])
    assert_bitwise(parameters_of(module), parameters_of(plain))
    run, again = culpa.open_run(tmp_path / "run"), Head()
    assert [(s.name, s.start, s.stop) for s in run.stages] == [("one", 0, 14), ("two", 14, 28)]
    problem = culpa.Problem.by_stage({stage: problem_of(again) for stage in ("one", "two")})
    assert_bitwise(culpa.replay(run, problem).state, parameters_of(plain))
    alone = parameters_of(fitted(tmp_path, Head(), []))
    assert_bitwise(culpa.replay(run, problem, without="one").state, alone)


def test_an_exception_leaves_an_interrupted_run(tmp_path: Path) -> None:
    class Failing(Head):
        def training_step(self, batch: Any, number: int) -> Any:
            if self.trainer.global_step == 4:
                raise ValueError("the disk of labels is gone")
            return super().training_step(batch, number)

    callback = RecorderCallback(tmp_path / "run", stage="head")
    with pytest.raises(ValueError, match="labels is gone"):
        fitted(tmp_path, Failing(), [callback])
    run = culpa.open_run(tmp_path / "run")
    assert (run.manifest.status, run.num_steps) == ("interrupted", 4)
    assert "labels is gone" in run.manifest.reason
    culpa.replay(run, problem_of(Head()))


class Manual(Head):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Head):
    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(layer.parameters(), lr=RATE) for layer in (self.net[0], self.net[3])
        ]


def test_what_is_not_recorded_is_refused_by_name(tmp_path: Path) -> None:
    callback = RecorderCallback(tmp_path / "run", stage="head")
    with pytest.raises(UnsupportedError, match="bf16-mixed"):
        fitted(tmp_path, Head(), [callback], precision="bf16-mixed")
    with pytest.raises(UnsupportedError, match="optimizes manually"):
        problem_of(Manual())
    with pytest.raises(OptionError, match="clip_grad_norm"):
        RecorderCallback(tmp_path / "run", stage="head", clip_grad_norm=1.0)
    assert not (tmp_path / "run").exists()
    fitted(tmp_path, Head(), [callback])
    with pytest.raises(RecordError, match=r"one trainer\.fit"):
        fitted(tmp_path, Head(), [callback])
    skipping = Head()
    skipping.training_step = lambda batch, number: None
    with pytest.raises(UnsupportedError, match="skips batches"):
        problem_of(skipping).loss(skipping, {"batch": None, "batch_idx": 0, "accumulation": 1})
