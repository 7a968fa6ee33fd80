"""What some reference pages take for granted: names that the reader's own script has.

A page's tutorials and guides show everything; a reference page says ``trainer`` and means yours.
By page and section: the packages needed, and what makes the names, called in the page's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import culpa
from hostile import forge

Names = dict[str, Any]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def loader() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 5, generator=draw)
    return DataLoader(TensorDataset(inputs, torch.randint(3, (20,), generator=draw)), batch_size=5)


def audited(folder: Path) -> culpa.Audit:
    problem = culpa.Problem(net(), loss)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    with culpa.record(folder / "tracked", problem, optimizer) as recorder, recorder.stage("only"):
        for batch in recorder.batches(loader()):
            optimizer.zero_grad()
            loss(problem.model, batch).backward()
            optimizer.step()
    behaviour = culpa.log_likelihood("training data", loader().dataset[:10])
    return culpa.audit(culpa.open_run(folder / "tracked"), problem, [behaviour])


def transformers(folder: Path) -> Names:
    from integrations.llama import llama, trainer

    model = llama()
    first, second = (trainer(folder / name, model) for name in ("first", "second"))
    return {"culpa": culpa, "trainer": first, "second": second}


def transformers_over(folder: Path) -> Names:
    from integrations.llama import trainer

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer(folder / "output", **saving).train()
    return {"trainer": trainer(folder / "output", **saving)}


def lightning(folder: Path) -> Names:
    import lightning

    class Head(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return loss(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    short = partial(
        lightning.Trainer, accelerator="cpu", max_epochs=1, **dict.fromkeys(quiet, False)
    )
    return {"lightning": SimpleNamespace(Trainer=short), "module": Head(), "loader": loader()}


def accelerate(folder: Path) -> Names:
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    prepared = accelerator.prepare(model, optimizer, loader(), scheduler)
    names = dict(zip(("model", "optimizer", "loader", "scheduler"), prepared, strict=True))
    given = {"accelerator": accelerator, "loss": loss, "path": "accelerated", "bound": 1.0}
    return {**names, **given, "epochs": 1}


def trackers(folder: Path) -> Names:
    from torch.utils.tensorboard import SummaryWriter

    return {"audit": audited(folder), "writer": SummaryWriter(str(folder / "events"))}


def own_optimizer(folder: Path) -> Names:
    class MyOptimizer(torch.optim.SGD):
        """A class outside of torch.optim."""

    return {"culpa": culpa, "model": net(), "loss": loss, "MyOptimizer": MyOptimizer}


def checked_run(folder: Path) -> Names:
    sys.argv = ["check.py", str(forge.record(folder / "run").path)]
    return {}


def signed_run(folder: Path) -> Names:
    problem = culpa.Problem(net(), loss)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    with culpa.record(folder / "run", problem, optimizer) as recorder:
        for batch in recorder.batches(loader()):
            optimizer.zero_grad()
            loss(problem.model, batch).backward()
            optimizer.step()
    run = culpa.open_run(folder / "run")
    culpa.replay(run, problem, without=[1]).save(folder / "model.safetensors")
    return {}


GRANTED: dict[str, dict[str, tuple[tuple[str, ...], Callable[[Path], Names]]]] = {
    "integrations.md": {
        "Hugging Face Transformers": (("transformers",), transformers),
        "Hugging Face, after the fact": (("transformers",), transformers_over),
        "Lightning": (("lightning",), lightning),
        "Accelerate": (("accelerate",), accelerate),
        "Experiment trackers": (("tensorboard",), trackers),
    },
    "optimizers.md": {"Your own optimizer": ((), own_optimizer)},
    "format.md": {"Checking a root digest without culpa": ((), checked_run)},
    "signing.md": {"Tying a run, its audit and a model together": ((), signed_run)},
}
