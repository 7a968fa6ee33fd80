"""The audit record: what an audit found, as plain data that outlives the library that made it."""

from __future__ import annotations

import msgspec

from culpa.errors import StoreError

AUDIT_FORMAT = 2
"""Version of the JSON this module writes; a reader refuses any other."""


class BehaviourFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One audited behaviour. ``value`` is gamma(theta_K), the mean over ``count`` test points."""

    name: str
    unit: str
    value: float
    count: int


class StageFinding(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage ``[start, stop)`` did, one entry per behaviour in every list.

    ``scores`` is the AA-Score (gradient of the behaviour times D, the stage's embedding, which is
    exact where the stage was replayed), ``effects`` the estimated effect gamma(theta_K) -
    gamma(theta_K - D) and, where ``estimated`` is false, the replayed one: there D is exact too.
    ``replayed`` is the true effect where history was re-run without the stage, else ``None``.
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
    """Relative error of the linearised gradient difference along the displacement, where probed;
    nan for the last stage, after which nothing is linearised."""
    intervals: list[float] = []
    """Half-widths at 95 %, around the replayed effect or else the estimate (intervals.py); nan
    where nothing is known of the error."""
    floors: list[float] = []
    """The noise floor (floor.py): the best number is chaos if it lies within plus or minus this;
    nan where no placebo tells."""
    grades: list[str] = []
    """Of the best number per behaviour: "replayed", "trusted", "doubtful" or "not identified"."""
    estimated: bool = True
    """Whether there is an estimate; not where replaying every stage took less, nor where the
    sweeps refused the run. Then, if it was not replayed either, nothing is known of it."""
    sums: list[float] = []
    """The sum of the first-order scores of its updates (Estimator 4.3): what drilling down to
    single updates adds up to. It falls short of the effect by what is not additive."""


class PlaceboFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One disturbance that means nothing, before update ``at``, and what it changed.

    ``kind`` is "rounding" (parameters perturbed by rounding-sized noise, history replayed from
    there) or "neutral update" (a single update with next to no score skipped; its score is
    subtracted). ``effects``: one per behaviour.
    """

    kind: str
    at: int
    effects: list[float]


class WindowFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Updates ``[start, stop)`` that were examined by group testing (search.py).

    ``jumps`` is what they did at once, gamma(s_stop) - gamma(s_start); ``replayed`` their effect on
    the final model where history was re-run without them, else ``None``. One entry a behaviour.
    """

    start: int
    stop: int
    jumps: list[float]
    replayed: list[float] | None


class LayerFindings(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of one stage on one behaviour by layer; ``effects`` plus ``rest`` is all of it."""

    stage: str
    behaviour: str
    effects: dict[str, float]
    rest: float


class ExampleFindings(msgspec.Struct, frozen=True, kw_only=True):
    """The training examples that moved one behaviour most, by number in the run, and their scores.

    Most helpful and most harmful first. ``updates``: the updates that used the example.
    """

    behaviour: str
    helpful: list[int]
    harmful: list[int]
    scores: dict[str, float]
    updates: dict[str, list[int]]


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
    budget: float = 0.0
    """Allowed for replays and placebos, in units of the run's own training cost."""
    used: float = 0.0
    """Of it, spent."""
    stopped: str = ""
    """Why no more was replayed."""
    settled: list[bool] = []
    """Per behaviour: no other stage can be the most blamed or most credited one, at 95 %."""
    placebos: list[PlaceboFinding] = []
    tradeoffs: list[str] = []
    windows: list[WindowFinding] = []
    layers: list[LayerFindings] = []
    examples: list[ExampleFindings] = []


def encode(record: AuditRecord) -> bytes:
    """Indented JSON; numbers that are not finite become ``null``."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def decode(data: bytes) -> AuditRecord:
    """Read what ``encode`` wrote: ``null`` is nan again, but for effects that were not replayed.

    Raises:
        StoreError: if it is no audit record, or one of another format.
    """
    try:
        content = msgspec.json.decode(data)
        if content["format"] != AUDIT_FORMAT:
            raise StoreError(
                f"the audit record has format {content['format']!r}; this culpa reads"
                f" {AUDIT_FORMAT}."
            )
        for stage in content["stages"]:
            for field in ("scores", "effects", "intervals", "floors", "sums"):
                stage[field] = [_number(value) for value in stage.get(field, [])]
            for field in ("displacement", "growth", "residual"):
                stage[field] = _number(stage[field])
        updates = content["updates"]
        updates["scores"] = [[_number(value) for value in row] for row in updates["scores"]]
        for field in ("growth", "displacement"):
            updates[field] = [_number(value) for value in updates[field]]
        return msgspec.convert(content, AuditRecord)
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise StoreError(f"this is no audit record that culpa wrote: {error}.") from error


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
