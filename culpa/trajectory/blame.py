"""Errors of torch, or of the user's loss, on what a record says: as errors that name the field.

A record may be forged so that every digest fits, or come from another torch. What is decoded has
the right types then, and may still be refused: an optimizer by its class's own checks, a module by
a name that it has not.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from culpa.errors import CulpaError, IntegrityError, ProblemError


@contextmanager
def blamed(update: int, field: str) -> Generator[None]:
    """What fails inside failed on a field of an update's record.

    Raises:
        IntegrityError: naming both, instead of any error but culpa's own and exhausted memory.
    """
    try:
        yield
    except (CulpaError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise IntegrityError(
            f"update {update}: torch refuses its {field} as recorded: {_said(error)} The record was"
            " forged or damaged, or the model or this torch is not the one that was recorded."
        ) from error


@contextmanager
def blamed_on_loss(update: int) -> Generator[None]:
    """What fails inside failed in ``loss(model, batch)`` or its ``backward``.

    Raises:
        ProblemError: naming the update, instead of any error but culpa's own and exhausted memory.
    """
    try:
        yield
    except ProblemError as error:
        raise type(error)(f"update {update}: {error}") from error
    except (CulpaError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ProblemError(
            f"update {update}: loss(model, batch) fails on the recorded micro_batches:"
            f" {_said(error)} Pass the problem that was recorded; if it is, the batch was forged"
            " or damaged (`run.verify()` tells)."
        ) from error


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'' if text.endswith('.') else '.'}"
