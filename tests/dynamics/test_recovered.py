"""The gradient of an update, told by the states around it: autograd's over the keyword grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.dynamics.recovered import recovered
from culpa.errors import IntegrityError
from culpa.estimators import passage as passages
from culpa.trajectory.schema import MicroBatch, OptimizerSpec, StepRecord
from culpa.trajectory.state import State
from oracles.awkward import asked, data, net

COMMON: dict[str, Any] = {
    "lr": st.floats(1e-4, 1e-1),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "maximize": st.booleans(),
}
SGD = st.fixed_dictionaries(
    COMMON | {"momentum": st.floats(0.1, 0.95), "dampening": st.sampled_from([0.0, 0.3])}
)
NESTEROV = st.fixed_dictionaries(
    COMMON | {"momentum": st.floats(0.1, 0.95), "nesterov": st.just(True)}
)
ADAM = st.fixed_dictionaries(
    COMMON | {"betas": st.tuples(st.floats(0.0, 0.95), st.just(0.99)), "amsgrad": st.booleans()}
)
CLASSES: dict[str, tuple[type[torch.optim.Optimizer], Any]] = {
    "SGD": (torch.optim.SGD, SGD),
    "nesterov": (torch.optim.SGD, NESTEROV),
    "Adam": (torch.optim.Adam, ADAM),
    "AdamW": (torch.optim.AdamW, ADAM),
}


def state_of(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    slots: dict[str, dict[str, Tensor]] = {}
    for name, p in params.items():
        for slot, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                slots.setdefault(slot, {})[name] = value
    return State({n: p.detach() for n, p in params.items()}, {}, slots).clone()


def record_of(optimizer: torch.optim.Optimizer, **others: Any) -> StepRecord:
    hyper = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    name = type(optimizer).__name__
    return StepRecord(
        index=0,
        optimizer=OptimizerSpec(name, (("a", "b", "c"),)),
        hypers=(hyper,),
        micro_batches=(MicroBatch(layout=0, rows=(), random=None),),
        weights=None,
        reset=False,
        drew_randomness=False,
        evaluating=(),
        without_gradient=("c",),
        digest=b"",
        fingerprints=b"",
        **{"clip_grad_norm": None, **others},
    )


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=25)
@given(data=st.data())
def test_it_is_the_gradient_that_the_optimizer_was_given(
    kind: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    built, options = CLASSES[kind]
    hyper = data.draw(options)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    params = {
        n: nn.Parameter(torch.randn(3, 4, generator=generator, dtype=dtype)) for n in ("a", "b")
    }
    params["c"] = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = built(list(params.values()), **hyper)
    for _ in range(data.draw(st.integers(1, 4))):
        grads = {n: torch.randn(3, 4, generator=generator, dtype=dtype) for n in ("a", "b")}
        for name, grad in grads.items():
            params[name].grad = grad.clone()
        before = state_of(params, optimizer)
        optimizer.step()
        after = state_of(params, optimizer)
        found = recovered(record_of(optimizer), before, after)
        assert found is not None
        assert found.keys() == grads.keys()
        relative = 2e-5 if dtype == torch.float32 else 1e-12
        for name, grad in grads.items():
            assert float((found[name] - grad).norm()) <= relative * float(grad.norm())
        # What clipping may have changed is not told; what it cannot have touched is.
        size = float(torch.stack([g.norm() for g in grads.values()]).norm())
        largest = max(float(g.abs().max()) for g in grads.values())
        for bounds, told in (
            ({"clip_grad_norm": size}, False),
            ({"clip_grad_norm": 1.1 * size}, True),
            ({"clip_grad_value": largest}, False),
            ({"clip_grad_value": 1.1 * largest}, True),
        ):
            assert (recovered(record_of(optimizer, **bounds), before, after) is not None) == told


def test_nothing_is_told_without_a_moment_or_where_all_cancels() -> None:
    for optimizer_of, drift in (
        (lambda p: torch.optim.SGD(p, lr=0.1), 1.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=1.0), 1.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1e-6),
        (lambda p: torch.optim.Adam(p, lr=0.1), 1e-6),
        (lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9), 1.0),
    ):
        params = {n: nn.Parameter(torch.ones(3)) for n in ("a", "b")}
        params["c"] = nn.Parameter(torch.ones(2))
        optimizer = optimizer_of(list(params.values()))
        for size in (1.0, drift):
            for name in ("a", "b"):
                params[name].grad = size * torch.tensor([1.0, -0.7, 0.3])
            before = state_of(params, optimizer)
            optimizer.step()
        assert recovered(record_of(optimizer), before, state_of(params, optimizer)) is None


def trained(folder: Path, **options: Any) -> tuple[culpa.Run, culpa.Problem]:
    model, bound = net(nn.Tanh()), options.get("clip_grad_norm")
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    with culpa.record(folder, problem, optimizer, **options) as recorder:
        for batch in recorder.batches(data(24)):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            if bound is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
            optimizer.step()
    return culpa.open_run(folder), problem


@pytest.mark.parametrize(("bound", "all_read"), [(None, True), (1e-2, False)])
def test_scores_of_states_that_are_read_are_those_of_states_that_are_executed(
    bound: float | None, all_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinned = culpa.attribute(*trained(tmp_path / "thinned", clip_grad_norm=bound), asked())
    executed: list[int] = []
    segment = passages.segment

    def counted(run: Any, engine: Any, low: int, high: int, taker: Any) -> Any:
        executed.extend(range(low, high))
        return segment(run, engine, low, high, taker)

    monkeypatch.setattr(passages, "segment", counted)
    every = culpa.Every(1)
    run, problem = trained(tmp_path / "kept", checkpoints=every, clip_grad_norm=bound)
    kept = culpa.attribute(run, problem, asked())
    torch.testing.assert_close(kept.steps, thinned.steps, rtol=1e-10, atol=1e-14)
    # The last, and some spread over the run, to prove the problem; where it clipped, all.
    proved = {23, *range(0, 24, 24 // passages.PROVED)}
    assert set(executed) == (proved if all_read else {*range(24)})


def test_a_problem_that_is_not_the_recorded_one_is_refused_all_the_same(tmp_path: Path) -> None:
    run, problem = trained(tmp_path / "run", checkpoints=culpa.Every(1))
    other = culpa.Problem(problem.model, lambda m, b: 1.01 * problem.loss(m, b))
    with pytest.raises(IntegrityError, match="does not reproduce"):
        culpa.attribute(run, other, asked())
