"""The adjoint sweep: the score of every update for every behaviour in one pass backwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa import tree
from culpa.behaviour import Behaviour, evaluation_mode
from culpa.dynamics import updates
from culpa.dynamics.clip import clip
from culpa.dynamics.clip import derivative as clip_derivative
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.updates import Rule, rule_for
from culpa.errors import OptionError
from culpa.estimators.effects import direct_effect, mismatch, refuse_running_statistics, slots_dot
from culpa.estimators.trust import Trust, grade_update
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run
from culpa.trajectory.walk import Transition, backward, session
from culpa.tree import Slots, Tree


@dataclass(frozen=True)
class Scores:
    """The effect of every update on every behaviour, to first order. Positive: it raised it.

    Attributes:
        steps: float64 ``[num_steps, num_behaviours]``, in each behaviour's unit (Estimator 4.2).
        stages: float64 ``[num_stages, num_behaviours]``: sums of steps (Estimator 4.3), in the
            order of ``run.stages``.
        examples: float64 ``[num_distinct_training_examples, num_behaviours]`` or ``None``: the
            effect of the example's gradient in all updates that used it.
        trust: one record per update.
        singular: how often Adam's square root was at zero, where its derivative is defined as 0.
        behaviours, propagator, counterfactual: what the numbers are about.
    """

    steps: Float64[Tensor, "updates behaviours"]
    stages: Float64[Tensor, "stages behaviours"]
    examples: Float64[Tensor, "examples behaviours"] | None
    trust: tuple[Trust, ...]
    singular: int
    behaviours: tuple[str, ...]
    propagator: Propagator
    counterfactual: str


@dataclass
class _Adjoint:
    """p_{k+1}: the derivative of one behaviour with respect to the state after update k."""

    params: Tree
    slots: Slots


def attribute(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    propagator: Propagator | None = None,
    counterfactual: str = "skip",
    examples: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Score every update, and so every stage, for each behaviour (Estimators 4.1 to 4.3).

    One reverse sweep p <- M_k^T p from the gradient of the behaviour at the final parameters; the
    score of update t is <p_{t+1}, s_{t+1} - s_t>.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        behaviours: differentiable in the parameters.
        propagator: how the sweep passes an update; default ``Exact()``.
        counterfactual: what "without the update" means; see ``culpa.replay``.
        examples: also score every distinct training example. Needs ``problem.example_losses``.
        progress: see ``culpa.progress``.

    Returns:
        Scores with their trust. Cost: one replay of the run and, per update, about 1.5 + Q
        gradients for Q behaviours. Memory: Q adjoints and O(sqrt(K)) states.

    Raises:
        BehaviourError: if a behaviour does not return one finite number per test point.
        UnsupportedError: for an optimizer without a differentiable rule, for changing running
            statistics, and for models without second derivatives.
        IntegrityError: if an update does not reproduce.
    """
    check_counterfactual(counterfactual)
    if not behaviours:
        raise OptionError("attribute needs at least one behaviour, got an empty sequence.")
    if examples and problem.example_losses is None:
        raise OptionError(
            "examples=True needs Problem(model, loss, example_losses=...): a function (model,"
            " batch) -> [B] whose mean is the loss."
        )
    refuse_running_statistics(run, "culpa.attribute")
    for k in _optimizer_changes(run):
        rule_for(run.step(k).optimizer.name)
    chosen = propagator or Exact()
    final, buffers = run.final_state(), run.final_buffers()
    trained = run.state(run.num_steps).params.keys()
    count, width = run.num_steps, len(behaviours)
    steps = torch.zeros(count, width, dtype=torch.float64)
    by_example = torch.zeros(run.num_examples, width, dtype=torch.float64) if examples else None
    trust: list[Trust] = []
    singular = 0
    watch = progress or Silent()
    watch.start("attribute", count)
    try:
        with session(run, problem) as engine:
            adjoints = [
                _Adjoint(gradient_of(problem, b, final, buffers, trained), {}) for b in behaviours
            ]
            sizes = [tree.norm(p.params) for p in adjoints]
            for transition in backward(run, engine):
                k, rule = transition.index, rule_for(transition.record.optimizer.name)
                moved, slots = direct_effect(rule, transition, counterfactual)
                for q, p in enumerate(adjoints):
                    steps[k, q] = tree.dot(p.params, moved) + slots_dot(p.slots, slots)
                trust.append(_trust(rule, transition, adjoints, sizes, moved))
                singular += updates.singular(rule, transition.after.slots, transition.grads)
                ids = run.example_ids(k)
                _pull(rule, problem, transition, adjoints, chosen, by_example, ids)
                watch.advance()
    finally:
        watch.finish()
    stages = (
        torch.stack([steps[s.start : s.stop].sum(0) for s in run.stages])
        if run.stages
        else steps[:0]
    )
    names = tuple(b.name for b in behaviours)
    trusts = tuple(reversed(trust))
    return Scores(steps, stages, by_example, trusts, singular, names, chosen, counterfactual)


def gradient_of(
    problem: Problem, behaviour: Behaviour, params: Tree, buffers: Tree, names: Collection[str]
) -> Tree:
    """The gradient of the behaviour's mean with respect to the parameters in ``names``."""
    leaves = {name: params[name].detach().requires_grad_() for name in names}
    with evaluation_mode(problem.model), torch.enable_grad(), differentiable_twice():
        values = behaviour.checked(
            problem.call_at(behaviour.function, params | leaves, buffers, behaviour.batch)
        )
        if not values.requires_grad:
            raise OptionError(
                f"behaviour {behaviour.name!r} is not differentiable in the parameters, so it has"
                " no first-order scores. Use StageEmbeddings.effect or culpa.replay, which only"
                " evaluate it."
            )
        found = torch.autograd.grad(
            values.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(names, found, strict=True))


def _optimizer_changes(run: Run) -> list[int]:
    """One update of every optimizer of the run."""
    return [0, *(s.start for s in run.stages if s.start)] if run.num_steps else []


def _trust(
    rule: Rule,
    transition: Transition,
    adjoints: Sequence[_Adjoint],
    sizes: Sequence[float],
    moved: Tree,
) -> Trust:
    growth = max(
        tree.norm(p.params) / size if size > 0.0 else 1.0
        for p, size in zip(adjoints, sizes, strict=True)
    )
    start = tree.norm(transition.before.params)
    displacement = tree.norm(moved) / start if start > 0.0 else float("inf")
    gap = mismatch(rule, transition)
    return Trust(growth, displacement, gap, grade_update(growth, gap))


def _pull(
    rule: Rule,
    problem: Problem,
    transition: Transition,
    adjoints: Sequence[_Adjoint],
    propagator: Propagator,
    by_example: Tensor | None,
    ids: Sequence[int],
) -> None:
    """p <- M_k^T p for every behaviour, in place; example scores on the way.

    The optimizer's pullback gives the cotangent w of the gradient; then H_k w joins theta's.
    """
    record, before = transition.record, transition.before
    pulled = updates.pullback(
        rule,
        record.groups,
        before.params,
        before.slots,
        clip(transition.grads, record.clip_grad_norm),
        [p.params for p in adjoints],
        [p.slots for p in adjoints],
    )
    local = LocalLoss(problem, transition)
    raw = [clip_derivative(transition.grads, record.clip_grad_norm, w) for _, _, w in pulled]
    curved = propagator.products(local, raw)
    for q, (p, (params, slots, _), bent) in enumerate(zip(adjoints, pulled, curved, strict=True)):
        p.params = tree.add(params, bent)
        p.slots = {} if record.reset else slots
        if by_example is not None:
            shares = example_shares(local, raw[q])
            by_example[:, q].index_add_(0, torch.tensor(ids), shares)


def example_shares(local: LocalLoss, cotangent: Tree) -> Tensor:
    """w . grad l_i / B for every example of the update, float64: one forward-mode product."""
    with differentiable_twice():
        shares = torch.func.jvp(local.example_values, (local.params,), (cotangent,))[1]
    return shares.detach().double().cpu()
