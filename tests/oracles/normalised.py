"""A convolutional net with BatchNorm, and the same net and training written out by hand.

``make`` builds it of torch's modules; ``forward`` is it as a function of (parameters, statistics)
that returns the statistics it leaves behind, so that a whole training run is one graph in which
they are state like any other:

    r' = (1 - f) r + f (mean, or variance over n - 1),   f = momentum, or 1 / (batches so far)

Float64. Nothing of the library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.problems import STAGES, cross_entropies, cross_entropy, seeded
from oracles.retrain import Plan
from oracles.unrolled import Rule, Slots, Tensors

EPS = 1e-5


class Net(nn.Module):
    """Convolution, BatchNorm2d, tanh, the same BatchNorm again if ``twice``; then a linear head."""

    def __init__(self, momentum: float | None, twice: bool, frozen: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        self.flat = nn.Linear(3 * 2 * 2, 4)
        self.last = nn.BatchNorm1d(4, momentum=0.3)
        self.head = nn.Linear(4, 3)
        self.twice = twice
        if frozen:
            self.last.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(inputs)))
        if self.twice:
            hidden = torch.tanh(self.norm(1.5 * hidden))
        return self.head(torch.tanh(self.last(self.flat(hidden.flatten(1)))))


def make(momentum: float | None = 0.2, twice: bool = False, frozen: bool = False) -> Any:
    """A factory of the net, float64; ``frozen``: its last BatchNorm in evaluation mode."""
    return seeded(3, lambda: Net(momentum, twice, frozen).double())


def plan(
    optimizers: Mapping[int, Callable[[nn.Module], torch.optim.Optimizer]],
    rates: Sequence[Sequence[float]],
    build: Callable[[], nn.Module],
    frozen_from: int | None = None,
) -> Plan:
    """Images of noise in three classes; from update ``frozen_from`` on ``last`` evaluates."""
    generator = torch.Generator().manual_seed(11)
    batches = [images(8, generator) for _ in rates]
    marked = [
        (*batch, torch.full((8,), frozen_from is not None and k >= frozen_from))
        for k, batch in enumerate(batches)
    ]
    return Plan(
        model=build,
        loss=cross_entropy if frozen_from is None else _cross_entropy_by_mark,
        optimizers=optimizers,
        batches=batches if frozen_from is None else marked,
        rates=rates,
        stages=STAGES,
        example_losses=cross_entropies if frozen_from is None else None,
    )


def _cross_entropy_by_mark(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """As a loop that freezes the last BatchNorm's statistics would have it."""
    model.last.train(not bool(batch[2].any()))
    return cross_entropy(model, batch[:2])


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``[count, 1, 4, 4]`` whose brightness tells a little of their class."""
    targets = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return noise + 0.5 * targets.view(-1, 1, 1, 1), targets


@dataclass(frozen=True)
class Options:
    """How the layers behave; ``evaluating`` names layers that use their statistics."""

    momentum: float | None = 0.2
    twice: bool = False
    evaluating: frozenset[str] = frozenset()


def forward(
    theta: Tensors, r: Tensors, counts: dict[str, int], inputs: Tensor, options: Options
) -> tuple[Tensor, Tensors, dict[str, int]]:
    """Logits, statistics and counts afterwards."""
    r, counts = dict(r), dict(counts)

    def normalise(name: str, x: Tensor, momentum: float | None) -> Tensor:
        axes = (0, *range(2, x.ndim))
        shape = (1, -1, *(1,) * (x.ndim - 2))
        if name in options.evaluating:
            mean, used = r[f"{name}.running_mean"], r[f"{name}.running_var"]
        else:
            n = x.numel() // x.shape[1]
            mean = x.sum(axes) / n
            squares = (x - mean.view(shape)).square().sum(axes)
            used, counts[name] = squares / n, counts[name] + 1
            f = 1.0 / counts[name] if momentum is None else momentum
            for key, stat in (("running_mean", mean), ("running_var", squares / (n - 1))):
                r[f"{name}.{key}"] = (1 - f) * r[f"{name}.{key}"] + f * stat
        out = (x - mean.view(shape)) / torch.sqrt(used.view(shape) + EPS)
        return out * theta[f"{name}.weight"].view(shape) + theta[f"{name}.bias"].view(shape)

    x = functional.conv2d(inputs, theta["conv.weight"], theta["conv.bias"])
    x = torch.tanh(normalise("norm", x, options.momentum))
    if options.twice:
        x = torch.tanh(normalise("norm", 1.5 * x, options.momentum))
    x = x.flatten(1) @ theta["flat.weight"].T + theta["flat.bias"]
    x = torch.tanh(normalise("last", x, 0.3))
    return x @ theta["head.weight"].T + theta["head.bias"], r, counts


@dataclass
class Trace:
    """A run as one graph; ``states[k]`` is (parameters, slots, statistics) before update k."""

    states: list[tuple[Tensors, Slots, Tensors]] = field(default_factory=list)
    after: list[tuple[Tensors, Slots, Tensors]] = field(default_factory=list)
    made: list[dict[str, int]] = field(default_factory=list)
    """By how much update k moved each layer's count."""
    columns: list[Tensors] = field(default_factory=list)
    """r'(counts) - r'(counts - 1), detached."""


def unroll(
    plan: Plan,
    rule: Rule,
    options: Callable[[int], Options],
    *,
    weights: Sequence[float] = (1.0,),
    by_example: Tensor | None = None,
) -> Trace:
    """Execute the plan by hand.

    With several ``weights`` each batch is cut into micro-batches. ``by_example`` ``[K, B]``
    multiplies every example's loss, all of them 1 in the run that was recorded.
    """
    model = plan.model()
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    r = {n: b.detach().clone().requires_grad_() for n, b in model.named_buffers() if b.ndim}
    counts = {"norm": 0, "last": 0}
    slots, trace = rule.fresh(theta), Trace()
    for k, ((inputs, targets, *_), (rate,)) in enumerate(
        zip(plan.batches, plan.rates, strict=True)
    ):
        trace.states.append((theta, slots, r))

        def passes(
            r: Tensors,
            counts: dict[str, int],
            k: int = k,
            theta: Tensors = theta,
            inputs: Tensor = inputs,
            targets: Tensor = targets,
        ) -> tuple[Tensor, Tensors, dict[str, int]]:
            total = torch.zeros((), dtype=torch.float64)
            of_each = torch.ones(len(targets)) if by_example is None else by_example[k]
            cut = (given.chunk(len(weights)) for given in (inputs, targets, of_each))
            for weight, x, y, each in zip(weights, *cut, strict=True):
                logits, r, counts = forward(theta, r, counts, x, options(k))
                losses = functional.cross_entropy(logits, y, reduction="none")
                total = total + weight * (each * losses).mean()
            return total, r, counts

        value, moved, counted = passes(r, counts)
        found = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        with torch.no_grad():
            shifted = {n: max(c - 1, 0) for n, c in counts.items()}
            less = passes(r, shifted)[1]
            trace.columns.append({n: moved[n].detach() - less[n] for n in r})
        trace.made.append({n: counted[n] - counts[n] for n in counts})
        gradients = dict(zip(theta, found, strict=True))
        theta, slots = rule.update(theta, slots, gradients, rate, k)
        theta = {n: p.clone() for n, p in theta.items()}
        slots = {s: {n: v.clone() for n, v in held.items()} for s, held in slots.items()}
        r, counts = {n: v.clone() for n, v in moved.items()}, counted
        trace.after.append((theta, slots, r))
    return trace


def mean_log_likelihood(trace: Trace, batch: tuple[Tensor, Tensor], options: Options) -> Tensor:
    """gamma at the end of the run, every layer in evaluation mode, with its graph."""
    theta, _, r = trace.after[-1]
    still = Options(options.momentum, options.twice, frozenset({"norm", "last"}))
    logits = forward(theta, r, {}, batch[0], still)[0]
    return -functional.cross_entropy(logits, batch[1])


def step_scores(trace: Trace, gamma: Tensor) -> Tensor:
    """<d gamma / d s_{t+1}, s_{t+1} - s_t> of every update, statistics and counts included."""
    total = len(trace.after)
    scores = torch.zeros(total, dtype=torch.float64)
    by_count: list[dict[str, float]] = [{"norm": 0.0, "last": 0.0} for _ in range(total)]
    for k, (after, before) in enumerate(zip(trace.after, trace.states, strict=True)):
        pairs = [(after[0], before[0]), (after[2], before[2])]
        pairs += [(after[1][s], before[1][s]) for s in after[1]]
        leaves = [v for here, _ in pairs for v in here.values()]
        found = iter(torch.autograd.grad(gamma, leaves, retain_graph=True, allow_unused=True))
        for here, there in pairs:
            for n, value in here.items():
                g = next(found)
                if g is None:
                    continue
                scores[k] += torch.sum(g * (value - there[n]).detach())
                if here is after[2]:
                    by_count[k][n.partition(".")[0]] += float(torch.sum(g * trace.columns[k][n]))
    later = {"norm": 0.0, "last": 0.0}
    for t in range(total - 1, -1, -1):
        for n, made in trace.made[t].items():
            scores[t] += made * later[n]
            later[n] += by_count[t][n]
    return scores
