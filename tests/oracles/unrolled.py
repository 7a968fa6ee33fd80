"""Reverse-mode autograd through a whole training run: the derivative estimators must reproduce.

The run is executed as one graph, optimizers written out by hand from the recurrences in the PyTorch
documentation, so that d gamma(theta_K) / d s_k for every k is one call of ``autograd.grad``. Then

    score_t = < d gamma / d s_{t+1} , s_{t+1} - s'_{t+1} >        (Estimators 4.1 and 4.2)

where s'_{t+1} is the state had update t been removed: s_t under ``skip``, the update map at
gradient zero under ``zero-gradient``. An integer count of updates (Adam's step; whether SGD's
momentum has started, which dampening depends on) has no derivative; by convention it is the
backward difference of the update map, F(count) - F(count - 1), times the displacement of the count
(1 under ``skip``, 0 under ``zero-gradient``), so that score_t gains

    sum_{k > t} < d gamma / d s_{k+1} , F(count_k) - F(count_k - 1) >.

Everything is float64 by the model that is given. Nothing of the library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]
Slots = dict[str, Tensors]


class Rule(Protocol):
    """One optimizer's recurrence on tensors by name."""

    counts: bool
    """Whether the update depends on how many came before it (bias correction, dampening)."""

    def fresh(self, parameters: Tensors) -> Slots:
        """The slots before the first update, where a slot torch has not created yet is zero."""
        ...

    def update(
        self, parameters: Tensors, slots: Slots, gradients: Tensors, rate: float, count: int
    ) -> tuple[Tensors, Slots]:
        """Parameters and slots after the update; ``count`` updates were executed before it."""
        ...


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD with one parameter group."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False
    counts: bool = True

    def fresh(self, parameters: Tensors) -> Slots:
        """A zero momentum buffer."""
        if self.momentum == 0:
            return {}
        return {"momentum": {n: torch.zeros_like(p) for n, p in parameters.items()}}

    def update(
        self, parameters: Tensors, slots: Slots, gradients: Tensors, rate: float, count: int
    ) -> tuple[Tensors, Slots]:
        """v <- mu v + (1 - d) g (first: v <- g); theta <- theta - rate (v, or g + mu v)."""
        sign = -1.0 if self.maximize else 1.0
        g = {n: sign * gradients[n] + self.weight_decay * p for n, p in parameters.items()}
        if self.momentum == 0:
            return {n: p - rate * g[n] for n, p in parameters.items()}, {}
        share = 1.0 if count == 0 else 1.0 - self.dampening
        v = {n: self.momentum * slots["momentum"][n] + share * g[n] for n in parameters}
        way = {n: g[n] + self.momentum * v[n] for n in parameters} if self.nesterov else v
        return {n: p - rate * way[n] for n, p in parameters.items()}, {"momentum": v}


@dataclass(frozen=True)
class Adam:
    """torch.optim.AdamW (``decoupled``) or torch.optim.Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False
    counts: bool = True

    def fresh(self, parameters: Tensors) -> Slots:
        """Zero moments."""
        zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
        slots = {"first": dict(zeros), "second": dict(zeros)}
        return slots | {"largest": dict(zeros)} if self.amsgrad else slots

    def update(
        self, parameters: Tensors, slots: Slots, gradients: Tensors, rate: float, count: int
    ) -> tuple[Tensors, Slots]:
        """Moments, bias corrections 1 - beta^(count+1), and the step."""
        b1, b2 = self.betas
        g = {n: -value for n, value in gradients.items()} if self.maximize else dict(gradients)
        theta = dict(parameters)
        if self.decoupled:
            theta = {n: (1.0 - rate * self.weight_decay) * p for n, p in theta.items()}
        else:
            g = {n: g[n] + self.weight_decay * p for n, p in parameters.items()}
        m = {n: b1 * slots["first"][n] + (1.0 - b1) * g[n] for n in parameters}
        v = {n: b2 * slots["second"][n] + (1.0 - b2) * g[n] ** 2 for n in parameters}
        c1, c2 = 1.0 - b1 ** (count + 1), 1.0 - b2 ** (count + 1)
        used = v
        if self.amsgrad:
            used = {n: torch.maximum(slots["largest"][n], v[n]) for n in parameters}
        new = {}
        for n, p in theta.items():
            # d sqrt(v) at v = 0 is infinite: define it as 0 there, as the library documents
            alive = used[n] > 0
            root = torch.where(alive, torch.where(alive, used[n], 1.0).sqrt(), 0.0)
            new[n] = p - rate / c1 * m[n] / (root / c2**0.5 + self.eps)
        after = {"first": m, "second": v}
        return new, after | {"largest": used} if self.amsgrad else after


class _Bound(nn.Module):
    """A model with given parameters in place of its own, for losses of ``(model, batch)``."""

    def __init__(self, model: nn.Module, parameters: Tensors) -> None:
        super().__init__()
        self._call = (model, parameters)

    def forward(self, *inputs: Any) -> Any:
        model, parameters = self._call
        return functional_call(model, parameters, inputs)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._call[1].items())


@dataclass
class Unrolled:
    """A run as one graph: ``before[k]``, ``after[k]`` are (parameters, slots) around update k."""

    model: nn.Module
    before: list[tuple[Tensors, Slots]] = field(default_factory=list)
    after: list[tuple[Tensors, Slots]] = field(default_factory=list)
    coasted: list[tuple[Tensors, Slots]] = field(default_factory=list)
    """After update k, had its gradient been zero (detached)."""
    tick: list[tuple[Tensors, Slots] | None] = field(default_factory=list)
    """F(count) - F(count - 1) of update k (detached); None where nothing was counted yet."""
    starts: frozenset[int] = frozenset()
    """Updates whose optimizer was new."""

    @property
    def final(self) -> Tensors:
        """theta_K."""
        return self.after[-1][0]


def clipped(gradients: Tensors, max_norm: float | None) -> Tensors:
    """torch.nn.utils.clip_grad_norm_: g min(1, max_norm / (||g|| + 1e-6))."""
    if max_norm is None:
        return gradients
    norm = torch.cat([g.reshape(-1) for g in gradients.values()]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {n: g * factor for n, g in gradients.items()}


def behaviour_value(
    trace: Unrolled, function: Callable[[nn.Module, Any], Tensor], batch: Any
) -> Tensor:
    """gamma(theta_K), the mean of ``function(model, batch)`` in evaluation mode, with its graph."""
    training = trace.model.training
    trace.model.eval()
    gamma = function(_Bound(trace.model, trace.final), batch).mean()
    trace.model.train(training)
    return gamma


def unroll(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    rates: Sequence[float],
    rules: Mapping[int, Rule],
    *,
    clip_grad_norm: float | None = None,
    trained: Collection[str] | None = None,
) -> Unrolled:
    """Execute the run as one graph; ``rules[k]`` is the optimizer used from update ``k`` on.

    ``trained``: the parameters that optimizers hold (default all); the others keep the model's
    values.
    """
    theta: Tensors = {
        n: p.detach().clone().requires_grad_()
        for n, p in model.named_parameters()
        if trained is None or n in trained
    }
    slots: Slots = {}
    rule, count = rules[0], 0
    trace = Unrolled(model, starts=frozenset(rules))
    for k, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        if k in rules:
            rule, count = rules[k], 0
            slots = rule.fresh(theta)
        value = loss(_Bound(model, theta), batch)
        found = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        gradients = clipped(dict(zip(theta, found, strict=True)), clip_grad_norm)
        trace.before.append((theta, slots))
        with torch.no_grad():
            nothing = {n: torch.zeros_like(p) for n, p in theta.items()}
            trace.coasted.append(rule.update(theta, slots, nothing, rate, count))
            if rule.counts and count > 0:
                here, held = rule.update(theta, slots, gradients, rate, count)
                earlier, kept = rule.update(theta, slots, gradients, rate, count - 1)
                trace.tick.append(
                    (
                        {n: here[n] - earlier[n] for n in here},
                        {s: {n: held[s][n] - kept[s][n] for n in held[s]} for s in held},
                    )
                )
            else:
                trace.tick.append(None)
        theta, slots = rule.update(theta, slots, gradients, rate, count)
        # Copies are the cut: the derivative by a slot must not see the same update's step, which
        # was computed from that slot before it became state.
        theta = {n: p.clone() for n, p in theta.items()}
        slots = {slot: {n: v.clone() for n, v in held.items()} for slot, held in slots.items()}
        trace.after.append((theta, slots))
        count += 1
    return trace


def step_scores(
    trace: Unrolled,
    function: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    counterfactual: str = "skip",
) -> Tensor:
    """``score_t`` of every update on the mean of ``function(model, batch)``: float64 ``[K]``."""
    gamma = behaviour_value(trace, function, batch)
    leaves: list[Tensor] = []
    for theta, slots in trace.after:
        leaves += [*theta.values(), *(v for slot in slots.values() for v in slot.values())]
    found = iter(torch.autograd.grad(gamma, leaves, retain_graph=True, allow_unused=True))
    total = len(trace.after)
    scores = torch.zeros(total, dtype=torch.float64)
    counted = [0.0] * total  # < d gamma / d s_{k+1} , F(count_k) - F(count_k - 1) >
    for k, (theta, slots) in enumerate(trace.after):
        base, base_slots = trace.before[k] if counterfactual == "skip" else trace.coasted[k]
        tick = trace.tick[k]
        parts = [(theta, base, tick and tick[0])]
        parts += [(slots[s], base_slots[s], tick and tick[1][s]) for s in slots]
        for here, there, ticked in parts:
            for n, value in here.items():
                g = next(found)
                if g is None:  # a new optimizer forgets the slots of the last one
                    continue
                scores[k] += torch.sum(g * (value - there[n]).detach())
                if ticked is not None:
                    counted[k] += float(torch.sum(g * ticked[n]))
    if counterfactual == "skip":
        later = 0.0  # the sum of ``counted`` over the updates after t that share t's count
        for t in range(total - 1, -1, -1):
            scores[t] += later
            later = 0.0 if t in trace.starts else later + counted[t]
    return scores.detach()


def growths(trace: Unrolled, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """||d gamma / d theta_{t+1}|| / ||d gamma / d theta_K|| of every update: float64 ``[K]``."""
    gamma = behaviour_value(trace, function, batch)
    sizes = []
    for theta, _ in trace.after:
        found = torch.autograd.grad(gamma, list(theta.values()), retain_graph=True)
        sizes.append(torch.cat([g.reshape(-1) for g in found]).norm())
    return torch.stack(sizes) / sizes[-1]
