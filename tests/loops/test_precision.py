"""Mixed precision: autocast inside of the loss, a GradScaler in the loop, and what it skips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, Optimizer

import culpa
from culpa.trajectory.borrowing import borrowed
from culpa.trajectory.engine import Engine
from oracles.compare import assert_bitwise, assert_close, assert_tree_close
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import cross_entropy, log_likelihoods, seeded
from oracles.retrain import parameters_of

STAGES = (("first", 0, 5), ("second", 5, 9), ("third", 9, 12))
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)


BATCHES = [batch_of(k) for k in range(12)]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Dropout(0.2), nn.Linear(7, 3)
    )


def loss_in(kind: str) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=TYPES[kind]):
            return cross_entropy(model, batch)

    return loss


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.02, momentum=0.9)


@pytest.mark.parametrize("kind", list(TYPES))
def test_autocast(kind: str, tmp_path: Path) -> None:
    loss = loss_in(kind)

    def problem(model: nn.Module) -> culpa.Problem:
        return culpa.Problem(model, loss)

    def train(model: nn.Module, opened: Open) -> None:
        optimizer = momentum(model)
        with opened(problem(model), optimizer) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    for batch in driver.batches(BATCHES[start:stop]):
                        optimizer.zero_grad()
                        loss(model, batch).backward()
                        optimizer.step()

    loop = Loop(seeded(0, net), train, problem, log_likelihoods, batch_of(99))
    run, again = assert_replayed(loop, tmp_path / "run")
    # Gradients have three digits; parameters and products are float32.
    scores = assert_modelled(loop, run, again, carried=0.02, first_order=0.1, dual=1e-3)
    exact = culpa.attribute(
        run,
        culpa.Problem(again.model, cross_entropy),
        [culpa.Behaviour("test", log_likelihoods, batch_of(99))],
        propagator=culpa.Exact(),
        allow_drift=True,
    )
    assert_close(scores.steps, exact.steps, 0.05)


def test_autocast_in_the_loop_but_not_in_the_loss_is_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = momentum(model)

    def attempt() -> None:
        with culpa.record(
            tmp_path / "run", culpa.Problem(model, cross_entropy), optimizer
        ) as recorder:
            for batch in recorder.batches(BATCHES):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = cross_entropy(model, batch)
                found.backward()
                optimizer.step()

    with pytest.raises(culpa.RecordError, match="update 0 is not what the record would say"):
        attempt()


def fp16(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss_in("fp16")(model, batch)


def scaled(
    build: Callable[[nn.Module], Optimizer] = momentum,
    model: Callable[[], nn.Module] = net,
    *,
    accumulate: int = 1,
    unscale: bool = False,
    resume: bool = False,
    until: int | None = None,
    scale: float = 2.0**20,
    calls: list[int] | None = None,
) -> Loop:
    """fp16 with a scaler that begins too high, so that its first updates are skipped."""

    def problem(module: nn.Module) -> culpa.Problem:
        return culpa.Problem(module, fp16)

    def train(module: nn.Module, opened: Open) -> None:
        optimizer = build(module)
        scaler = GradScaler("cpu", init_scale=scale, growth_interval=4, growth_factor=8.0)
        options: dict[str, object] = {"scaler": scaler}
        if unscale:
            options["clip_grad_norm"] = 0.5
        if resume:
            options["resume"] = True
        seen = 0
        with opened(problem(module), optimizer, **options) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    batches = BATCHES[start:stop] * 2 * accumulate
                    for at, batch in enumerate(driver.batches(batches)):
                        if seen == until:
                            raise RuntimeError("stopped")
                        seen += 1
                        scaler.scale(fp16(module, batch) / accumulate).backward()
                        if (at + 1) % accumulate:
                            continue
                        if unscale:
                            scaler.unscale_(optimizer)
                            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                        scaler.step(optimizer)
                        scaler.update()
                        optimizer.zero_grad()
                        if calls is not None:
                            calls.append(seen)

    return Loop(seeded(0, model), train, problem, log_likelihoods, batch_of(99))


@pytest.mark.parametrize("unscale", [False, True], ids=["plain", "unscaled and clipped"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaler_and_the_updates_it_skips(accumulate: int, unscale: bool, tmp_path: Path) -> None:
    calls: list[int] = []
    loop = scaled(accumulate=accumulate, unscale=unscale, calls=calls)
    run, again = assert_replayed(loop, tmp_path / "run")
    attempts = 24
    assert len(calls[:attempts]) == attempts
    assert run.num_steps < attempts, "nothing was skipped: the test shows nothing"
    scales = [run.step(k).loss_scale for k in range(run.num_steps)]
    assert len(set(scales)) > 1
    discarded = sum(run.step(k).discarded for k in range(run.num_steps))
    assert 0 < discarded <= (attempts - run.num_steps) * accumulate
    rows = [len(run.example_ids(k)) for k in range(run.num_steps)]
    assert rows == [8 * accumulate] * run.num_steps
    assert_modelled(loop, run, again, carried=0.02, first_order=0.15, dual=1e-3)


def test_skipped_updates_move_statistics_and_masks(tmp_path: Path) -> None:
    loop = scaled(model=normed)
    run, _ = loop.record(tmp_path / "run")
    assert any(run.step(k).discarded for k in range(1, run.num_steps))
    plain = loop.retrain()
    again = culpa.replay(run, loop.scrambled())
    assert_bitwise(again.state, parameters_of(plain))
    run.verify(loop.scrambled(), level="replay")
    behaviour = culpa.Behaviour("test", log_likelihoods, batch_of(99))
    with pytest.raises(culpa.UnsupportedError, match=r"1\.running_(mean|var)"):
        culpa.attribute(run, loop.scrambled(), [behaviour], propagator=culpa.Exact())


def test_a_fused_optimizer_is_told_of_the_overflow_inside_of_its_step(tmp_path: Path) -> None:
    def fused(model: nn.Module) -> Optimizer:
        return Adam(model.parameters(), lr=1e-3, eps=1e-4, fused=True)

    loop = scaled(fused)
    run, problem = assert_replayed(loop, tmp_path / "run")
    assert run.num_steps < 24
    assert_tree_close(
        culpa.replay(run, problem, without=[3]).state,
        parameters_of(loop.retrain([3])),
        1e-6,
    )


def test_a_run_with_a_scaler_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        scaled(resume=True, until=15).record(tmp_path / "run")
    _, model = scaled(resume=True).record(tmp_path / "run")
    assert_bitwise(parameters_of(model), parameters_of(scaled().retrain()))


def test_an_undeclared_scaler_is_refused_by_name(tmp_path: Path) -> None:
    model = net()
    optimizer, scaler = momentum(model), GradScaler("cpu", init_scale=2.0**10 / 3)

    def attempt() -> None:
        with culpa.record(tmp_path / "run", culpa.Problem(model, fp16), optimizer) as recorder:
            for batch in recorder.batches(BATCHES):
                optimizer.zero_grad()
                scaler.scale(fp16(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()

    with pytest.raises(culpa.RecordError, match=r"GradScaler|not what the record would say"):
        attempt()


def test_a_scaler_that_is_switched_off_changes_nothing(tmp_path: Path) -> None:
    model = net()
    optimizer, scaler = momentum(model), GradScaler("cpu", enabled=False)
    problem = culpa.Problem(model, fp16)
    with culpa.record(tmp_path / "run", problem, optimizer, scaler=scaler) as recorder:
        for batch in recorder.batches(BATCHES):
            optimizer.zero_grad()
            scaler.scale(fp16(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
    run = culpa.open_run(tmp_path / "run")
    assert run.num_steps == 12
    assert run.step(0).loss_scale is None


def test_a_counterfactual_update_that_overflows_is_skipped(tmp_path: Path) -> None:
    loop = scaled(scale=2.0**10)
    run, _ = loop.record(tmp_path / "run")
    given = loop.scrambled()
    record = msgspec.structs.replace(run.step(0), loss_scale=2.0**100)
    with borrowed(given.model):
        engine = Engine(given)
        engine.load(run.state(0))
        done = engine.execute(record, run.batches_of(0), run.randoms_of(0))
        after = engine.state()
    assert not all(bool(torch.isfinite(g).all()) for g in done.grads.values())
    assert_bitwise(after.params, run.state(0).params)
    assert after.slots == {}
