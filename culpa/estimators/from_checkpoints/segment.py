"""The loss of a stage near one point of its unobserved path, measured on a sample of its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics.local import LocalLoss
from culpa.errors import ProblemError
from culpa.problem import Problem
from culpa.trajectory import batches as rows_of
from culpa.trajectory import rng
from culpa.trajectory.schema import OptimizerSpec, StepRecord
from culpa.trajectory.state import State
from culpa.trajectory.walk import Transition
from culpa.tree import Tree


def split(problem: Problem, tensors: Tree, which: int) -> State:
    """The parameters and buffers of a checkpoint, on the devices of the model's own.

    Raises:
        ProblemError: if they are not the tensors of the model.
    """
    model = problem.model
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    owned = params | buffers
    # Tied weights have several names in a state dict, buffers may be left out of it.
    known = model.state_dict(keep_vars=True)
    wrong = [f"{name} is no tensor of the model" for name in tensors if name not in known]
    for name in (*params, *(name for name in buffers if name in known)):
        here, own = tensors.get(name), owned[name]
        if here is None:
            wrong.append(f"{name} is missing")
        elif here.shape != own.shape or here.dtype != own.dtype:
            wrong.append(
                f"{name} is {here.dtype} {list(here.shape)} and the model's {own.dtype}"
                f" {list(own.shape)}"
            )
    if wrong:
        raise ProblemError(
            f"checkpoint {which} does not fit the model of the problem: {'; '.join(wrong[:5])}."
            " Build the model as the training script did, and save model.state_dict()."
        )
    moved = {name: tensors.get(name, own).detach().to(own.device) for name, own in owned.items()}
    return State({name: moved[name] for name in params}, {name: moved[name] for name in buffers})


def trained(problem: Problem) -> tuple[str, ...]:
    """The names of the parameters that training moves: those that require a gradient.

    Raises:
        ProblemError: if there is none.
    """
    names = tuple(name for name, p in problem.model.named_parameters() if p.requires_grad)
    if not names:
        raise ProblemError("no parameter of the problem's model requires a gradient.")
    return names


def sampled_loss(
    problem: Problem,
    names: Sequence[str],
    state: State,
    data: Sequence[Any],
    examples: int,
    seed: int,
) -> LocalLoss:
    """The mean loss of about ``examples`` rows of ``data``, around ``state``, ready to move.

    Rows, weights and random draws (dropout) are fixed: at any point its curvature is one symmetric
    matrix, and two points differ in nothing but the parameters. It has no gradient of its own.
    """
    chosen, weights = sample(data, examples, seed)
    model = problem.model
    evaluating = [n for n, m in model.named_modules() if not m.training] if model.training else []
    record = StepRecord(
        index=0,
        optimizer=OptimizerSpec("SGD", (tuple(names),)),
        hypers=(dict[str, Any](),),
        micro_batches=(),
        weights=tuple(weights),
        clip_grad_norm=None,
        reset=False,
        drew_randomness=True,
        evaluating=tuple(evaluating),
        without_gradient=(),
        digest=b"",
        fingerprints=b"",
    )
    grads = tree.zeros_like({name: state.params[name] for name in names})
    randoms = [rng.capture()] * len(chosen)
    made = Transition(record, state, state, grads, float("nan"), chosen, randoms)
    return LocalLoss(problem, made)


def sample(data: Sequence[Any], examples: int, seed: int) -> tuple[list[Any], list[float]]:
    """About ``examples`` rows of some batches, and the weight of each batch in their mean.

    Batches are drawn without replacement until there are enough rows; the last is cut. A batch
    without a common first dimension is taken whole and counts as one row.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Any] = []
    counts: list[int] = []
    for at in torch.randperm(len(data), generator=generator).tolist():
        left = examples - sum(counts)
        if left <= 0:
            break
        batch = data[at]
        count = rows_of.row_count(batch)
        if count > left:
            index = torch.randperm(count, generator=generator)[:left].sort().values
            batch, count = rows_of.take_rows(batch, index), left
        chosen.append(batch)
        counts.append(max(1, count))
    return chosen, [count / sum(counts) for count in counts]


def floating(buffers: Tree) -> dict[str, Tensor]:
    """The buffers that could be running statistics."""
    return {name: value for name, value in buffers.items() if value.is_floating_point()}
