"""How often a recording looks for what no counter tells: within a share of the training time.

Whatever changes a parameter in place, or gives it other memory, is noticed at the next update. An
edit in place through ``.data`` or a NumPy view moves no counter, and a setting that changes in the
middle of a stage (the norm of ``clip_grad_norm_``, a factor of the loss) leaves no trace in the
model. So now and then the model is compared with its last copy before an update, and an update is
executed again as the first one of every stage is. Neither changes what is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

SHARE = 0.005
"""Of the training time, that each of the two checks may take."""


@dataclass
class Budget:
    """Says when a check is due that may take at most ``share`` of the training time."""

    share: float = SHARE
    spent: float = 0.0
    """Seconds."""

    def due(self, trained: float) -> bool:
        """Whether what was spent is within the share of ``trained`` seconds."""
        return self.spent <= self.share * trained

    @contextmanager
    def spending(self) -> Generator[None]:
        """Count the time of a check."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent += time.monotonic() - start
