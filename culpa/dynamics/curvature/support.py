"""Which strategies for Hessian products a model supports, found out on one of its updates.

A derivative may be missing, which raises, or be wrong in silence: a custom autograd function may
have a backward that is not differentiable itself, and torch's own forward-mode formulas of some
normalisation layers cannot be differentiated again. So every strategy is also compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from culpa import tree
from culpa.dynamics.curvature import hessian
from culpa.dynamics.local import LocalLoss
from culpa.errors import CulpaError
from culpa.trajectory.ranks.gathered import Gather
from culpa.tree import Tree

Products = Callable[[LocalLoss, Sequence[Tree]], list[Tree]]
"""(local, vectors) -> a matrix times each."""
EQUAL = 1e-2
"""Relative difference up to which two products are the same, in float32 as well."""
KINKED = (
    *("Relu", "LeakyRelu", "Prelu", "Rrelu", "Threshold", "Hard", "Softshrink", "Abs", "L1Loss"),
    *("MaxPool", "AdaptiveMaxPool", "Max", "Min", "Amax", "Amin", "Clamp", "Clip", "Median"),
    *("Topk", "Sort", "Kthvalue", "FractionalMaxPool"),
)
"""Operations whose derivative jumps, as their nodes in autograd's graph begin. Differences across a
jump are wrong by jump over step, at the updates where one happens to be crossed."""
CONTRADICTED = 0.1
"""Relative difference from finite differences, which have an error of their own, that tells."""


@dataclass
class Support:
    """What one update says of each strategy: its product, or why it has none."""

    products: dict[str, Tree] = field(default_factory=dict[str, Tree])
    refused: dict[str, str] = field(default_factory=dict[str, str])


def examine(local: LocalLoss, strategies: Iterable[str], vector: Tree) -> Support:
    """Try each strategy on one vector, and compare.

    The judge is reverse-over-reverse, whose formulas torch tests for its own operations; where it
    fails, or where a custom autograd function is in the graph, central differences, if two steps
    of them agree (on models with kinks they do not, and then nothing is judged).

    Cost: the strategies' own, 2.5 gradients for the judge or 4 for the differences.
    """
    found = Support()

    def attempt(strategy: str) -> Tree | None:
        if strategy not in found.products and strategy not in found.refused:
            product, reason = tried(
                lambda: hessian.products(local, local.params, [vector], strategy)
            )
            if product is None:
                found.refused[strategy] = reason
            elif not tree.is_finite(product[0]):
                found.refused[strategy] = "its products are not finite"
            else:
                found.products[strategy] = product[0]
        return found.products.get(strategy)

    wanted = list(strategies)
    for strategy in wanted:
        attempt(strategy)
    custom = custom_functions(local)
    judge, allowed = ("reverse-over-reverse", EQUAL) if not custom else ("", CONTRADICTED)
    truth = attempt(judge) if judge else None
    if truth is None:
        judge, allowed, truth = "finite-difference", CONTRADICTED, consistent(local, vector)
    for strategy, product in list(found.products.items()):
        gap = difference(product, truth) if truth is not None else 0.0
        if gap > allowed and strategy in hessian.EXACT and strategy != judge:
            source = f" ({', '.join(custom)} cannot be differentiated twice)" if custom else ""
            del found.products[strategy]
            found.refused[strategy] = f"its products are {gap:.0%} off those by {judge}{source}"
    return found


def tried(attempt: Callable[[], Any]) -> tuple[Any, str]:
    """What an attempt returns, or ``None`` and the first line of why it failed."""
    try:
        return attempt(), ""
    except torch.OutOfMemoryError:
        raise
    except (CulpaError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        cause = error.__cause__ or error
        return None, str(cause).strip().partition("\n")[0] or type(cause).__name__


def not_symmetric(local: LocalLoss, products: Products, vector: Tree) -> str:
    """Says so where a custom function makes products with a symmetric matrix asymmetric; else "".

    A forward-mode product by two reverse passes, as in Gauss-Newton's J v, is wrong in silence
    where a custom backward is not linear in its argument as autograd sees it.
    """
    custom = custom_functions(local)
    if not custom:
        return ""
    generator = torch.Generator().manual_seed(0)
    other = {n: torch.randn(v.shape, generator=generator).to(v) for n, v in vector.items()}
    other = tree.scale(tree.norm(vector) / tree.norm(other), other)
    left, right = products(local, [vector, other])
    one, two = tree.dot(other, left), tree.dot(vector, right)
    if abs(one - two) > CONTRADICTED * max(abs(one), abs(two)):
        return f"its products are not symmetric: {', '.join(custom)} cannot be differentiated twice"
    return ""


def consistent(local: LocalLoss, vector: Tree) -> Tree | None:
    """The product by central differences if two steps agree on it; else ``None``. 4 gradients."""
    steps = (hessian.RELATIVE_STEP, 2 * hessian.RELATIVE_STEP)
    fine, coarse = (
        hessian.central_differences(local, local.params, [vector], step)[0] for step in steps
    )
    return fine if difference(coarse, fine) <= EQUAL else None


def difference(found: Tree, truth: Tree) -> float:
    """||found - truth|| / ||truth||; infinite for something against nothing."""
    size, gap = tree.norm(truth), tree.norm(tree.subtract(found, truth))
    if size > 0.0 and math.isfinite(gap / size):
        return gap / size
    return 0.0 if gap == size == 0.0 else float("inf")


def overruled(found: Tree, fine: Tree, coarse: Tree) -> bool:
    """Whether differences at a step and at twice the step agree, and ``found`` is far from them.

    Their error is a third of their distance, or roundoff of that size.
    """
    apart = difference(coarse, fine)
    return apart <= EQUAL and difference(found, fine) > 1e-3 + 2.0 * apart


def worst(found: Sequence[Tree], truth: Sequence[Tree]) -> float:
    """The largest ``difference`` of several products."""
    return max((difference(f, t) for f, t in zip(found, truth, strict=True)), default=0.0)


def custom_functions(local: LocalLoss) -> list[str]:
    """The custom ``torch.autograd.Function`` classes that the loss goes through, by name."""
    custom: Any = torch.autograd.function.BackwardCFunction
    nodes = (n for n in _nodes(local) if isinstance(n, custom))
    return _named(n for n in nodes if n._forward_cls is not Gather)  # it is differentiable twice


def kinks(local: LocalLoss) -> list[str]:
    """The operations of ``KINKED`` that the loss goes through, by name. Cost: a forward pass."""
    return _named(n for n in _nodes(local) if type(n).__name__.startswith(KINKED))


def _named(nodes: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(type(n).__name__.partition("Backward")[0] for n in nodes))


def _nodes(local: LocalLoss) -> Iterator[Any]:
    """The graph of the loss."""
    leaves = {name: p.detach().requires_grad_() for name, p in local.params.items()}
    with torch.enable_grad():
        root: Any = local.value(leaves).grad_fn
    seen: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)
