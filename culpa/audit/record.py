"""The audit record: what an audit found, as plain data that outlives the library that made it."""

from __future__ import annotations

import msgspec

AUDIT_FORMAT = 1
"""Version of the JSON this module writes; a reader refuses any other."""


class BehaviourFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One audited behaviour. ``value`` is gamma(theta_K), the mean over its ``count`` test points."""

    name: str
    unit: str
    value: float
    count: int


class StageFinding(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage ``[start, stop)`` did, one entry per behaviour in every list.

    ``scores`` is the AA-Score (gradient of the behaviour times the stage's embedding),
    ``effects`` the estimated effect gamma(theta_K) - gamma(theta_K - D), ``replayed`` the true
    effect where history was re-run without the stage and ``None`` where it was not.
    Positive: the stage raised the behaviour (credit). Negative: it lowered it (blame).
    """

    name: str
    start: int
    stop: int
    scores: list[float]
    effects: list[float]
    replayed: list[float | None]
    grade: str
    """"trusted", "doubtful" or "not identified", for the estimates (a replayed effect is exact)."""
    reason: str
    """One sentence on why the estimate has that grade, with the numbers behind it."""
    displacement: float
    """Norm of the stage's embedding relative to the norm of the final parameters."""
    growth: float
    """How much the displacement grew from the end of the stage to the end of training."""
    residual: float
    """Relative error of the linearised gradient difference along the displacement, where probed."""


class UpdateFindings(msgspec.Struct, frozen=True, kw_only=True):
    """Every single update: ``scores[k][q]`` is the effect of update k on behaviour q."""

    scores: list[list[float]]
    growth: list[float]
    displacement: list[float]
    grades: list[str]
    learning_rates: list[float]


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The audited run, in the numbers a reader asks for first."""

    name: str
    root_digest: str
    num_steps: int
    num_parameters: int
    optimizer: str
    counterfactual: str
    bytes_on_disk: int
    kept_states: int
    environment: dict[str, str]


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """What one part of the audit cost, in seconds and in updates executed or differentiated."""

    what: str
    updates: int
    seconds: float


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a method used in this audit comes from."""

    what: str
    citation: str


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an audit found: the report, the table and the JSON are views of this record."""

    format: int = AUDIT_FORMAT
    culpa_version: str
    created: str
    """ISO 8601, UTC."""
    run: RunFacts
    behaviours: list[BehaviourFacts]
    stages: list[StageFinding]
    updates: UpdateFindings
    verdicts: list[str]
    """The findings in words, most important first."""
    cautions: list[str]
    spent: list[Spending]
    options: dict[str, str]
    sources: list[Source]
