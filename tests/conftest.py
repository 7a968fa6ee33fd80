"""What every test runs under: one thread, checked annotations, the same examples every time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest
import torch

# Every annotation of the package, tensor shapes included, is checked at every call a test makes.
# The hook rewrites modules as they are imported, so it must be there first.
if any(name == "culpa" or name.startswith("culpa.") for name in sys.modules):
    raise RuntimeError("culpa was imported before tests/conftest.py; its annotations go unchecked.")
jaxtyping.install_import_hook("culpa", "beartype.beartype")

# Bitwise replay holds for one thread count: 2 instead of 1 changes the digests.
torch.set_num_threads(1)

# The same examples on every machine, and no deadline: a first call may compile or load.
# `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the real data sets: ``CULPA_DATA``, or ``shared/data`` beside the checkout."""
    named = os.environ.get("CULPA_DATA")
    if named:
        folder = Path(named)
        if not folder.is_dir():
            pytest.fail(f"CULPA_DATA is {named!r}, which is no folder. Unset it or correct it.")
        return folder
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data here: set CULPA_DATA to a folder that holds mnist.npz")
    return folder
