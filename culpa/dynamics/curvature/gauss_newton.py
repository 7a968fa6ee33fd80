"""Products with the Gauss-Newton matrix G = J^T H_out J of one update's loss.

J is the derivative of the model's outputs, H_out the Hessian of the loss as a function of them. For
a loss that is convex in the outputs (cross-entropy, squared error) G is positive semi-definite: a
sweep with it cannot blow up along directions of negative curvature, as the Hessian's can.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.shares import over_ranks
from culpa.errors import UnsupportedError
from culpa.tree import Tree


def products(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """``products_alone``, shared by the ranks of ``across_ranks``."""
    return over_ranks(local, lambda part: products_alone(part, at, vectors), [at for _ in vectors])


def products_alone(local: LocalLoss, at: Tree, vectors: Sequence[Tree]) -> list[Tree]:
    """G v for each vector, with G at the parameters ``at``: about 1 + 2 Q gradients.

    J v is the derivative of u -> J^T u applied to v (two reverse passes, no forward mode needed).

    Raises:
        UnsupportedError: if the loss does not depend on the parameters through a tensor that the
            model returns.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in at.items()}
    inputs = list(leaves.values())
    with torch.enable_grad(), differentiable_twice(), _outputs(local.problem.model) as outputs:
        loss = local.value(leaves)
        outs = [out for out in outputs if out.requires_grad]
        if not outs:
            raise UnsupportedError(
                "Gauss-Newton products need a model whose forward returns the tensor (or an object "
                "with .logits) that the loss is computed from. Use culpa.Exact()."
            )
        slopes = torch.autograd.grad(
            loss, outs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        probes = [torch.zeros_like(out, requires_grad=True) for out in outs]
        pulled = torch.autograd.grad(
            outs, inputs, probes, create_graph=True, allow_unused=True, materialize_grads=True
        )
        found: list[Tree] = []
        for v in vectors:
            pushed = _grad(pulled, probes, [v[name] for name in leaves])  # J v
            bent = _grad(slopes, outs, pushed)  # H_out J v
            total = torch.autograd.grad(
                outs, inputs, bent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append({n: t.detach() for n, t in zip(leaves, total, strict=True)})
    return found


def _grad(of: Sequence[Tensor], wrt: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """sum_i <of_i, weights_i> differentiated; zero where nothing depends on ``wrt``."""
    pairs = [(o, w) for o, w in zip(of, weights, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(w) for w in wrt]
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs],
            list(wrt),
            [w for _, w in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


@contextmanager
def _outputs(model: nn.Module) -> Generator[list[Tensor]]:
    """Collects what the model returns in every call made inside."""
    collected: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        value = getattr(output, "logits", output)
        collected.extend([value] if isinstance(value, Tensor) else [])

    handle = model.register_forward_hook(note)
    try:
        yield collected
    finally:
        handle.remove()
