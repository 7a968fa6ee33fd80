"""Hessian products without the gradient by a weight: a ninth of their matrix products less.

H v is the gradient of <grad L, v>. A linear layer y = W x + b has its share in that by the
cotangent g of y alone,

    <dL/dW, V> + <dL/db, c> = <g, t>,  t = V x + c,      (V, c) the entries of v for (W, b),

so dL/dW = g x^T, which autograd would compute only to multiply it by V, need not be known; and by
the product rule the gradient of <g, t> is one backward pass from g and t, with t and g for
cotangents. A layer in the middle of a network then takes 8 matrix products (forward 1, g of x 1,
t 1, the last pass 5) where it took 9, the first one 3 where it took 4; convolutions likewise.

Inside of ``Apart`` such layers read their weights from leaves of their own. What is left of a
weight's gradient, by uses of other kinds (an embedding tied to the output, a penalty on weights),
is that by the leaf itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from culpa.dynamics.by_kernel import ARGUMENTS, CONVOLUTIONS, ByKernel, convolved
from culpa.tree import Tree

Made = TypeVar("Made")

_LINEAR: dict[Any, tuple[tuple[str, ...], str, str]] = {
    functional.linear: (("input", "weight", "bias"), "weight", "bias"),
    torch.addmm: (("input", "mat1", "mat2"), "mat2", "input"),
    **dict.fromkeys(CONVOLUTIONS, (ARGUMENTS, "weight", "bias")),
}
"""Linear layers: the names of their arguments, and which of them are weight and bias."""
_PASSES: tuple[Any, ...] = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
"""A loss that calls them asks for derivatives by the leaves itself."""


class _Layer(NamedTuple):
    """One call of a linear layer: its output's place in the graph, and t of a vector."""

    made: GradientEdge
    along: Callable[[Tree], Tensor]


class Apart(ByKernel):
    """Notes the linear layers that are called inside, and gives them weights of their own.

    Args:
        leaves: parameters, by name.
        whole: whether the gradient itself is wanted as well, by the weights too.

    Attributes:
        twins: by name, leaves in the memory of the given ones, which those layers used.
        layers: their calls.
        differentiated: whether the function inside took derivatives itself: none of this holds.
    """

    def __init__(self, leaves: Tree, whole: bool = False) -> None:
        super().__init__()
        self.twins: Tree = {}
        self.layers: list[_Layer] = []
        self.whole, self.differentiated = whole, False
        self._leaves = leaves
        self._names = {id(leaf): name for name, leaf in leaves.items() if not leaf.is_complex()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch passes here; few of them are ours."""
        if func in _LINEAR:
            names, weight, bias = _LINEAR[func]
            given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if id(given.get(weight)) in self._names and len(args) <= len(names):
                return self._called(func, given, weight, bias)
        elif func in _PASSES:
            self.differentiated = True
        return super().__torch_function__(func, types, args, kwargs)

    def _called(self, func: Any, given: Mapping[str, Any], weight: str, bias: str) -> Tensor:
        scaled = "beta" in given or "alpha" in given
        if scaled or torch.is_autocast_enabled(given[weight].device.type):
            return super().__torch_function__(func, (), (), given)
        names = {at: self._names.get(id(given.get(at))) for at in (weight, bias)}
        own = {at: self._twin(name) for at, name in names.items() if name is not None}
        ours = {**given, **own}
        by_kernel = None
        if func in CONVOLUTIONS:
            weights = "once" if self.whole else "never"
            by_kernel = convolved(dict(ours), CONVOLUTIONS[func], weights)
        out: Tensor = func(**ours) if by_kernel is None else by_kernel

        def along(v: Tree) -> Tensor:
            entries = {at: v[name] for at, name in names.items() if name is not None}
            if names[bias] is None and given.get(bias) is not None:
                entries[bias] = torch.zeros_like(given[bias])
            return func(**{**given, **entries})

        if out.requires_grad:
            self.layers.append(_Layer(get_gradient_edge(out), along))
        return out

    def _twin(self, name: str) -> Tensor:
        if name not in self.twins:
            self.twins[name] = self._leaves[name].detach().requires_grad_()
        return self.twins[name]


def apart(make: Callable[[], Made], leaves: Tree, whole: bool = False) -> tuple[Made, Apart]:
    """What ``make`` returns, with its linear layers apart if that can be; see ``Apart``."""
    mode = Apart(leaves, whole)
    try:
        with mode:
            made = make()
    except Exception:  # a loss that takes derivatives by the leaves finds none by these layers
        if not mode.differentiated:
            raise
    else:
        if not mode.differentiated:
            return made, mode
    with ByKernel():
        return make(), Apart(leaves, whole)


class Slopes:
    """The gradient of a value, to be multiplied by vectors and differentiated.

    Args:
        value: a scalar, made by ``apart`` from ``leaves``.
        mode: that came with it.

    Attributes:
        gradient: what it is by each leaf that the value depends on; of ``apart(whole=True)``.
    """

    def __init__(self, value: Tensor, leaves: Tree, mode: Apart) -> None:
        self._leaves, self._twins = leaves, mode.twins
        layers, twins = mode.layers, mode.twins if mode.whole else {}
        by: Any = [*(layer.made for layer in layers), *leaves.values(), *twins.values()]
        found: Any = torch.autograd.grad(value, by, create_graph=True, allow_unused=True)
        split = len(layers), len(layers) + len(leaves)
        made, plain, own = found[: split[0]], found[split[0] : split[1]], found[split[1] :]
        self.gradient: Tree = {}
        if mode.whole:
            parts = [*zip(leaves, plain, strict=True), *zip(twins, own, strict=True)]
            for name, part in parts:
                if part is not None:
                    known = self.gradient.get(name)
                    self.gradient[name] = part.detach() if known is None else known + part.detach()
        self._layers = [(g, a.along) for g, a in zip(made, layers, strict=True) if g is not None]
        self._plain = [(g, name) for g, name in zip(plain, leaves, strict=True) if g is not None]

    def pull(
        self,
        v: Tree | None,
        further: Sequence[tuple[Tensor, Tensor]] = (),
        by: Tree | None = None,
        *,
        retain: bool = True,
    ) -> Tree:
        """The gradient of <grad value, v>, and of <a, b> for each (a, b) of ``further``.

        Args:
            v: like the leaves; ``None``: only what is further.
            further: functions of the same leaves, and their cotangents.
            by: differentiated by as well.
            retain: whether this is called again.
        """
        pairs = [*further]
        if v is not None:
            pairs += [(g, v[name]) for g, name in self._plain]
            for g, along in self._layers:
                t = along(v)
                pairs += [(g, t.detach()), (t, g.detach())]
        pairs = [(a, b) for a, b in pairs if a.requires_grad]
        wrt = {**self._leaves, **(by or {})}
        if not pairs:
            return {name: torch.zeros_like(leaf) for name, leaf in wrt.items()}
        found: Any = torch.autograd.grad(
            [a for a, _ in pairs],
            [*wrt.values(), *self._twins.values()],
            [b for _, b in pairs],
            retain_graph=retain,
            allow_unused=True,
        )
        pulled = dict(zip(wrt, found, strict=False))
        for name, more in zip(self._twins, found[len(wrt) :], strict=True):
            own = pulled[name]
            pulled[name] = own if more is None else more if own is None else own + more
        return {n: torch.zeros_like(wrt[n]) if p is None else p for n, p in pulled.items()}
