"""An optimizer's update of a whole model, its pullback and its pushforward, tensor by tensor.

The state is (theta, slots), the map is F: (theta_k, slots_k, grads) -> (theta_{k+1}, slots_{k+1})
at fixed hyperparameters. The gradient is an argument: the caller chains it with the curvature.
Only parameters that are in a group AND have a gradient move, as in ``torch.optim``; for all others
F is the identity, and so is its derivative.

Everything is computed in the dtypes given, so half-precision states are to be promoted first.
Nothing is changed in place; results may share memory with arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from culpa.dynamics.updates.rule import Linearised, Rule
from culpa.dynamics.updates.rules import Rules
from culpa.errors import OptionError, UnsupportedError
from culpa.trajectory.schema import Group
from culpa.tree import Slots, Tree

_SlotsLike = Mapping[str, Mapping[str, Tensor]]


def _moved(
    rules: Rules,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
) -> Iterator[tuple[str, Rule, Mapping[str, Any]]]:
    """(name, its group's rule, hyperparameters) of every parameter that the update moves."""
    for group in groups:
        rule = rules.of(group)
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
            yield name, rule, hyper


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
    rules: Rules,
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
    for name, rule, hyper in _moved(rules, groups, params, grads):
        increments[name], new = rule.step(params[name], grads[name], _of(slots, name), hyper)
        _put(after, name, new)
    return increments, after


def pullback(
    rules: Rules,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    grads: Mapping[str, Tensor],
    cotangent_params: Sequence[Mapping[str, Tensor]],
    cotangent_slots: Sequence[_SlotsLike],
) -> list[tuple[Tree, Slots, Tree]]:
    """For each of Q cotangents of (theta_{k+1}, slots_{k+1}): those of (theta_k, slots_k, grads).

    Args:
        rules, groups, params, slots, grads: the observed update, as for ``apply``.
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
    for name, rule, hyper in _moved(rules, groups, params, grads):
        linear = rule.linearise(params[name], grads[name], _of(slots, name), hyper)
        for theta, state, gradient in results:
            cotangent = theta[name] if name in theta else torch.zeros_like(params[name])
            theta[name], before, gradient[name] = linear.pullback(cotangent, _of(state, name))
            _put(state, name, before)
    return results


def pushforward(
    rules: Rules,
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
    linear = linearised(rules, groups, params, slots, grads)
    return carry(linear, params, tangent_params, tangent_slots, tangent_grads)


def linearised(
    rules: Rules,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    grads: Mapping[str, Tensor],
) -> Iterator[tuple[str, Linearised]]:
    """The derivative of the observed update (as for ``apply``) for each parameter it moves."""
    for name, rule, hyper in _moved(rules, groups, params, grads):
        yield name, rule.linearise(params[name], grads[name], _of(slots, name), hyper)


def carry(
    linear: Iterable[tuple[str, Linearised]],
    params: Mapping[str, Tensor],
    tangent_params: Mapping[str, Tensor],
    tangent_slots: _SlotsLike,
    tangent_grads: Mapping[str, Tensor],
) -> tuple[Tree, Slots]:
    """``pushforward`` by a derivative made before, which several tangents can share."""
    theta, state = dict(tangent_params), _copy(tangent_slots)
    for name, derivative in linear:
        tangent = theta[name] if name in theta else torch.zeros_like(params[name])
        grad = tangent_grads[name] if name in tangent_grads else torch.zeros_like(params[name])
        theta[name], after = derivative.pushforward(tangent, _of(state, name), grad)
        _put(state, name, after)
    return theta, state


def extend(
    rules: Rules,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    names: Collection[str],
) -> Slots:
    """``slots`` with what optimizers keep as "the slot exists" made numbers.

    Displacements of the optimizer's state are differences of extended slots (missing keys are
    zeros). SGD has such a coordinate, ``started``; classes that begin at something else than zeros
    (NAdam's product, Adagrad's sum) have the initial value, for the parameters in ``names``.
    """
    extended = _copy(slots)
    present = {name for tree in slots.values() for name in tree}
    for group in groups:
        rule = rules.of(group)
        hyper = {**rule.defaults, **group.hyper}
        for name in group.names:
            if name in present or name in names:
                _put(extended, name, rule.extend(params[name], _of(slots, name), hyper))
    return extended


def singular(
    rules: Rules,
    groups: Sequence[Group],
    params: Mapping[str, Tensor],
    slots: _SlotsLike,
    grads: Mapping[str, Tensor],
    new_slots: _SlotsLike,
) -> int:
    """Coordinates of one update whose derivative is a definition.

    Args:
        rules, groups, params, slots, grads: the observed update, as for ``apply``.
        new_slots: the slots after it.
    """
    return sum(
        rule.singular(params[name], grads[name], _of(slots, name), hyper, _of(new_slots, name))
        for name, rule, hyper in _moved(rules, groups, params, grads)
    )
