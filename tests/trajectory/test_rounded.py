"""Waiting in half precision: what comes back is as near as its bits allow, and so are scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import culpa
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss
from culpa.estimators.trust import MISMATCH_ALLOWED
from culpa.trajectory import rounded
from culpa.trajectory.hold import ANCHORED, Hold, backward
from culpa.trajectory.walk import Transition, forward, session
from oracles.compare import assert_bitwise, assert_close, assert_tree_close

Batch = tuple[Tensor, Tensor]
UPDATES = 2 * ANCHORED + 6
HALF = torch.bfloat16
BITS = 2.0**-7
"""The error of rounding to seven significant bits, relative."""
SINGLE = 2.0**-22
sizes = st.floats(width=32, min_value=2.0**-100, max_value=2.0**100)
numbers = st.one_of(st.just(0.0), sizes, sizes.map(lambda x: -x))
near = st.floats(width=32, min_value=-0.875, max_value=1.5)


@given(st.lists(st.tuples(numbers, numbers, near, st.booleans()), min_size=1, max_size=40))
@settings(max_examples=200)
def test_a_number_and_its_increment_keep_seven_bits(
    drawn: list[tuple[float, float, float, bool]],
) -> None:
    starts = torch.tensor([a for a, *_ in drawn])
    ends = torch.tensor([a * (1.0 + by) if close else b for a, b, by, close in drawn])
    found = rounded.before(ends, rounded.told_from(ends, starts)).double()
    start, end = starts.double(), ends.double()
    off = (found - start).abs()
    slack = SINGLE * end.abs()
    assert (off <= BITS * start.abs() * (1 + 1e-6) + slack).all()
    assert (off <= 2 * BITS * (end - start).abs() * (1 + 1e-6) + slack).all()
    assert torch.equal(found.sign(), start.sign())


def test_what_did_not_change_comes_back_as_it_was_and_what_is_no_number_stays_none() -> None:
    here = torch.tensor([1.0, -3.3, 0.0, 1e-38, torch.nan, torch.inf])
    told = rounded.told_from(here, here)
    assert told.dtype is torch.int16
    back = rounded.before(here, told)
    assert torch.equal(back[:4], here[:4])
    assert back[4].isnan()
    assert not back[5].isfinite()


@pytest.mark.parametrize("shape", [(3, 700, 500), (0, 4), (7,)])
def test_every_block_of_a_large_or_turned_tensor_is_its_own(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator).transpose(0, -1)
    end = start + 1e-3 * torch.randn(start.shape, generator=generator)
    found = rounded.before(end, rounded.told_from(end, start))
    assert found.shape == start.shape
    gap = (found.double() - start.double()).abs()
    assert (gap <= 2 * BITS * (end.double() - start.double()).abs() + SINGLE * end.abs()).all()


def model() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(5, 16, bias=False)  # one before BatchNorm has but noise for a gradient
    return nn.Sequential(first, nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


def loss(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=3e-3, amsgrad=True)


def batches(count: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 12, 5, generator=generator)
    # An input that is often zero: moments that grow suddenly, as pixels and rare words have them.
    inputs[..., 0] *= torch.rand(count, 1, generator=generator) < 0.2
    return [(x, (x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()) for x in inputs]


def made(path: Path, optimizer: Callable[[nn.Module], Any], net: nn.Module) -> culpa.Run:
    """One segment of ``UPDATES`` updates."""
    stepper = optimizer(net)
    dtype = next(net.parameters()).dtype
    problem = culpa.Problem(net, loss)
    with (
        culpa.record(path, problem, stepper, checkpoints=culpa.AtStages()) as recorder,
        recorder.stage("all"),
    ):
        data = [(x.to(dtype), y) for x, y in batches(UPDATES)]
        for batch in recorder.batches(data):
            stepper.zero_grad()
            loss(net, batch).backward()
            stepper.step()
    return culpa.open_run(path)


@pytest.fixture(scope="module", params=[sgd, adamw], ids=lambda made: made.__name__)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> culpa.Run:
    return made(tmp_path_factory.mktemp("rounded") / "run", request.param, model())


def both(run: culpa.Run, hold: Hold) -> Iterable[tuple[Transition, Transition]]:
    """Every update from the last to the first, as it waited and as it was."""
    with session(run, culpa.Problem(model(), loss)) as engine:
        true = list(forward(run, engine, 0, run.num_steps))
        yield from zip(backward(run, engine, 0, hold), reversed(true), strict=True)


def test_states_and_increments_come_back_as_near_as_seven_bits_are(
    run: culpa.Run, tmp_path: Path
) -> None:
    seen = 0
    for hold in (culpa.OnDisk(tmp_path, dtype=HALF), culpa.InMemory(HALF)):
        for found, true in both(run, hold):
            assert found.record == true.record
            assert found.rounded
            assert not true.rounded
            assert_bitwise(found.before.buffers, true.before.buffers)
            assert_bitwise(found.after.buffers, true.after.buffers)
            for name, grad in true.grads.items():
                assert ((found.grads[name] - grad).abs() <= 2.0**-8 * grad.abs()).all()
            here, was = found.before.flat(), true.before.flat()
            next_here, next_was = found.after.flat(), true.after.flat()
            assert [*here] == [*was]
            assert [*next_here] == [*next_was]
            for path, value in was.items():
                assert here[path].dtype == value.dtype
                since = ANCHORED - true.index % ANCHORED
                # A state has the errors of all increments behind it, back from an anchor.
                off = (here[path].double() - value.double()).abs()
                assert (off <= since * BITS * 1.2 * value.abs().double()).all(), path
                if path.endswith("step") or "/step/" in path:
                    assert torch.equal(here[path], value)
                change = next_was[path].double() - value.double()
                gap = next_here[path].double() - here[path].double() - change
                # 7 bits of its own, and how far the state that it is measured from is off.
                allowed = 2 * BITS * change.abs() + since * BITS * 1.2 * change.abs()
                assert (gap.abs() <= allowed + 2 * SINGLE * value.abs()).all(), path
            if (true.index + 1) % ANCHORED == 0 or true.index + 1 == run.num_steps:
                assert_bitwise(next_here, next_was)
            seen += 1
    assert seen == 2 * UPDATES


def test_scores_differ_by_no_more_than_the_rounding_of_increments(run: culpa.Run) -> None:
    """Without propagation p is the gradient, and |p . gap| <= 2^-6 sum |p| |Delta|."""
    problem: Any = culpa.Problem(model(), loss)
    asked = [culpa.log_likelihood("test", batches(1, seed=9)[0])]

    def scores(hold: Hold, propagator: Any) -> culpa.Scores:
        return culpa.attribute(run, problem, asked, propagator=propagator, hold=hold)

    exact = scores(culpa.InMemory(), culpa.Identity()).steps
    found = scores(culpa.InMemory(HALF), culpa.Identity()).steps
    net = model()
    net.load_state_dict({**run.final_state(), **run.final_buffers()})
    net.eval()
    value = loss(net, asked[0].batch)
    slopes = torch.autograd.grad(value, [*net.parameters()])
    gradient = {n: g.abs() for (n, _), g in zip(net.named_parameters(), slopes, strict=True)}
    with session(run, problem) as engine:
        for t in forward(run, engine, 0, run.num_steps):
            change = {n: (v - t.before.params[n]).abs() for n, v in t.after.params.items()}
            bound = 2 * BITS * sum(float((gradient[n] * change[n]).sum()) for n in gradient)
            assert abs(float(found[t.index, 0] - exact[t.index, 0])) <= bound
    assert not torch.equal(found, exact)


def test_exact_sweeps_differ_by_little_and_say_what_they_used(run: culpa.Run) -> None:
    problem: Any = culpa.Problem(model(), loss)
    asked = [culpa.log_likelihood("test", batches(1, seed=9)[0])]
    exact = culpa.attribute(run, problem, asked)
    found = culpa.attribute(run, problem, asked, hold=culpa.OnCpu(HALF))
    assert_close(found.steps, exact.steps, 2 * BITS)
    assert_close(found.stages, exact.stages, 2 * BITS)
    assert max(t.mismatch for t in found.trust) <= MISMATCH_ALLOWED  # rounding is no other step
    residuals, growths = ([getattr(t, of) for t in found.trust] for of in ("residual", "growth"))
    assert residuals == pytest.approx([t.residual for t in exact.trust], rel=0.05, nan_ok=True)
    assert growths == pytest.approx([t.growth for t in exact.trust], rel=0.05)
    assert "bfloat16" in found.strategy
    assert "bfloat16" not in exact.strategy


def test_differences_do_not_take_a_rounded_gradient_for_the_true_one(run: culpa.Run) -> None:
    problem = culpa.Problem(model(), loss)
    with session(run, problem) as engine:
        *_, found = backward(run, engine, 0, culpa.InMemory(HALF))
        local = LocalLoss(problem, found)
        vector = {n: torch.ones_like(p) for n, p in local.params.items()}
        (true,) = hessian.products(local, local.params, [vector], "reverse-over-reverse")
        (near_by,) = hessian.products(local, local.params, [vector], "one-sided-difference")
    assert_tree_close(near_by, true, 0.02)


def test_double_precision_waits_as_it_is(tmp_path: Path) -> None:
    run = made(tmp_path / "run", sgd, model().double())
    with session(run, culpa.Problem(model().double(), loss)) as engine:
        true = list(forward(run, engine, 0, run.num_steps))
        found = backward(run, engine, 0, culpa.InMemory(HALF))
        for one, other in zip(found, reversed(true), strict=True):
            assert_bitwise(one.before.flat(), other.before.flat())
            assert_bitwise(one.after.flat(), other.after.flat())
            assert_bitwise(one.grads, other.grads)


def test_on_disk_half_the_bytes_wait(run: culpa.Run, tmp_path: Path) -> None:
    def waiting(hold: Hold) -> int:
        with session(run, culpa.Problem(model(), loss)) as engine:
            way = backward(run, engine, 0, hold)
            next(way)
            files = [load_file(f) for f in tmp_path.rglob("*.safetensors")]
            way.close()  # type: ignore[attr-defined]
            assert len(files) == UPDATES - 1
            return sum(value.nbytes for file in files for value in file.values())

    ratio = waiting(culpa.OnDisk(tmp_path, dtype=HALF)) / waiting(culpa.OnDisk(tmp_path))
    assert 0.5 < ratio < 0.7  # of so small a model buffers and anchors are a part


@pytest.mark.parametrize("hold", [culpa.InMemory, culpa.OnCpu, culpa.OnDisk])
def test_other_types_are_refused_by_name(hold: Callable[..., Hold]) -> None:
    with pytest.raises(culpa.OptionError, match=r"float16.*second moments.*bfloat16"):
        hold(dtype=torch.float16)
    with pytest.raises(culpa.OptionError, match=r"None.*torch\.bfloat16; got torch\.float32"):
        hold(dtype=torch.float32)
