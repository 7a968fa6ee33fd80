"""What is not modelled of FSDP2 is refused on every rank, by name, before anything is recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import culpa
from tests.distributed.processes import run_ranks
from tests.distributed.sharding import Sharding
from tests.distributed.training import Case, loss


def record(path: Path, model: nn.Module, kind: Any = torch.optim.SGD, **options: Any) -> None:
    optimizer = kind(model.parameters(), lr=0.1)
    with culpa.record(path, culpa.Problem(model, loss), optimizer, **options) as recorder:
        for batch in recorder.batches(Case().batches(torch.distributed.get_rank(), 0)[:2]):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()


def sharded(**options: Any) -> Any:
    return fully_shard(Sharding().model(), **options)


def changed(change: Callable[[Any], None]) -> Any:
    model = sharded()
    change(model)
    return model


def two_dimensions() -> Any:
    return init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))


def partly() -> nn.Module:
    model: Any = Sharding().model()
    fully_shard(model[4])
    return model


def muon(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=lr)


class Normalised(torch.optim.SGD):
    """Divides a gradient by its norm: what DTensor computes of all shards is not a shard's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm() * group["lr"])


def unsynchronised(path: Path) -> None:
    """Four micro-batches, reduced at the second and the fourth."""
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Case().batches(torch.distributed.get_rank(), 0)[:4]
    with (
        culpa.record(path, culpa.Problem(model, loss), optimizer) as recorder,
        recorder.step(*batches),
    ):
        for i, batch in enumerate(batches):
            model.set_requires_gradient_sync(i % 2 == 1)
            (loss(model, batch) / 4).backward()
        optimizer.step()


def own(path: Path) -> None:
    model = sharded()
    optimizer = Normalised(model.parameters(), lr=0.1)
    problem = culpa.Problem(model, loss, optimizers=(Normalised,))
    with culpa.record(path, problem, optimizer) as recorder:
        for batch in recorder.batches(Case().batches(torch.distributed.get_rank(), 0)[:1]):
            loss(model, batch).backward()
            optimizer.step()


def clipped(path: Path) -> None:
    Sharding(updates=1, clip=0.1).train(torch.distributed.get_rank())  # plain, and now undeclared
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with culpa.record(path, culpa.Problem(model, loss), optimizer) as recorder:
        for batch in recorder.batches(Case().batches(torch.distributed.get_rank(), 0)[:1]):
            loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()


def edited(path: Path) -> None:
    """Gradients of the last rank's shards are doubled, and of no other's."""
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with culpa.record(path, culpa.Problem(model, loss), optimizer) as recorder:
        for batch in recorder.batches(Case().batches(torch.distributed.get_rank(), 0)[:1]):
            loss(model, batch).backward()
            for p in model.parameters() if torch.distributed.get_rank() else ():
                p.grad.to_local().mul_(2)
            optimizer.step()


def two_at_once() -> nn.Module:
    model: Any = Sharding().model()
    fully_shard([model[4], model[5]], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return fully_shard(model)


wide = MixedPrecisionPolicy(param_dtype=torch.float64)
Cases = dict[str, tuple[Callable[[Path], None], str]]
REFUSED: Cases = {
    "wider": (lambda path: record(path, sharded(mp_policy=wide)), "computes in a wider dtype"),
    "several in bfloat16": (
        lambda path: record(path, two_at_once()),
        "MixedPrecisionPolicy of several modules at once",
    ),
    "offload": (
        lambda path: record(path, sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "CPUOffloadPolicy",
    ),
    "HSDP": (
        lambda path: record(path, sharded(mesh=two_dimensions())),
        "several dimensions",
    ),
    "placement": (
        lambda path: record(
            path, fully_shard(nn.Linear(6, 4, bias=False), shard_placement_fn=lambda _: Shard(1))
        ),
        "shard_placement_fn",
    ),
    "partly": (lambda path: record(path, partly()), "parameters outside of it (0.weight, 0.bias)"),
    "factor": (
        lambda path: record(path, changed(lambda m: m.set_gradient_divide_factor(3.0))),
        "set_gradient_divide_factor",
    ),
    "unused": (
        lambda path: record(path, changed(lambda m: m.set_reduce_scatter_unused_params(True))),
        "set_reduce_scatter_unused_params",
    ),
    "hook": (
        lambda path: record(path, changed(lambda m: m.set_all_reduce_hook(lambda _: None))),
        "set_all_reduce_hook",
    ),
    "Adafactor": (lambda path: record(path, sharded(), torch.optim.Adafactor), "Adafactor, whose"),
    "Muon": (lambda path: record(path, sharded(), muon), "Muon, whose"),
    "resume with statistics": (
        lambda path: record(path, fully_shard(Sharding(batch_norm=True).model()), resume=True),
        "every rank has a 1.running_mean of its own",
    ),
    "scaler": (
        lambda path: record(path, sharded(), scaler=torch.amp.GradScaler("cpu")),
        "GradScaler",
    ),
}
TOLD: Cases = {
    "some micro-batches reduced together": (unsynchronised, "reduced 2 times, of 4 micro-batches"),
    "an optimizer that mixes elements": (own, "The gradients agree, so something else"),
    "clipping that was not declared": (clipped, "clip_grad_norm=max_norm to culpa.record"),
    "one rank's gradients": (edited, "gradients are not those of loss(model, batch) on this batch"),
}


def told(cases: Cases, folder: Path) -> None:
    """One after another in the same two processes: no rank waits for another for ever."""

    def work(rank: int) -> dict[str, str]:
        said: dict[str, str] = {}
        for name, (attempt, _) in cases.items():
            try:
                attempt(folder / name)
            except culpa.CulpaError as error:
                said[name] = str(error)
        return said

    for said in run_ranks(2, folder / "stores", work):
        for name, (_, expected) in cases.items():
            assert expected in said.get(name, "not refused"), name


def test_refusals_name_what_was_given_on_every_rank(tmp_path: Path) -> None:
    """Nothing is left of the attempts."""
    told(REFUSED, tmp_path)
    assert not any((tmp_path / name).exists() for name in REFUSED)


def test_a_loop_that_is_not_modelled_is_told_at_its_first_update(tmp_path: Path) -> None:
    """On every rank, with what it may be."""
    told(TOLD, tmp_path)


def test_one_process_has_nothing_to_shard(tmp_path: Path) -> None:
    """Its DTensors would be taken for whole tensors."""

    def work(rank: int) -> str:
        with pytest.raises(culpa.UnsupportedError) as raised:
            record(tmp_path / "run", sharded())
        return str(raised.value)

    assert "nothing to shard" in run_ranks(1, tmp_path / "stores", work)[0]
