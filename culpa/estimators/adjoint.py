"""The adjoint sweep: the score of every update for every behaviour in one pass backwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa.behaviour import Behaviour
from culpa.dynamics import choice as choices
from culpa.dynamics.local import differentiable_twice
from culpa.dynamics.propagator import Exact, Propagator
from culpa.dynamics.running import floating
from culpa.dynamics.structured import GaussNewton
from culpa.dynamics.updates import Rules
from culpa.errors import OptionError, UnsupportedError
from culpa.estimators.curved import Curvature, curvature, mean_at, second_order
from culpa.estimators.effects import running_statistics
from culpa.estimators.passage import graphs, passage
from culpa.estimators.smoothing import Smoothing, Trajectory, summarise
from culpa.estimators.sweep import Adjoint, Sweep
from culpa.estimators.trust import Trust
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.hold import Hold, told
from culpa.trajectory.ranks import afterwards
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run
from culpa.trajectory.state import on_model
from culpa.trajectory.walk import session
from culpa.tree import Tree

COUNTERFACTUAL = "counterfactual effect of the example's gradient"
PATH_SUM = "path sum without propagation (detects, does not predict)"


@dataclass(frozen=True)
class Scores:
    """The effect of every update on every behaviour. Positive: it raised it.

    Attributes:
        steps: float64 ``[num_steps, num_behaviours]``, in each behaviour's unit (Estimator 4.2).
        stages: float64 ``[num_stages, num_behaviours]``: sums of steps (Estimator 4.3), in the
            order of ``run.stages``; at order 2 with the second-order term of the sum.
        examples: float64 ``[num_distinct_training_examples, num_behaviours]`` or ``None``: the
            effect of the example's gradient in all updates that used it.
        trust: one record per update.
        singular: how often an optimizer's square root was at zero, where its derivative is defined
            as 0: Adam's, and any that the ``step()`` of a class without a closed form takes.
        behaviours, propagator, counterfactual: what the numbers are about.
        claim: ``"bitwise"``, or the drift of the replay that the sweep linearised; see
            ``culpa.replay(allow_drift=True)``.
        fallback: where no propagator was named and the exact sweep stopped being reliable:
            all updates before this one were passed with Gauss-Newton products.
        strategy: how the propagator's products were computed, why, and what was measured; and
            whether waiting updates were rounded (``hold=``).
        spread: float64 ``[num_steps, num_behaviours]``: with smoothing, how far the scores along
            one trajectory typically are from ``steps``, as a standard deviation; else ``None``.
            ``trust``, ``singular`` and ``fallback`` are those of the observed trajectory.
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
    strategy: str = ""
    spread: Float64[Tensor, "updates behaviours"] | None = None

    @property
    def meaning(self) -> str:
        """Which of two questions the scores answer: ``COUNTERFACTUAL`` or ``PATH_SUM``."""
        return COUNTERFACTUAL if self.propagator.moves else PATH_SUM


def attribute(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    propagator: Propagator | None = None,
    counterfactual: str = "skip",
    examples: bool = False,
    order: int = 1,
    smoothing: Smoothing | None = None,
    hold: Hold | None = None,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Score every update, and so every stage, for each behaviour (Estimators 4.1 to 4.3).

    One reverse sweep p <- M_k^T p from the gradient of the behaviour at the final parameters; the
    score of update t is <p_{t+1}, s_{t+1} - s_t>. The running statistics of normalisation layers
    are part of the state s and of p.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        behaviours: differentiable in the parameters.
        propagator: how the sweep passes an update. Default: ``Exact()``, and from where its
            products stop being reliable ``GaussNewton()``; ``Scores.fallback`` says where.
        counterfactual: what "without the update" means; see ``culpa.replay``.
        examples: also score every distinct training example. Needs ``problem.example_losses``.
            Two questions are not to be confused. What would the model do had the example's gradient
            not been there? That is what a propagator answers. Which examples carry a pattern, such
            as poison? ``propagator=Identity()`` finds them better (docs/results/poison.md), and its
            scores predict worse what removal does. ``Scores.meaning`` says which it was. With
            BatchNorm in training mode an example has two parts in its update: its own loss, and the
            statistics by which all others are normalised. Its score is that of its loss, in the
            batch as it was; what the others, and the running statistics, owe to its presence is no
            example's. Cost: little with exact products, which share their derivatives; with other
            propagators two forward passes an update and behaviour.
        order: 1, the paper's; or 2, with the curvature of the behaviour along what each update did
            to the final parameters (curved.py), in ``steps`` and ``stages``, not in ``examples``.
            Under Adam, whose last updates are as large as any, that can be most of what order 1
            leaves out (docs/results/updates.md). Cost: eight more adjoints for each behaviour.
        smoothing: score along perturbed trajectories as well, such as ``culpa.Smoothing()``, for
            runs whose sweep explodes (growth beyond 40, or scores graded "not identified").
        hold: where recomputed states wait for their turn: ``culpa.OnCpu()``, or
            ``culpa.OnDisk(folder)``, for models of which the device or the machine does not hold
            O(sqrt(K)) states; each, and ``culpa.InMemory``, with ``dtype=torch.bfloat16`` for half
            the bytes. Default: where the model is, as they are. Smoothing holds its own so.
        allow_drift: measure what does not reproduce instead of refusing it; see ``culpa.replay``.
        progress: see ``culpa.progress``.

    Returns:
        Scores with their trust. Cost: one replay of the run, but for updates between two kept
        states, which are read (passage.py); and for each update and behaviour a gradient, where
        differences agree with the exact products (choice.py; ``Scores.strategy`` says so), else
        2.5 gradients, one less where the replay left its graph, and one or two for each further
        behaviour; and in all some 40 gradients for checks and trust. With smoothing the same for
        each further trajectory, and one replay more.
        Memory: Q adjoints, O(sqrt(K)) states and up to 256 MB of graphs (``culpa.InMemory``).

    Raises:
        BehaviourError: if a behaviour does not return one finite number per test point.
        UnsupportedError: for an optimizer without a differentiable rule, for changing buffers other
            than running statistics, and for models without second derivatives.
        IntegrityError: if an update does not reproduce.
    """
    check_counterfactual(counterfactual)
    if order not in (1, 2):
        raise OptionError(f"order must be 1 or 2, got {order!r}.")
    if isinstance(behaviours, Behaviour) or not behaviours:
        raise OptionError(f"attribute needs a list of behaviours, got {behaviours!r}.")
    if examples and problem.example_losses is None:
        raise OptionError(
            "examples=True needs Problem(model, loss, example_losses=...): a function (model,"
            " batch) -> [B] whose mean is the loss."
        )
    running = running_statistics(run, problem)
    afterwards.refuse(
        {
            "order=2": order == 2,
            "smoothing": smoothing is not None,
            f"scores through running statistics ({', '.join(running[:1])})": bool(running),
        }
    )
    rules = Rules(problem.optimizers)
    for k in _optimizer_changes(run):
        rules.require_differentiable(run.step(k).groups)
    width = len(behaviours)
    watch, perturbed = progress or Silent(), smoothing.trajectories if smoothing else 0
    watch.start("attribute", run.num_steps * (1 + perturbed))
    try:
        with session(run, problem, allow_drift) as engine:
            ended = run.final_state(), run.final_buffers()
            adjoints, bent = _adjoints(run, problem, behaviours, ended, running, order)
            choice = choices.settle(
                propagator or Exact(),
                choices.surveyed(run, engine, problem, 0),
                [p.params for p in adjoints[:width]],
                length=run.num_steps,
                fallback=GaussNewton() if propagator is None else None,
            )
            again = [choice.again() for _ in range(perturbed)]
            asked = run, rules, counterfactual, examples, watch
            sweep = Sweep(problem, adjoints, width, choice, run.num_steps, running)
            taker = graphs(run, problem, choice, running, examples, hold)
            observed = sweep.along(passage(run, engine, hold, taker), *asked)
            swept = [(observed, bent)]
            starts = smoothing.starts(run) if smoothing else iter(())
            for start, its_choice in zip(starts, again, strict=True):
                path = Trajectory(run, engine, start)
                ended = run.frozen_parameters() | path.final.params, path.final.buffers
                adjoints, bent = _adjoints(run, problem, behaviours, ended, running, order)
                sweep = Sweep(problem, adjoints, width, its_choice, run.num_steps, running)
                swept.append((sweep.along(path.backward(), *asked), bent))
    finally:
        watch.finish()
    bounds = [(s.start, s.stop) for s in run.stages]
    scored = [second_order(one.steps, bounds, bent) for one, bent in swept]
    parts = [one.examples[:, :width] for one, _ in swept if one.examples is not None]
    (steps, stages), by_example, spread = scored[0], parts[0] if parts else None, None
    if perturbed:
        steps, spread = summarise(torch.stack([single for single, _ in scored]))
        whole = torch.stack([together for _, together in scored])
        stages = summarise(whole)[0] if order == 2 else second_order(steps, bounds, ())[1]
        by_example = summarise(torch.stack(parts))[0] if parts else None
    return Scores(
        steps,
        stages,
        by_example,
        observed.trust,
        observed.singular,
        tuple(b.name for b in behaviours),
        choice.named,
        observed.fallback,
        counterfactual,
        engine.fidelity.claim,
        choice.reason + told(hold),
        spread,
    )


def _adjoints(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    ended: tuple[Tree, Tree],
    running: Sequence[str],
    order: int,
) -> tuple[list[Adjoint], list[Curvature]]:
    """p_K of every behaviour, for a trajectory that ended with these parameters and buffers.

    At order 2 the directions in which each behaviour is curved follow, and its curvature.
    """
    trained = run.state(run.num_steps).params.keys()
    found = [gradients_of(problem, b, *ended, trained, running) for b in behaviours]
    adjoints = [Adjoint(slope, statistics=moving) for slope, moving in found]
    bent = [curvature(problem, b, *ended, trained) for b in behaviours] if order == 2 else []
    return [*adjoints, *(Adjoint(u) for one in bent for u in one.directions)], bent


def gradients_of(
    problem: Problem,
    behaviour: Behaviour,
    params: Tree,
    buffers: Tree,
    names: Collection[str],
    running: Collection[str] = (),
) -> tuple[Tree, Tree]:
    """The gradients of the behaviour's mean by the parameters and the statistics of these names.

    Of ``running`` only the floating-point buffers have one. All are where the model is, wherever
    ``params`` and ``buffers`` are.
    """
    params, buffers = on_model(problem.model, params), on_model(problem.model, buffers)
    trained = floating({name: params[name] for name in names})  # integers stand still
    leaves = {name: value.detach().requires_grad_() for name, value in trained.items()}
    moving = {
        name: value.detach().clone().requires_grad_()
        for name, value in floating({name: buffers[name] for name in running}).items()
    }
    value = mean_at(problem, behaviour, params, buffers, leaves, moving)
    inputs = [*leaves.values(), *moving.values()]
    with differentiable_twice():
        found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    for name, slope in zip((*leaves, *moving), found, strict=True):
        if slope.layout is not torch.strided:
            raise UnsupportedError(
                f"the gradient of behaviour {behaviour.name!r} by {name} is sparse, which no sweep"
                " carries. Build the layer with sparse=False; culpa.replay works as it is."
            )
    count = len(leaves)
    return (
        afterwards.mean(dict(zip(leaves, found[:count], strict=True))),
        dict(zip(moving, found[count:], strict=True)),
    )


def gradient_of(
    problem: Problem, behaviour: Behaviour, params: Tree, buffers: Tree, names: Collection[str]
) -> Tree:
    """The gradient of the behaviour's mean with respect to the parameters in ``names``."""
    return gradients_of(problem, behaviour, params, buffers, names)[0]


def _optimizer_changes(run: Run) -> list[int]:
    """One update of every optimizer of the run."""
    return [0, *(s.start for s in run.stages if s.start)] if run.num_steps else []
