"""Every error culpa raises on purpose. Each message says what was given, expected, and to do."""

from __future__ import annotations


class CulpaError(Exception):
    """Base of all errors of this library."""


class ProblemError(CulpaError):
    """The loss, the model or the optimizer does not fit together (shape, parameters)."""


class NotReproducibleError(ProblemError):
    """The same loss on the same batch from the same random state gave two different results."""


class BehaviourError(CulpaError):
    """A behaviour returned something other than one finite number per test point."""


class StageError(CulpaError):
    """An unknown, duplicate, empty or overlapping stage, or an update outside of every stage."""


class RecordError(CulpaError):
    """The training loop did something that the record would not represent truthfully."""


class StoreError(CulpaError):
    """A folder that is no run, is a run already, or cannot be written or read."""


class IntegrityError(CulpaError):
    """What is stored, or what a replay produced, is not what was recorded."""


class EnvironmentDifference(IntegrityError):  # noqa: N818 (a fact about here, not a mistake)
    """This process is not like the one that recorded, so a replay need not be bitwise."""


class UnsupportedError(CulpaError):
    """Something real that this version does not model; refused rather than guessed."""


class OptionError(CulpaError):
    """An argument outside of what a function accepts."""


class ResourceError(CulpaError):
    """A forecast says that memory or disk would not suffice for a job."""


class RecordingStopped(CulpaError, UserWarning):  # noqa: N818 (a warning, not an error)
    """A warning: the disk failed, so recording ended early while training went on."""
