"""Shards of whole tensors, held against ``torch.chunk`` and optimizers over real pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from culpa.trajectory.optimizers import gather_slots
from culpa.trajectory.ranks.shards import ShardStepper, packed, shard, unpacked
from culpa.trajectory.schema import OptimizerSpec, Reduction

shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4)


@given(shapes, st.integers(2, 5))
@settings(max_examples=40)
def test_what_is_packed_for_ranks_is_their_chunks_and_comes_back(sizes: Any, ranks: int) -> None:
    """Row r holds ``torch.chunk``'s r-th piece of every tensor; nothing is lost."""
    wholes = [torch.randn(size) for size in sizes]
    rows = packed(wholes, ranks)
    for there, back in zip(wholes, unpacked(rows, wholes), strict=True):
        assert torch.equal(there, back)
    for rank in range(ranks):
        pieces = [whole.chunk(ranks) for whole in wholes]
        own = [p[rank] for p in pieces if rank < len(p)]
        assert all(
            torch.equal(shard(w, rank, ranks), p[rank]) if rank < len(p) else True
            for w, p in zip(wholes, pieces, strict=True)
        )
        assert sum(p.numel() for p in own) <= rows.shape[1]
        assert float(rows[rank].sum()) == pytest.approx(float(sum(p.sum() for p in own)), abs=1e-4)


MADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_all_shards_is_that_of_optimizers_which_hold_one_each(
    name: str, dtype: torch.dtype
) -> None:
    """Bit for bit, slots included, also when built anew from them in the middle."""
    torch.manual_seed(0)
    ranks, params = 3, {"a": nn.Parameter(torch.randn(17, 5).to(dtype))}
    params["b"] = nn.Parameter(torch.randn(2).to(dtype))  # the last rank holds nothing of it
    pieces = {n: [nn.Parameter(c.clone()) for c in p.detach().chunk(ranks)]
              for n, p in params.items()}  # fmt: skip
    theirs = MADE[name]([one for parts in pieces.values() for one in parts])
    names: dict[Tensor, str] = {p: n for n, p in params.items()}
    spec = OptimizerSpec(type(theirs).__name__, (("a", "b"),))
    hypers = [{k: v for k, v in theirs.param_groups[0].items() if k != "params"}]
    ours = ShardStepper(spec, hypers, params, (), ranks)
    for step in range(6):
        if step == 3:
            kept = gather_slots(ours, names)
            ours = ShardStepper(spec, hypers, params, (), ranks)
            for slot, values in kept.items():
                for n, value in values.items():
                    ours.state[params[n]][slot] = value
        for n, p in params.items():
            p.grad = torch.randn(p.shape).to(dtype)
            for one, grad in zip(pieces[n], p.grad.chunk(ranks), strict=True):
                one.grad = grad.clone()
        ours.step()
        theirs.step()
        for n, p in params.items():
            assert torch.equal(p, torch.cat([one.detach() for one in pieces[n]]))
    for slot, values in gather_slots(ours, names).items():
        for n, value in values.items():
            found = [theirs.state[one][slot] for one in pieces[n]]
            assert torch.equal(value, torch.cat(found) if value.ndim else found[0])


def test_a_record_of_before_says_that_nothing_was_sharded_in_the_same_bytes() -> None:
    """Its digest covers these bytes, and a reader writes them again."""
    old = b'{"ranks":2,"backend":"gloo","buckets":[["a"],["b","c"]]}'
    found = msgspec.json.decode(old, type=Reduction)
    assert (found.sharded, found.each) == (False, False)
    assert msgspec.json.encode(found) == old
