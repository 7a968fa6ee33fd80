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
from culpa.dynamics.local import differentiable_twice
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.updates import rule_for
from culpa.errors import OptionError
from culpa.estimators.effects import direct_effect, refuse_running_statistics, slots_dot
from culpa.estimators.sweep import Adjoint, Sweep
from culpa.estimators.trust import Trust
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run
from culpa.trajectory.walk import backward, session
from culpa.tree import Tree


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
        claim: ``"bitwise"``, or the drift of the replay that the sweep linearised; see
            ``culpa.replay(allow_drift=True)``.
        fallback: where no propagator was named and the exact sweep stopped being reliable: this
            update and all before it were passed with Gauss-Newton products.
    """

    steps: Float64[Tensor, "updates behaviours"]
    stages: Float64[Tensor, "stages behaviours"]
    examples: Float64[Tensor, "examples behaviours"] | None
    trust: tuple[Trust, ...]
    singular: int
    behaviours: tuple[str, ...]
    propagator: Propagator
    fallback: int | None
    counterfactual: str
    claim: str = "bitwise"


def attribute(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    propagator: Propagator | None = None,
    counterfactual: str = "skip",
    examples: bool = False,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Score every update, and so every stage, for each behaviour (Estimators 4.1 to 4.3).

    One reverse sweep p <- M_k^T p from the gradient of the behaviour at the final parameters; the
    score of update t is <p_{t+1}, s_{t+1} - s_t>.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        behaviours: differentiable in the parameters.
        propagator: how the sweep passes an update. Default: ``Exact()``, and from where its
            products stop being reliable ``GaussNewton()``; ``Scores.fallback`` says where.
        counterfactual: what "without the update" means; see ``culpa.replay``.
        examples: also score every distinct training example. Needs ``problem.example_losses``.
        allow_drift: measure what does not reproduce instead of refusing it; see ``culpa.replay``.
        progress: see ``culpa.progress``.

    Returns:
        Scores with their trust. Cost: one replay of the run and, per update, about 1.5 + Q
        gradients for Q behaviours, and at 16 updates three more for the trust. Memory: Q adjoints
        and O(sqrt(K)) states.

    Raises:
        BehaviourError: if a behaviour does not return one finite number per test point.
        UnsupportedError: for an optimizer without a differentiable rule, for changing running
            statistics, and for models without second derivatives.
        IntegrityError: if an update does not reproduce.
    """
    check_counterfactual(counterfactual)
    if isinstance(behaviours, Behaviour) or not behaviours:
        raise OptionError(f"attribute needs a list of behaviours, got {behaviours!r}.")
    if examples and problem.example_losses is None:
        raise OptionError(
            "examples=True needs Problem(model, loss, example_losses=...): a function (model,"
            " batch) -> [B] whose mean is the loss."
        )
    refuse_running_statistics(run, "culpa.attribute")
    for k in _optimizer_changes(run):
        rule_for(run.step(k).optimizer.name)
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
        with session(run, problem, allow_drift) as engine:
            adjoints = [
                Adjoint(gradient_of(problem, b, final, buffers, trained)) for b in behaviours
            ]
            sweep = Sweep(problem, adjoints, propagator, count)
            for transition in backward(run, engine):
                k, rule = transition.index, rule_for(transition.record.optimizer.name)
                moved, slots = direct_effect(rule, transition, counterfactual)
                for q, p in enumerate(adjoints):
                    steps[k, q] = tree.dot(p.params, moved) + slots_dot(p.slots, slots)
                trust.append(sweep.trust(rule, transition, moved))
                singular += updates.singular(rule, transition.after.slots, transition.grads)
                sweep.pull(rule, transition, by_example, run.example_ids(k))
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
    used = propagator or Exact()
    return Scores(
        steps,
        stages,
        by_example,
        trusts,
        singular,
        names,
        used,
        sweep.fallback,
        counterfactual,
        engine.fidelity.claim,
    )


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
