"""Layers of many kinds: recorded, replayed bit for bit, and modelled as retraining says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, SparseAdam
from torch.utils.checkpoint import checkpoint

import culpa
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import cross_entropy, log_likelihoods, seeded

STAGES = (("first", 0, 3), ("second", 3, 5), ("third", 5, 6))


class Pooled(nn.Module):
    """A layer over sequences, then the mean over time, then a head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.inner(inputs)
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs)[0]


class Fused(nn.Module):
    """``scaled_dot_product_attention``, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.project(inputs).chunk(3, -1)
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


class Checkpointed(nn.Module):
    """A block whose activations are computed again in ``backward``, masks included."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 7)
        self.block = nn.Sequential(nn.GELU(), nn.Linear(7, 7), nn.Dropout(0.2), nn.GELU())
        self.head, self.reentrant = nn.Linear(7, 3), reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        entered = self.enter(inputs)
        return self.head(checkpoint(self.block, entered, use_reentrant=self.reentrant))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, activation="gelu")


def around(layer: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 3))


def embedded(sparse: bool = False) -> nn.Module:
    return Pooled(nn.Sequential(nn.Embedding(11, 8, sparse=sparse), nn.Tanh()))


class Tied(nn.Module):
    """The last layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mixed = nn.Embedding(11, 3), nn.Linear(3, 3)
        self.back = nn.Linear(3, 11, bias=False)
        self.back.weight = self.words.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.back(torch.tanh(self.mixed(self.words(inputs)))).mean(1)


def convolved() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.3), nn.Linear(7, 3)
    )


VECTORS, SEQUENCES, IMAGES, TOKENS = (6, 5), (4, 5, 8), (4, 1, 6, 6), (4, 6)


@dataclass(frozen=True)
class Kind:
    """A module, and the shape of its inputs."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rate: float = 0.01


MODELS = {
    "convolution": Kind(convolved, IMAGES),
    "RNN": Kind(lambda: Pooled(nn.RNN(8, 8, batch_first=True)), SEQUENCES),
    "GRU": Kind(lambda: Pooled(nn.GRU(8, 8, batch_first=True)), SEQUENCES),
    "LSTM": Kind(lambda: Pooled(nn.LSTM(8, 8, batch_first=True)), SEQUENCES),
    "MultiheadAttention": Kind(lambda: Pooled(Attention()), SEQUENCES),
    "scaled_dot_product_attention": Kind(lambda: Pooled(Fused()), SEQUENCES),
    "TransformerEncoderLayer": Kind(lambda: Pooled(encoder()), SEQUENCES),
    "embedding": Kind(embedded, TOKENS),
    "tied weights": Kind(Tied, TOKENS, rate=0.005),
    "LayerNorm, dropout": Kind(normed, VECTORS, rate=0.002),
    "weight_norm": Kind(around(nn.utils.parametrizations.weight_norm), VECTORS),
    "orthogonal": Kind(around(nn.utils.parametrizations.orthogonal), VECTORS),
    "checkpoint, reentrant": Kind(lambda: Checkpointed(True), VECTORS),
    "checkpoint, not reentrant": Kind(lambda: Checkpointed(False), VECTORS),
}


def batches_of(shape: tuple[int, ...], count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(count):
        if shape is TOKENS:
            inputs = torch.randint(0, 11, shape, generator=generator)
        else:
            inputs = torch.randn(*shape, generator=generator, dtype=torch.float64)
        found.append((inputs, torch.randint(0, 3, (shape[0],), generator=generator)))
    return found


def problem(model: nn.Module) -> culpa.Problem:
    return culpa.Problem(model, cross_entropy)


def loop_of(kind: Kind) -> Loop:
    batches = batches_of(kind.shape, 7)

    def train(model: nn.Module, opened: Open) -> None:
        optimizer = SGD(model.parameters(), lr=kind.rate, momentum=0.9)
        with opened(problem(model), optimizer) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    for batch in driver.batches(batches[start:stop]):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()

    build = seeded(0, lambda: kind.build().double())
    return Loop(build, train, problem, log_likelihoods, batches[-1])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # evaluated, reentrant
@pytest.mark.parametrize("name", list(MODELS))
def test_a_model(name: str, tmp_path: Path) -> None:
    loop = loop_of(MODELS[name])
    run, again = assert_replayed(loop, tmp_path / "run")
    assert_modelled(loop, run, again)


def test_checkpointed_blocks_draw_their_masks_once_for_products(tmp_path: Path) -> None:
    # The activations are kept for products: the block's own parameters must not be read instead
    # of those that a product is taken at.
    loop = loop_of(MODELS["checkpoint, not reentrant"])
    run, _ = loop.record(tmp_path / "run")
    plain, other = problem(loop.model()), problem(loop.model())
    inside = {name: p.detach() + 0.1 for name, p in plain.model.named_parameters()}
    for name, p in other.model.named_parameters():
        p.data.copy_(inside[name])
    batch = batches_of(VECTORS, 1)[0]
    torch.manual_seed(3)
    leaves = {name: value.clone().requires_grad_() for name, value in inside.items()}
    found = torch.autograd.grad(plain.loss_at(leaves, {}, batch), list(leaves.values()))
    torch.manual_seed(3)
    cross_entropy(other.model, batch).backward()
    for value, (_, p) in zip(found, other.model.named_parameters(), strict=True):
        torch.testing.assert_close(value, p.grad, rtol=1e-12, atol=1e-12)
    assert run.num_steps == 6


def test_spectral_norm_is_replayed_and_its_products_are_refused(tmp_path: Path) -> None:
    kind = Kind(around(nn.utils.parametrizations.spectral_norm), VECTORS)
    run, again = assert_replayed(loop_of(kind), tmp_path / "run")
    behaviour = culpa.Behaviour("test", log_likelihoods, batches_of(VECTORS, 1)[0])
    for way in (
        lambda: culpa.attribute(run, again, [behaviour]),
        lambda: culpa.embed(run, again),
    ):
        with pytest.raises(culpa.UnsupportedError, match=r"parametrizations\.weight\.0\._[uv]"):
            way()


def test_sparse_gradients_are_replayed_and_their_products_refused(tmp_path: Path) -> None:
    batches = batches_of(TOKENS, 6)

    def train(model: nn.Module, opened: Open) -> None:
        optimizer = SGD(model.parameters(), lr=0.1)
        with opened(problem(model), optimizer) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    for batch in driver.batches(batches[start:stop]):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()

    build = seeded(0, lambda: embedded(True).double())
    loop = Loop(build, train, problem, log_likelihoods, batches[-1])
    run, again = assert_replayed(loop, tmp_path / "run")
    behaviour = culpa.Behaviour("test", log_likelihoods, batches[-1])
    for way in (
        lambda: culpa.attribute(run, again, [behaviour]),
        lambda: culpa.embed(run, again),
    ):
        with pytest.raises(culpa.UnsupportedError, match=r"inner\.0\.weight.*sparse"):
            way()
    model = build()
    with (
        pytest.raises(culpa.UnsupportedError, match=r"SparseAdam.*sparse gradients"),
        culpa.record(tmp_path / "no", problem(model), SparseAdam([model.inner[0].weight])),  # type: ignore[index]
    ):
        pass


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["parametrization", "hook"])
def test_products_of_weight_norm_are_those_of_its_formula(way: str) -> None:
    # torch's fused kernel takes the norm for a constant when its backward is differentiated.
    normalise = (
        nn.utils.parametrizations.weight_norm
        if way == "parametrization"
        else (nn.utils.weight_norm)
    )
    given = problem(seeded(0, lambda: around(normalise)().double())())
    batch = batches_of(VECTORS, 1)[0]
    params = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    way_along = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()
    }

    def gradient(at: dict[str, Tensor], *, graph: bool = False) -> tuple[Tensor, ...]:
        value = given.loss_at(at, {}, batch)
        return torch.autograd.grad(value, list(at.values()), create_graph=graph)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    slopes = gradient(leaves, graph=True)
    found = torch.autograd.grad(slopes, list(leaves.values()), list(way_along.values()))
    step = 1e-5
    moved = [
        gradient({n: (p + s * step * way_along[n]).requires_grad_() for n, p in params.items()})
        for s in (1, -1)
    ]
    for product, above, below in zip(found, *moved, strict=True):
        expected = (above - below) / (2 * step)
        torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-8)
