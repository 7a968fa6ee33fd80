"""The update rule of any optimizer class, by running its own ``step`` on one parameter.

The map is (theta, slots, gradient) -> (theta', slots'). ``step`` is the class's step as it is, on
copies; its derivative is autograd's (through.py), so that it is exact for elementwise steps and for
those that mix a parameter's coordinates (Muon, Adafactor), and free for steps that torch gained
yesterday or a user wrote. What it cannot see is a coupling of parameters inside the optimizer (a
norm over all of them): then the modelled step is not the recorded one, which ``mismatch`` tells.

Clocks. A 0-dim slot that no gradient enters (``step``, NAdam's ``mu_product``, ASGD's ``eta``) is a
number the class may read with ``.item()``. Its column is a difference of two runs: for a counter
(each update adds one) to the value one update earlier, as in ``adam.py``; for others, central.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from culpa.dynamics.updates.rule import TensorSlots
from culpa.dynamics.updates.through import Through, in_place_allowed
from culpa.trajectory.optimizers import as_kept, as_tensor, build

THETA, GRADIENT = "", "gradient of the parameter"
"""Their keys beside the slots'; no slot is called so."""
_PLAIN = {"foreach": False, "fused": False, "capturable": False}
_CLOCK_STEP = 1e-4
"""Relative step of the differences by clocks, taken in float64."""


def _prepared(
    found: type[Optimizer], param: Tensor, hyper: Mapping[str, Any], *, differentiable: bool
) -> Optimizer:
    """A new optimizer of ``param`` alone."""
    plain = {**hyper, **{key: value for key, value in _PLAIN.items() if key in hyper}}
    if "differentiable" in hyper:
        plain["differentiable"] = differentiable
    optimizer = build(found, [{"params": [param], **plain}])
    # Some classes read these from their defaults.
    optimizer.defaults.update({k: v for k, v in plain.items() if k in optimizer.defaults})
    return optimizer


def _read(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The slots as the class left them, numbers as tensors."""
    state = optimizer.state.get(param, {})
    kept = (as_tensor(s, v, type(optimizer).__name__) for s, v in state.items() if v is not None)
    return dict(kept)


def run(
    found: type[Optimizer],
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
    through: Through | None = None,
) -> dict[str, Tensor]:
    """theta' (under ``THETA``) and the new slots.

    Without ``through`` the class's step as it is. With it, what goes in may require gradients, and
    what comes out carries them.
    """
    recording = through is not None and through.recording
    theta = param.detach().clone()
    optimizer = _prepared(found, theta, hyper, differentiable=recording)
    with torch.set_grad_enabled(recording):
        if recording:
            # The very tensor that the optimizer holds becomes a function of ``param``.
            theta.copy_(param)
            theta.retain_grad()
        theta.grad = grad.clone()
        for slot, value in slots.items():
            key, kept = as_kept(slot, value)
            optimizer.state[theta][key] = kept.clone() if isinstance(kept, Tensor) else kept
    if through is None:
        optimizer.step()
    else:
        with through, in_place_allowed():
            optimizer.step()
    return {THETA: theta, **_read(optimizer, theta)}


def step(
    found: type[Optimizer],
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update by the class itself: the increment and the new slots."""
    after = run(found, param, grad, slots, hyper)
    return after.pop(THETA).detach() - param, {s: v.detach() for s, v in after.items()}


@dataclass(frozen=True)
class _Linearised:
    """One update as a graph of autograd, and a column for every clock."""

    inputs: dict[str, Tensor]  # THETA, "grad" and slots: leaves, of which the outputs are functions
    outputs: dict[str, Tensor]  # THETA and slots
    columns: dict[str, dict[str, Tensor]]  # clock -> what one unit of it adds to each output

    def _pull(self, cotangents: Mapping[str, Tensor], create_graph: bool) -> dict[str, Tensor]:
        """Cotangents of the inputs."""
        named = [n for n in cotangents if n in self.outputs and self.outputs[n].requires_grad]
        found = torch.autograd.grad(
            [self.outputs[n] for n in named],
            list(self.inputs.values()),
            [cotangents[n].to(self.outputs[n].dtype) for n in named],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self.inputs, found, strict=True))

    def pullback(
        self, cotangent: Tensor, slots: TensorSlots
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """See ``Linearised``; one backward pass through the step."""
        after = {THETA: cotangent, **slots}
        found = self._pull(after, create_graph=False)
        theta, gradient = found.pop(THETA), found.pop(GRADIENT)
        before = {s: v for s, v in slots.items() if s not in self.outputs}
        before |= found
        for clock, column in self.columns.items():
            parts = [(column[n] * after[n]).sum() for n in column if n in after]
            if parts:
                before[clock] = torch.stack(parts).sum()
        return theta, before, gradient

    def pushforward(
        self, tangent: Tensor, slots: TensorSlots, grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Linearised``: the pullback's transpose, by differentiating it once more."""
        moving = {n: v for n, v in self.outputs.items() if v.requires_grad}
        probes = {n: torch.zeros_like(v, requires_grad=True) for n, v in moving.items()}
        with torch.enable_grad():
            pulled = self._pull(probes, create_graph=True)
        tangents = {THETA: tangent, GRADIENT: grad, **slots}
        used = [n for n in pulled if n in tangents and pulled[n].requires_grad]
        pushed = torch.autograd.grad(
            [pulled[n] for n in used],
            list(probes.values()),
            [tangents[n].to(pulled[n].dtype) for n in used],
            allow_unused=True,
            materialize_grads=True,
        )
        after = {s: v for s, v in slots.items() if s not in self.outputs}
        after |= dict(zip(probes, pushed, strict=True))
        for clock, column in self.columns.items():
            if clock in slots:
                for name, value in column.items():
                    moved = value * slots[clock]
                    after[name] = after[name] + moved if name in after else moved
        return after.pop(THETA), after


def linearise(
    found: type[Optimizer],
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
) -> _Linearised:
    """The derivative of the step there. Cost: one recorded step and, per clock, one or two more."""
    inputs: dict[str, Tensor] = {THETA: param, GRADIENT: grad}
    inputs |= {s: v for s, v in slots.items() if v.ndim > 0 and v.is_floating_point()}
    inputs, outputs = _recorded(found, inputs, slots, hyper)
    entered = [
        s
        for s, v in outputs.items()
        if s in slots and s not in inputs and v.requires_grad and slots[s].is_floating_point()
    ]
    if entered:  # 0-dim slots that a gradient enters are no clocks
        inputs |= {s: slots[s] for s in entered}
        inputs, outputs = _recorded(found, inputs, slots, hyper)
    columns = {
        s: _column(found, param, grad, slots, hyper, s, float(outputs[s]))
        for s in slots
        if s not in inputs and s in outputs and slots[s].ndim == 0
    }
    return _Linearised(inputs, outputs, columns)


def _recorded(
    found: type[Optimizer],
    inputs: Mapping[str, Tensor],
    slots: TensorSlots,
    hyper: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves for the inputs, and the outputs as functions of them."""
    leaves = {n: v.detach().clone().requires_grad_() for n, v in inputs.items()}
    state = {s: leaves.get(s, v) for s, v in slots.items()}
    return leaves, run(found, leaves[THETA], leaves[GRADIENT], state, hyper, Through())


def _column(
    found: type[Optimizer],
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
    clock: str,
    after: float,
) -> dict[str, Tensor]:
    """What one unit of a clock adds to every output, by a difference in float64."""
    exact = {s: v.double() if v.is_floating_point() else v for s, v in slots.items()}
    now = float(slots[clock])

    def at(value: float) -> dict[str, Tensor]:
        there = {**exact, clock: torch.full_like(exact[clock], value)}
        through = Through(recording=False)
        return run(found, param.double(), grad.double(), there, hyper, through)

    if after == now + 1:
        # At 0 there is no earlier update that could be missing: it only counts on.
        if now < 1:
            return {clock: param.new_ones(())}
        above, below, width = at(now), at(now - 1), 1.0
    elif not slots[clock].is_floating_point():
        return {}
    else:
        size = _CLOCK_STEP * max(abs(now), 1e-3)
        above, below, width = at(now + size), at(now - size), 2 * size
    changed = {n: (above[n].double() - below[n].double()) / width for n in above if n in below}
    return {n: d.to(param.dtype) for n, d in changed.items() if bool((d != 0).any())}


def extend(
    found: type[Optimizer], param: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]
) -> dict[str, Tensor]:
    """``slots``, or what the class sets them to before the first update: not always zeros."""
    if slots:
        return {s: v.to(param.device) for s, v in slots.items()}
    theta = param.detach().clone()
    optimizer = _prepared(found, theta, hyper, differentiable=False)
    theta.grad = torch.zeros_like(theta)
    first = _FirstSight(optimizer, theta)
    with first:
        optimizer.step()
    first.look()
    return first.seen


class _FirstSight(TorchFunctionMode):
    """Copies every slot as it is when it is first seen, before any torch call could change it."""

    def __init__(self, optimizer: Optimizer, param: Tensor) -> None:
        super().__init__()
        self.optimizer, self.param = optimizer, param
        self.seen: dict[str, Tensor] = {}
        self.look()

    def look(self) -> None:
        """Note what is new."""
        for slot, value in _read(self.optimizer, self.param).items():
            if slot not in self.seen:
                # Counts in plain numbers change unseen; they begin at zero.
                fresh = torch.zeros_like if value.dtype is torch.int64 else torch.clone
                self.seen[slot] = fresh(value.detach())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One call of torch, unchanged."""
        self.look()
        return func(*args, **(kwargs or {}))


def singular(
    found: type[Optimizer],
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
    new_slots: TensorSlots,
) -> int:
    """Roots that the step takes at 0, where their derivative was defined as 0."""
    through = Through(recording=False)
    run(found, param, grad, slots, hyper, through)
    return through.singular
