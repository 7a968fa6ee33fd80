"""The loss of one observed update as a function of the parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from culpa import tree
from culpa.dynamics.by_kernel import ByKernel
from culpa.dynamics.curvature.kept import Graph
from culpa.dynamics.shares import decide, over_ranks
from culpa.errors import UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import batches, rng
from culpa.trajectory.engine import set_modes
from culpa.trajectory.ranks.precision import computed, precision_of
from culpa.trajectory.walk import Transition
from culpa.tree import Tree

Made = TypeVar("Made")


class LocalLoss:
    """L(theta; B_k), with the batch, weights, modes and random draws of update k held fixed.

    ``params`` are the parameters of theta_k in which a counterfactual may differ: those that had a
    gradient first, then those that stood still but trained before. Products and differences are
    over exactly those. ``observed``: whether ``grads`` is the gradient at ``params``, as it is but
    for ``on_rows`` and ``around``.
    """

    def __init__(self, problem: Problem, transition: Transition, observed: bool = True) -> None:
        precision = precision_of(transition.record.optimizer.reduction)
        self.problem = computed(problem.of(transition.record.stage), precision)
        self.transition = transition
        self.observed = observed and not transition.rounded
        self.grads = transition.grads
        self.graph: Graph | None = transition.graph if self.observed else None
        for name, grad in self.grads.items():
            if grad.layout is not torch.strided:
                raise UnsupportedError(
                    f"update {transition.index} has a sparse gradient by {name}, which no sweep"
                    " carries. Build the layer with sparse=False; culpa.replay works as it is."
                )
        before = transition.before.params
        still = [
            n
            for n, value in before.items()
            if n not in self.grads
            and n not in transition.untouched
            and value.is_floating_point()  # integers have no derivative, and stand still for ever
        ]
        self.params: Tree = {name: before[name] for name in (*self.grads, *still)}
        self.by_rows: bool | None = None  # whether ranks may split it by rows; None: not known
        self._kept: dict[Hashable, Any] = {}
        self._away: tuple[Tree, Tree] | None = None

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, made at the first call: what several stages need of one update."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def away(self, displacement: Tree) -> Tree:
        """theta_k - D: computed once for one dictionary, which propagator and optimizer share.

        Valid until the next dictionary: stages take turns in one piece of memory, which stays in
        the processor's cache.
        """
        if self._away is None:
            self._away = displacement, tree.subtract(self.params, displacement)
        elif self._away[0] is not displacement:
            there = self._away[1]
            for name, value in self.params.items():
                torch.sub(value, displacement[name], out=there[name])
            self._away = displacement, there
        return self._away[1]

    def moving(self, whole: Tree) -> Tree:
        """The part of a tree that this update's optimizer sees: of parameters with a gradient."""
        return {name: whole[name] for name in self.grads}

    def spread(self, vector: Tree) -> Tree:
        """A vector with an entry for every one of ``params``, zero where it has none."""
        return {
            n: vector[n] if n in vector else torch.zeros_like(p) for n, p in self.params.items()
        }

    def value(self, params: Tree) -> Tensor:
        """The loss of the whole update, weighted over its micro-batches; differentiable."""
        everything, buffers = self.everything(params), self.transition.before.buffers
        losses = [
            weight * self.problem.loss_at(everything, buffers, batch)
            for weight, batch in self.micro_batches()
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def part(self, params: Tree, buffers: Tree, batch: object, at: int) -> Tensor:
        """The loss of micro-batch ``at``; modules read and write the very tensors ``buffers``."""
        return self.problem.call_in(self.problem.loss, self.everything(params), buffers, batch)

    def example_values(self, params: Tree) -> Tensor:
        """The share of every example in the update's loss, ``[examples]``; sums to ``value``."""
        shares: list[Tensor] = []
        for weight, batch in self.micro_batches():
            buffers = self.transition.before.buffers
            losses = self.problem.example_losses_at(self.everything(params), buffers, batch)
            shares.append(losses * (weight / losses.shape[0]))
        return torch.cat(shares)

    def gradient(self, params: Tree) -> Tree:
        """The gradient at ``params``, without a graph."""
        return over_ranks(self, lambda part: [part.whole_gradient(params)], [params])[0]

    def whole_gradient(self, params: Tree) -> Tree:
        """``gradient``, by this process alone; memory: that of one micro-batch."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            found = [
                torch.autograd.grad(
                    part.value(leaves),
                    list(leaves.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
                for part in self.parts()
            ]
        return reduce(tree.add, (dict(zip(leaves, grads, strict=True)) for grads in found))

    def parts(self) -> list[LocalLoss]:
        """The share of every micro-batch as a loss of its own: they sum to this one."""
        transition = self.transition
        count = len(transition.batches)
        if count == 1:
            return [self]
        weights = transition.record.weights or (1 / count,) * count
        return [
            self.of(
                replace(
                    transition,
                    record=msgspec.structs.replace(transition.record, weights=(weight,)),
                    batches=[batch],
                    randoms=transition.randoms[at : at + 1],
                )
            )
            for at, (weight, batch) in enumerate(zip(weights, transition.batches, strict=True))
        ]

    def row_counts(self) -> list[int]:
        """The number of rows of each micro-batch.

        Raises:
            UnsupportedError: if a micro-batch is not a set of tensors with one row an example.
        """
        counts = [batches.row_count(batch) for batch in self.transition.batches]
        if 0 in counts:
            raise UnsupportedError(
                f"the batch of update {self.transition.index} has no common first dimension, so a "
                "fraction of it means nothing. Use Secant(1) or a Hessian propagator."
            )
        return counts

    @property
    def batches_a_rank(self) -> int:
        """The micro-batches of each of the ranks that made the update together."""
        reduction = self.transition.record.optimizer.reduction
        return len(self.transition.batches) // (1 if reduction is None else reduction.ranks)

    @property
    def normalises_by_batch(self) -> bool:
        """Whether a BatchNorm layer of the model was in training mode at this update."""
        evaluating = frozenset(self.transition.record.evaluating)
        return any(
            isinstance(module, _BatchNorm) and name not in evaluating
            for name, module in self.problem.model.named_modules()
        )

    def on_rows(self, rows: Sequence[Sequence[int]]) -> LocalLoss:
        """The same loss on some rows of each micro-batch."""
        decide(self)
        chosen = [
            batches.take_rows(batch, torch.tensor(index))
            for batch, index in zip(self.transition.batches, rows, strict=True)
        ]
        return self.of(replace(self.transition, batches=chosen))

    def of(self, transition: Transition) -> LocalLoss:
        """The same loss on another transition, of whose gradient nothing is known."""
        there = LocalLoss(self.problem, transition, False)
        there.by_rows = self.by_rows
        return there

    def around(self, params: Tree) -> LocalLoss:
        """The same loss with other values for the parameters that a call leaves out."""
        decide(self)
        before = self.transition.before
        moved = replace(before, params=before.params | params)
        return self.of(replace(self.transition, before=moved))

    def with_buffers(self, buffers: Tree) -> LocalLoss:
        """The same update from other buffers, its gradient computed there: one gradient."""
        decide(self)
        before = replace(self.transition.before, buffers=self.transition.before.buffers | buffers)
        there = self.of(replace(self.transition, before=before))
        grads = there.moving(there.gradient(there.params))
        return LocalLoss(self.problem, replace(there.transition, grads=grads, graph=None))

    def everything(self, params: Tree) -> Tree:
        """All parameters of the state, with ``params`` in place of the observed ones."""
        return self.transition.before.params | params

    def micro_batches(self) -> Iterator[tuple[float, object]]:
        """Weight and batch of each micro-batch, its random numbers about to be drawn again."""
        record, batches = self.transition.record, self.transition.batches
        set_modes(self.problem.model, record.evaluating)
        weights = record.weights or (1 / len(batches),) * len(batches)
        for at, (weight, batch) in enumerate(zip(weights, batches, strict=True)):
            if self.transition.randoms:
                rng.restore(self.transition.randoms[at])
            yield weight, batch


@contextmanager
def reversible_twice() -> Generator[None]:
    """``differentiable_twice`` in reverse mode only, in which some layers are quicker."""
    with differentiable_twice(), ByKernel():
        yield


@contextmanager
def differentiable_twice() -> Generator[None]:
    """Attention kernels that have second and forward-mode derivatives, for the time inside.

    The default scaled-dot-product kernels and the fast path of ``nn.MultiheadAttention`` have
    neither, on the CPU too.
    """
    # What sdpa_kernel(SDPBackend.MATH) does, in a fifth of its time, twice an update.
    before = [enabled() for enabled, _ in _KERNELS]
    fast = torch.backends.mha.get_fastpath_enabled()
    for at, (_, enable) in enumerate(_KERNELS):
        enable(at == 0)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        for was, (_, enable) in zip(before, _KERNELS, strict=True):
            enable(was)
        torch.backends.mha.set_fastpath_enabled(fast)


_KERNELS = (
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
"""Of attention, on any device: is it allowed, and how that is set. The plain one comes first."""
