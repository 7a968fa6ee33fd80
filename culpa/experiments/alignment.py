"""Which examples pull like a behaviour does, however well they are fitted when they are seen.

The path sum of an example (``attribute(..., propagator=Identity(), examples=True)``) adds up
-grad l_i(theta_k) . grad gamma(theta_K) over the updates k that used it. Its size follows the loss:
with p_i the probability of the example's own label and o_i = log p_i / (1 - p_i) its log-odds,

    grad l_i = -(1 - p_i) grad o_i,

so an example that is fitted, as poison soon is, counts for nothing, and the few that are not fitted
count for all. Here that factor is divided out. What is left is grad o_i . grad gamma, the kernel
between the two log-odds where gamma is one (TRAK's model output, arXiv 2303.14186). To
divide by the slope of the loss is the remedy of Hammoudeh and Lowd, Identifying a Training-Set
Attack's Target Using Renormalized Influence Estimation, CCS 2022, arXiv 2201.10055, who show that
unnormalised influences miss backdoors for this very reason. It finds a pattern; it is no effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from culpa.behaviour import Behaviour
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.errors import OptionError
from culpa.estimators.adjoint import gradient_of
from culpa.problem import Problem
from culpa.trajectory.run import Run
from culpa.trajectory.walk import forward, session


def alignments(run: Run, problem: Problem, behaviour: Behaviour) -> list[Tensor]:
    """grad o_i . grad gamma of every example of every update.

    Args:
        run: the recorded run, by SGD: its directions are those of plain gradients.
        problem: with ``example_losses`` that are cross-entropies, minus log p_i.
        behaviour: gamma, differentiable; its gradient is taken at the final parameters.

    Returns:
        For each update float64 ``[examples]`` in the order of ``run.example_ids``. Positive: the
        log-odds of the example's label rise in the direction that raises the behaviour. Where the
        loss is zero to rounding it is 0. Cost: one replay, and one forward-mode product an update.

    Raises:
        OptionError: without ``example_losses``.
    """
    if problem.example_losses is None:
        raise OptionError("alignments needs Problem(model, loss, example_losses=...).")
    final, buffers = run.final_state(), run.final_buffers()
    found: list[Tensor] = []
    with session(run, problem) as engine, differentiable_twice():
        slope = gradient_of(problem, behaviour, final, buffers, final)
        for transition in forward(run, engine, 0, run.num_steps):
            local = LocalLoss(problem, transition)
            towards = {name: slope[name] for name in local.params}
            pushed = torch.func.jvp(local.example_values, (local.params,), (towards,))
            # A share is l_i / B: of a batch that came in one piece.
            count = len(pushed[0])
            losses, falls = (
                count * pushed[0].detach().double(),
                -count * pushed[1].detach().double(),
            )
            found.append((falls / -torch.expm1(-losses)).where(losses > 0, 0.0))
    return found


def by_example(run: Run, visits: Sequence[Tensor]) -> Tensor:
    """Sums over each distinct training example's visits, float64 ``[run.num_examples]``."""
    ids = torch.tensor([example for k in range(run.num_steps) for example in run.example_ids(k)])
    return torch.zeros(run.num_examples).double().index_add_(0, ids, torch.cat(list(visits)))
