"""Records to show: see ``records``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from culpa.auditing.record import AuditRecord
from report.records import make_record


@pytest.fixture
def build() -> Callable[..., AuditRecord]:
    """``make_record``, for tests that want a record of their own."""
    return make_record


@pytest.fixture
def record() -> AuditRecord:
    """Four stages, three behaviours of two units, 240 updates, all but the first replayed."""
    return make_record()
