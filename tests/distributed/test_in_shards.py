"""Runs of ``fully_shard`` walked again with a shard of everything on each rank.

The oracles: plain FSDP2 training for the bits of replays; one process that holds the whole model
for scores, which other tests hold against retraining.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import culpa
from culpa.trajectory.ranks import gathered
from tests.distributed.processes import run_ranks
from tests.distributed.sharding import MOMENTUM, Sharding
from tests.distributed.test_estimators import flat
from tests.distributed.test_recording import assert_same
from tests.distributed.training import Case, loss


class AtOnce(Sharding):
    """Sharded as one, computed in bfloat16 but for what it returns; two layers share a weight."""

    def model(self) -> nn.Module:
        model: Any = super().model()
        model.append(nn.Linear(3, 3))
        model.append(nn.Linear(3, 3))
        model[7].weight = model[6].weight
        return model

    def sharded(self, model: Any = None) -> nn.Module:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
        return fully_shard(model or self.model(), mp_policy=policy)


def nowhere(job: Sharding) -> nn.Module:
    """The job's model without values: whoever needs a whole one of them fails."""
    with torch.device("meta"):
        return job.model()


def whole(parts: list[dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shards of every rank, put together; what every rank has whole is the first one's."""
    return {
        name: part if part.shape == like[name].shape else torch.cat([one[name] for one in parts])
        for name, part in parts[0].items()
    }


REPLAYED = {
    "two, AdamW, dropout, reduced after each micro-batch": (
        2,
        Sharding(updates=2, dropout=0.3, accumulate=2, sync_each=True),
    ),
    "three, momentum, BatchNorm, clipped": (
        3,
        Sharding(updates=2, optimizer=MOMENTUM, batch_norm=True, clip=0.1),
    ),
}
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
BARELY = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
SUMS = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
SIXTEEN = MixedPrecisionPolicy(param_dtype=torch.float16)
REPLAYED |= {
    "two, computed in bfloat16": (2, Sharding(updates=2, options={"mp_policy": HALF})),
    "two, a tied weight in bfloat16, another dtype returned": (2, AtOnce(updates=2, accumulate=2)),
}
SLOW = {
    "two, accumulated in bfloat16": (
        2,
        Sharding(updates=2, accumulate=3, dropout=0.2, options={"mp_policy": BARELY}),
    ),
    "two, summed in bfloat16": (
        2,
        Sharding(updates=2, accumulate=2, options={"mp_policy": SUMS}),
    ),
    "three, float16, clipped": (
        3,
        Sharding(updates=2, optimizer=MOMENTUM, clip=0.1, options={"mp_policy": SIXTEEN}),
    ),
    "four, computed in bfloat16, each summed": (
        4,
        Sharding(updates=2, accumulate=2, sync_each=True, options={"mp_policy": HALF}),
    ),
    "two, bfloat16": (2, Sharding(updates=3, optimizer=MOMENTUM, dtype=torch.bfloat16)),
    "three, float64, reduced once": (3, Sharding(updates=3, accumulate=2, dtype=torch.float64)),
    "four, AdamW, clipped, reduced once": (4, Sharding(updates=3, accumulate=2, clip=0.1)),
}


@pytest.mark.parametrize(
    "case", [*REPLAYED, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_replays_in_shards_are_the_bits_of_fsdp(case: str, tmp_path: Path) -> None:
    """With and without a stage; effect and file are those of one process."""
    size, job = (REPLAYED | SLOW)[case]
    path, removed = tmp_path / "run", range(job.updates, 2 * job.updates)

    def work(rank: int) -> tuple[Any, ...]:
        recorded = job.train(rank, path)
        run, problem = culpa.open_run(path), job.problem(nowhere(job))
        with culpa.across_ranks(shard=True):
            again = culpa.replay(run, problem)
            without = culpa.replay(run, problem, without="second")
            effect = without.effect(job.behaviour())
            without.save(tmp_path / f"without-{rank}.safetensors")
        assert again.claim == without.claim == "bitwise"
        states = (one.state | one.buffers for one in (again, without))
        return recorded, job.train(rank, skip=removed), *states, effect

    recorded, skipped, again, without, effects = zip(
        *run_ranks(size, tmp_path / "stores", work), strict=True
    )
    bits_of(whole([*again], recorded[0]), recorded[0])
    bits_of(whole([*without], skipped[0]), skipped[0])
    run, problem = culpa.open_run(path), job.problem(job.model())
    alone = culpa.replay(run, problem, without="second")
    bits_of(alone.state | alone.buffers, skipped[0])
    for effect in effects:
        torch.testing.assert_close(effect, alone.effect(job.behaviour()), rtol=1e-6, atol=1e-7)
    alone.save(tmp_path / "alone.safetensors")
    saved = (tmp_path / "without-0.safetensors").read_bytes()
    assert saved == (tmp_path / "alone.safetensors").read_bytes()
    assert not (tmp_path / "without-1.safetensors").exists()


def bits_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same; where a tied parameter has two names, by its first."""
    assert expected.keys() - found.keys() <= {"7.weight"}
    assert_same(found, {name: expected[name] for name in found})


def measured(job: Case, path: Path, model: nn.Module, few: bool) -> dict[str, Any]:
    """Numbers, and displacements by parameter."""
    run, problem, behaviour = culpa.open_run(path), job.problem(model), job.behaviour()
    scores = culpa.attribute(run, problem, [behaviour], examples=True)
    found: dict[str, Any] = {"steps": scores.steps, "examples": scores.examples}
    embedded = culpa.embed(run, problem, propagator=culpa.Secant(0.6))
    embedded.save(path.parent / "embedded.safetensors")
    embedded = culpa.StageEmbeddings.load(path.parent / "embedded.safetensors", problem)
    found |= {"score": embedded.score(behaviour), "effect": embedded.effect(behaviour)}
    found |= {"secant": embedded["first"]}
    if not few:
        for propagator in (culpa.GaussNewton(), culpa.Exact(hvp="finite-difference")):
            found[repr(propagator)] = culpa.attribute(
                run, problem, [behaviour], propagator=propagator, hold=culpa.OnDisk(path.parent)
            ).steps
        found["gauss"] = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss"))["first"]
        found["additive"] = culpa.embed(run, problem, form="additive")["first"]
        found["replayed"] = culpa.embed(run, problem, stages=["first"])["first"]
    return found


SCORED = {
    "two, AdamW": (2, Sharding(updates=1), True),
    "two, dropout, where the sweep falls back": pytest.param(
        2, Sharding(updates=2, dropout=0.3, accumulate=3), False, marks=pytest.mark.slow
    ),
    "two, computed in bfloat16": pytest.param(
        2, Sharding(updates=2, options={"mp_policy": HALF}), True, marks=pytest.mark.slow
    ),
    "three, momentum, clipped": pytest.param(
        3, Sharding(updates=2, optimizer=MOMENTUM, clip=0.1), False, marks=pytest.mark.slow
    ),
}


@pytest.mark.parametrize(("size", "job", "few"), SCORED.values(), ids=SCORED)
def test_attribution_in_shards_is_that_of_one_process(
    size: int, job: Sharding, few: bool, tmp_path: Path
) -> None:
    """To 1e-5 relative, and numbers the same bits on every rank."""
    path = tmp_path / "run"
    run_ranks(size, tmp_path / "stores", lambda rank: job.train(rank, path))
    alone = measured(job, path, job.model(), few)

    def work(_: int) -> dict[str, Any]:
        with culpa.across_ranks(shard=True):
            return measured(job, path, nowhere(job), few)

    found = run_ranks(size, tmp_path / "stores", work)
    for what, expected in alone.items():
        if isinstance(expected, Tensor):
            assert all(torch.equal(found[0][what], other[what]) for other in found)
            here = found[0][what]
        else:
            here = flat(whole([one[what] for one in found], expected))
            expected = flat(expected)
        gap = float((here - expected).norm() / expected.norm())
        assert gap < 1e-5, (what, gap)


def wide() -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())]
    return nn.Sequential(nn.Linear(6, 64), *layers, nn.Linear(64, 3))


class Wide(Sharding):
    """Many layers of one size."""

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return wide()


def test_no_rank_holds_more_than_a_few_whole_parameters_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 26 used in every pass; autograd keeps none of them, in products with the Hessian too."""
    job, path = Wide(updates=1), tmp_path / "run"
    run_ranks(2, tmp_path / "stores", lambda rank: job.train(rank, path))
    alive: list[weakref.ref[Any]] = []
    most = [0]
    marked: Callable[..., None] = gathered._mark

    def watched(every: Tensor, *others: Any) -> None:
        alive.append(weakref.ref(every.untyped_storage()))
        alive[:] = [one for one in alive if one() is not None]
        most[0] = max(most[0], len(alive))
        marked(every, *others)

    monkeypatch.setattr(gathered, "_mark", watched)

    def work(_: int) -> int:
        with culpa.across_ranks(shard=True):
            culpa.attribute(culpa.open_run(path), job.problem(nowhere(job)), [job.behaviour()])
        return most[0]

    assert all(0 < count <= 4 for count in run_ranks(2, tmp_path / "stores", work))


class Awkward(nn.Module):
    """Parameters that modules look up in their own ways: tied, of a child, in a list of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 9, bias=False)
        self.attention = nn.MultiheadAttention(9, 3, batch_first=True)
        self.recurrent = nn.LSTM(9, 9)
        self.scale = nn.Parameter(torch.ones(9))
        self.outer = nn.Linear(9, 9, bias=False)
        self.again = nn.Linear(9, 9, bias=False)
        self.again.weight = self.outer.weight
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).unsqueeze(1).expand(-1, 2, -1)
        x = x + self.attention(x, x, x)[0]
        x, _ = self.recurrent(x.transpose(0, 1))
        return self.head(self.again(torch.tanh(self.outer(x[-1] * self.scale))))


class Grown(Sharding):
    """The head trains first, then all but what makes the inputs; or that from the beginning."""

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return Awkward()

    def train(self, rank: int, path: Path | None = None, **options: Any) -> dict[str, Tensor]:
        model: Any = self.model().requires_grad_(False)
        model.head.requires_grad_(True)
        if options:
            model.requires_grad_(True)
            model.into.requires_grad_(False)
        fully_shard(model.recurrent)
        fully_shard(model)
        moving = [p for p in model.parameters() if p.requires_grad]
        first = torch.optim.SGD(moving, lr=0.1)
        assert path is not None
        with culpa.record(path, self.problem(model), first, **options) as recorder:
            with recorder.stage("head"):
                self._updates(recorder, model, first, rank, 0)
            model.requires_grad_(True)
            model.into.requires_grad_(False)
            moving = [p for p in model.parameters() if p.requires_grad]
            second = torch.optim.AdamW(moving, lr=1e-2)
            with recorder.stage("most", optimizer=second):
                self._updates(recorder, model, second, rank, 1)
        return {n: p.full_tensor().detach() for n, p in model.named_parameters()}

    def _updates(self, recorder: Any, model: Any, optimizer: Any, rank: int, stage: int) -> None:
        for batch in recorder.batches(self.batches(rank, stage)):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()


@pytest.mark.parametrize("frozen", ["stored", "reference"])
def test_models_that_look_parameters_up_in_their_own_ways(frozen: str, tmp_path: Path) -> None:
    """With parameters that never train, and others that join: bits of FSDP2, scores of one."""
    job, path = Grown(updates=2), tmp_path / "run"

    def numbers(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        run, problem = culpa.open_run(path), job.problem(model)
        again = culpa.replay(run, problem)
        exact = culpa.Exact()
        return again.state, culpa.attribute(run, problem, [job.behaviour()], propagator=exact).steps

    def work(rank: int) -> tuple[Any, ...]:
        recorded = job.train(rank, path, **({} if frozen == "stored" else {"frozen": frozen}))
        with culpa.across_ranks(shard=True):
            if frozen == "reference":
                with pytest.raises(culpa.ProblemError, match=r"into\.weight .* meta"):
                    culpa.replay(culpa.open_run(path), job.problem(nowhere(job)))
            return recorded, *numbers(nowhere(job) if frozen == "stored" else job.model())

    recorded, states, scores = zip(*run_ranks(2, tmp_path / "stores", work), strict=True)
    assert_same(whole([*states], recorded[0]), recorded[0])
    _, alone = numbers(job.model())
    assert float((scores[0] - alone).norm() / alone.norm()) < 1e-5


def test_what_shards_cannot_do_is_refused_on_every_rank(tmp_path: Path) -> None:
    job, other = Sharding(updates=1, batch_norm=True), Case(updates=1)
    path, plain = tmp_path / "run", tmp_path / "plain"

    def work(rank: int) -> list[str]:
        job.train(rank, path)
        other.train(rank, plain)
        run, problem = culpa.open_run(path), job.problem(nowhere(job))
        asked = [job.behaviour()]
        with culpa.across_ranks(shard=True):
            removed = culpa.replay(run, problem, without="second")
            embedded = culpa.embed(run, problem, stages=["second"])
        outside = [
            told(lambda: removed.save(tmp_path / "shards.safetensors")),
            told(lambda: removed.effect(job.behaviour())),
            told(lambda: embedded.effect(job.behaviour())),
            told(lambda: embedded.save(tmp_path / "shards.safetensors")),
        ]
        assert all("made inside of across_ranks(shard=True)" in one for one in outside)
        assert "on the meta device" in told(lambda: culpa.replay(run, problem))
        with culpa.across_ranks(shard=True):
            return [
                told(lambda: culpa.attribute(run, problem, asked)),
                told(lambda: culpa.embed(run, problem)),
                told(lambda: culpa.replay(run, problem, allow_drift=True)),
                told(lambda: culpa.replay(culpa.open_run(plain), other.problem(other.model()))),
            ]

    for found in run_ranks(2, tmp_path / "stores", work):
        assert "running statistics (1.num_batches_tracked) cannot be had inside" in found[0]
        assert "embeddings through running statistics" in found[1]
        assert "allow_drift=True cannot be combined" in found[2]
        assert "was recorded without." in found[3]


def told(work: Callable[[], Any]) -> str:
    with pytest.raises(culpa.CulpaError) as caught:
        work()
    return str(caught.value)
