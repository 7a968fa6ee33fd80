"""Stage embeddings: parameter displacements that are reusable for any later behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from jaxtyping import Float64
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from culpa import tree
from culpa.behaviour import Behaviour, evaluation_mode
from culpa.dynamics.local import differentiable_twice
from culpa.dynamics.running import floating, shifted
from culpa.dynamics.statistics import evaluate
from culpa.errors import OptionError, StageError, StoreError
from culpa.estimators import directional
from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.files import write_durably
from culpa.trajectory.ranks.afterwards import first_writes, own, require_mine, whole_on_first
from culpa.trajectory.schema import Stage
from culpa.trajectory.state import on_cpu, on_model
from culpa.tree import Tree

FORMAT = 2


class StageTrust(msgspec.Struct, frozen=True):
    """The trust in one stage's embedding.

    ``displacement``: ||D|| / ||theta_K||. ``growth``: ||D|| at the end of training over that at the
    end of the stage. ``residual``: an estimate of the relative error of D, from the remainders
    (``remainder.remainder``) of at most six updates after the stage, on the high side; nan for the
    last stage, which is exact.
    """

    displacement: float
    growth: float
    residual: float
    grade: str


class StageEmbeddings(Mapping[str, Tree]):
    """``embeddings[name]`` is theta_K - theta_K(without the stage), estimated, by parameter name.

    All tensors in it are on the CPU (frozen ones by reference: the given tensors); ``score`` and
    ``effect`` take them to the model.

    Attributes:
        stages: the embedded stages in order of time.
        trust: a ``StageTrust`` by stage name.
        final, buffers: the observed final model.
        statistics: r_K - r_K(without the stage) of the running statistics of normalisation layers,
            by stage name and buffer name; empty where the model has none.
        facts: how they were made (form, order, propagator, counterfactual, root digest).
        problem: needed by ``score`` and ``effect``; pass it to ``load``.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        displacements: Mapping[str, Tree],
        trust: Mapping[str, StageTrust],
        final: Tree,
        buffers: Tree,
        facts: Mapping[str, str],
        problem: Problem | None,
        statistics: Mapping[str, Tree] | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self.trust = dict(trust)
        self.final = final
        self.buffers = buffers
        self.facts = dict(facts)
        self.problem = problem
        self.statistics = dict.fromkeys(displacements, Tree()) | dict(statistics or {})
        self._displacements = dict(displacements)

    def __getitem__(self, name: str) -> Tree:
        """The displacement D of one stage."""
        if name not in self._displacements:
            known = ", ".join(map(repr, self._displacements)) or "none"
            raise StageError(f"no embedding of a stage {name!r}; there are {known}.")
        return self._displacements[name]

    def __contains__(self, name: object) -> bool:
        """Whether the stage was embedded."""
        return name in self._displacements

    def __iter__(self) -> Iterator[str]:
        """The stages' names in order of time."""
        return iter(self._displacements)

    def __len__(self) -> int:
        """The number of stages."""
        return len(self._displacements)

    def counterfactual(self, name: str) -> Tree:
        """The estimated model without the stage, parameters theta_K - D and buffers.

        Running statistics are those that training without the stage would have ended with; no
        variance is below zero (``dynamics.running.shifted``).
        """
        moved = shifted(self.buffers, self.statistics[name]) if name in self else Tree()
        return tree.subtract(self.final, self[name]) | self.buffers | moved

    def score(self, behaviour: Behaviour) -> Float64[Tensor, "stages n"]:
        """The AA-Score per test point: grad gamma . D, float64 ``[num_stages, n]``.

        With ``order=2`` minus D^T (grad^2 gamma) D / 2: gamma(theta_K) - gamma(theta_K - D) to
        second order. Cost: one forward-mode product per stage; at order 2 about eight.
        """
        problem = self._problem()
        require_mine(self.final, problem.model)
        everything = on_model(problem.model, self.final | self.buffers)

        def values(tensors: Tree) -> Tensor:
            here = everything | tensors
            parts = {n: here[n] for n in self.final}, {n: here[n] for n in self.buffers}
            return behaviour.checked(evaluate(problem, behaviour.function, *parts, behaviour.batch))

        rows: list[Tensor] = []
        with rng.preserved(), evaluation_mode(problem.model), differentiable_twice():
            for stage, displacement in self._displacements.items():
                along = on_model(problem.model, displacement | floating(self.statistics[stage]))
                at = {name: everything[name] for name in along}
                row = directional.first(values, at, along)
                if self.facts.get("order") == "2":
                    row = row - 0.5 * directional.second(values, at, along)
                rows.append(row)
        return torch.stack(rows).double().cpu()

    def observed(self, behaviour: Behaviour) -> Float64[Tensor, " n"]:
        """gamma(theta_K) per test point, float64 ``[n]``."""
        return self._values(behaviour, self.final | self.buffers)

    def effect(self, behaviour: Behaviour) -> Float64[Tensor, "stages n"]:
        """gamma(theta_K) - gamma(theta_K - D) per test point, float64 ``[num_stages, n]``.

        First order in the dynamics, exact in gamma, which need not be differentiable; exact
        altogether for the last stage.
        """
        observed = self.observed(behaviour)
        return torch.stack(
            [observed - self._values(behaviour, self.counterfactual(n)) for n in self]
        )

    def save(self, path: str | Path) -> None:
        """Write all of it to one safetensors file; read it with ``StageEmbeddings.load``.

        Ranks that hold shards all call it, and the first one writes whole tensors.
        """
        model = None if self.problem is None else self.problem.model
        tensors = {f"final/{n}": v for n, v in whole_on_first(self.final, model).items()}
        tensors |= {f"buffers/{n}": v for n, v in self.buffers.items()}
        for at, displacement in enumerate(self._displacements.values()):
            whole = whole_on_first(displacement, model)
            tensors |= {f"stage/{at}/{n}": v for n, v in whole.items()}
        for at, moved in enumerate(self.statistics.values()):
            tensors |= {f"statistics/{at}/{n}": v for n, v in moved.items()}
        content = {
            "format": FORMAT,
            "stages": self.stages,
            "trust": self.trust,
            "facts": self.facts,
        }
        header = {"culpa": msgspec.json.encode(content).decode()}
        plain = {n: v.contiguous() for n, v in on_cpu(tensors).items()}
        first_writes(lambda: write_durably(Path(path), save(plain, metadata=header)))

    @classmethod
    def load(cls, path: str | Path, problem: Problem | None = None) -> StageEmbeddings:
        """Read a saved file. ``problem`` (its model) is needed for ``score`` and ``effect`` only.

        Raises:
            StoreError: if the file is none that ``save`` wrote.
        """
        try:
            with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                content: Any = msgspec.json.decode((file.metadata() or {})["culpa"])
                tensors: Tree = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if content["format"] != FORMAT:
                raise StoreError(
                    f"{path} has format {content['format']!r}; this culpa reads {FORMAT}."
                )
            stages = msgspec.convert(content["stages"], tuple[Stage, ...])
            trust = {n: _restored(t) for n, t in content["trust"].items()}
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"{path} is no file of stage embeddings: {error}.") from error

        def part(prefix: str) -> Tree:
            return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

        displacements = {s.name: own(part(f"stage/{at}/")) for at, s in enumerate(stages)}
        statistics = {s.name: part(f"statistics/{at}/") for at, s in enumerate(stages)}
        return cls(
            stages,
            displacements,
            trust,
            own(part("final/")),
            part("buffers/"),
            content["facts"],
            problem,
            statistics,
        )

    def _problem(self) -> Problem:
        if self.problem is None:
            raise OptionError(
                "these embeddings were loaded without a problem, and a behaviour needs its model: "
                "StageEmbeddings.load(path, problem)."
            )
        return self.problem

    def _values(self, behaviour: Behaviour, tensors: Tree) -> Tensor:
        problem = self._problem()
        require_mine(self.final, problem.model)
        tensors = on_model(problem.model, tensors)
        params = {n: tensors[n] for n in self.final}
        buffers = {n: tensors[n] for n in self.buffers}
        with rng.preserved(), evaluation_mode(problem.model), torch.no_grad():
            values = problem.call_at(behaviour.function, params, buffers, behaviour.batch)
            return behaviour.checked(values).double().cpu()


def _restored(trust: dict[str, Any]) -> StageTrust:
    """The encoder writes nan as null."""
    restored: dict[str, Any] = {n: float("nan") if v is None else v for n, v in trust.items()}
    return StageTrust(**restored)
