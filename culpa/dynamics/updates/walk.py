"""An optimizer's update of a whole model, its pullback and its pushforward, tensor by tensor.

The state is (theta, slots), the map is F: (theta_k, slots_k, grads) -> (theta_{k+1}, slots_{k+1})
at fixed hyperparameters. The gradient is an argument: the caller chains it with the curvature.
Only parameters that are in a group AND have a gradient move, as in ``torch.optim``; for all others
F is the identity, and so is its derivative.

Everything is computed in the dtypes given, so half-precision states are to be promoted first.
Nothing is changed in place; results may share memory with arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from culpa.dynamics.updates.rule import Rule
from culpa.errors import OptionError, UnsupportedError
from culpa.trajectory.schema import Group
from culpa.tree import Slots, Tree

_SlotsLike = Mapping[str, Mapping[str, Tensor]]


def _moved(
    rule: Rule, groups: Sequence[Group], params: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, hyperparameters) of every parameter that the update moves."""
    for group in groups:
        hyper = {**rule.defaults, **group.hyper}
        for name in group.names:
            if name not in grads:
                continue
            if grads[name].layout is not torch.strided or params[name].is_complex():
                raise UnsupportedError(
                    f"the update of {name!r} has a {grads[name].layout} gradient and a "
                    f"{params[name].dtype} parameter; {rule.name} is modelled for dense gradients "
                    "and real parameters only. culpa.replay works on such a run."
                )
            yield name, hyper


def _of(slots: _SlotsLike, name: str) -> dict[str, Tensor]:
    """The slots of one parameter."""
    return {slot: tree[name] for slot, tree in slots.items() if name in tree}


def _put(slots: Slots, name: str, values: Mapping[str, Tensor]) -> None:
    """Replace the slots of one parameter; what ``values`` does not name is zero from here on."""
    for slot, tree in slots.items():
        if slot not in values:
            tree.pop(name, None)
    for slot, value in values.items():
        slots.setdefault(slot, {})[name] = value


def _copy(slots: _SlotsLike) -> Slots:
    """New dictionaries around the same tensors."""
    return {slot: dict(tree) for slot, tree in slots.items()}


def apply(
    rule: Rule,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    grads: Mapping[str, Tensor],
) -> tuple[Tree, Slots]:
    """The increments theta_{k+1} - theta_k, and slots_{k+1}.

    Parameters without a gradient are absent from the increments and keep their slots (the same
    tensors).

    Raises:
        UnsupportedError: a sparse gradient or a complex parameter.
    """
    increments: Tree = {}
    after = _copy(slots)
    for name, hyper in _moved(rule, groups, params, grads):
        increments[name], new = rule.step(params[name], grads[name], _of(slots, name), hyper)
        _put(after, name, new)
    return increments, after


def pullback(
    rule: Rule,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    grads: Mapping[str, Tensor],
    cotangent_params: Sequence[Mapping[str, Tensor]],
    cotangent_slots: Sequence[_SlotsLike],
) -> list[tuple[Tree, Slots, Tree]]:
    """For each of Q cotangents of (theta_{k+1}, slots_{k+1}): those of (theta_k, slots_k, grads).

    Args:
        rule, groups, params, slots, grads: the observed update, as for ``apply``.
        cotangent_params: Q trees like ``params``; a missing name is a zero.
        cotangent_slots: Q slots like ``slots``, 0-dim for ``step`` and ``started``; missing is 0.

    Returns:
        Q triples. The cotangent of theta_k includes the identity part of theta + increment;
        ``grads`` has the names that moved. ``slots["step"]`` (Adam) and ``slots["started"]`` (SGD
        with dampening) hold the backward-difference columns, so that the score of an update is the
        inner product with the displacement of the slots as ``extend`` returns them.

    Cost: the coefficients once, then some ten passes over the parameters for each cotangent.
    """
    if len(cotangent_params) != len(cotangent_slots):
        raise OptionError(
            f"got {len(cotangent_params)} cotangents of the parameters and "
            f"{len(cotangent_slots)} of the slots; give one of each per behaviour "
            "(an empty dict where the slots have none)."
        )
    results: list[tuple[Tree, Slots, Tree]] = [
        (dict(theta), _copy(state), {})
        for theta, state in zip(cotangent_params, cotangent_slots, strict=True)
    ]
    for name, hyper in _moved(rule, groups, params, grads):
        linear = rule.linearise(params[name], grads[name], _of(slots, name), hyper)
        for theta, state, gradient in results:
            cotangent = theta[name] if name in theta else torch.zeros_like(params[name])
            theta[name], before, gradient[name] = linear.pullback(cotangent, _of(state, name))
            _put(state, name, before)
    return results


def pushforward(
    rule: Rule,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    grads: Mapping[str, Tensor],
    tangent_params: Mapping[str, Tensor],
    tangent_slots: _SlotsLike,
    tangent_grads: Mapping[str, Tensor],
) -> tuple[Tree, Slots]:
    """The tangent of (theta_{k+1}, slots_{k+1}): the exact transpose of ``pullback``.

    Missing tangents are zero. A tangent of ``step`` or ``started`` multiplies the same
    backward-difference column as in ``pullback``.
    """
    theta, state = dict(tangent_params), _copy(tangent_slots)
    for name, hyper in _moved(rule, groups, params, grads):
        linear = rule.linearise(params[name], grads[name], _of(slots, name), hyper)
        tangent = theta[name] if name in theta else torch.zeros_like(params[name])
        grad = tangent_grads[name] if name in tangent_grads else torch.zeros_like(grads[name])
        theta[name], after = linear.pushforward(tangent, _of(state, name), grad)
        _put(state, name, after)
    return theta, state


def extend(rule: Rule, slots: _SlotsLike) -> Slots:
    """``slots`` with the coordinates that torch keeps as "the slot exists" made numbers.

    Displacements of the optimizer's state are differences of extended slots (missing keys are
    zeros). Only SGD has such a coordinate, ``started``, and only with dampening does it matter.
    """
    extended = _copy(slots)
    for name in {name: None for tree in slots.values() for name in tree}:
        _put(extended, name, rule.extend(_of(slots, name)))
    return extended


def singular(rule: Rule, new_slots: _SlotsLike, grads: Mapping[str, Tensor]) -> int:
    """Coordinates of one update whose derivative is a definition, over all parameters in ``grads``.

    Args:
        new_slots: the slots after the update, as ``apply`` returns them.
        grads: the gradients of the update; names that no group holds have no slots, and count 0.
    """
    present = ((name, _of(new_slots, name)) for name in grads)
    return sum(rule.singular(values) for _, values in present if values)
