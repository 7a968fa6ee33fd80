"""The loss of one observed update as a function of the parameters alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from culpa.errors import UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import batches, rng
from culpa.trajectory.engine import set_modes
from culpa.trajectory.walk import Transition
from culpa.tree import Tree


class LocalLoss:
    """L(theta; B_k), with the batch, weights, modes and random draws of update k held fixed.

    ``params`` are the parameters theta_k that had a gradient; products and differences are over
    exactly those.
    """

    def __init__(self, problem: Problem, transition: Transition) -> None:
        self.problem = problem
        self.transition = transition
        self.grads = transition.grads
        self.params: Tree = {name: transition.before.params[name] for name in transition.grads}

    def value(self, params: Tree) -> Tensor:
        """The loss of the whole update, weighted over its micro-batches; differentiable."""
        losses = [
            weight * self.problem.loss_at(self._all(params), self.transition.before.buffers, batch)
            for weight, batch in self._micro_batches()
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def example_values(self, params: Tree) -> Tensor:
        """The share of every example in the update's loss, ``[examples]``; sums to ``value``."""
        shares: list[Tensor] = []
        for weight, batch in self._micro_batches():
            buffers = self.transition.before.buffers
            losses = self.problem.example_losses_at(self._all(params), buffers, batch)
            shares.append(losses * (weight / losses.shape[0]))
        return torch.cat(shares)

    def gradient(self, params: Tree) -> Tree:
        """The gradient at ``params``, without a graph."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            found = torch.autograd.grad(
                self.value(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return dict(zip(leaves, found, strict=True))

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

    def on_rows(self, rows: Sequence[Sequence[int]]) -> LocalLoss:
        """The same loss on some rows of each micro-batch."""
        chosen = [
            batches.take_rows(batch, torch.tensor(index))
            for batch, index in zip(self.transition.batches, rows, strict=True)
        ]
        return LocalLoss(self.problem, replace(self.transition, batches=chosen))

    def around(self, params: Tree) -> LocalLoss:
        """The same loss with other values for the parameters that a call leaves out."""
        before = self.transition.before
        moved = replace(before, params=before.params | params)
        return LocalLoss(self.problem, replace(self.transition, before=moved))

    def _all(self, params: Tree) -> Tree:
        return self.transition.before.params | params

    def _micro_batches(self) -> Iterator[tuple[float, object]]:
        """Weight and batch of each micro-batch, its random numbers about to be drawn again."""
        record, batches = self.transition.record, self.transition.batches
        set_modes(self.problem.model, record.evaluating)
        weights = record.weights or (1 / len(batches),) * len(batches)
        for at, (weight, batch) in enumerate(zip(weights, batches, strict=True)):
            if self.transition.randoms:
                rng.restore(self.transition.randoms[at])
            yield weight, batch


@contextmanager
def differentiable_twice() -> Generator[None]:
    """Attention kernels that have second and forward-mode derivatives, for the time inside.

    The default scaled-dot-product kernels and the fast path of ``nn.MultiheadAttention`` have
    neither, on the CPU too.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
