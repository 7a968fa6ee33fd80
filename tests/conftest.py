"""What every test runs under: one thread, checked annotations, the same examples every time."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# beartype picks the element of a container that it checks with Python's global generator, whose
# state is itself under test: it gets a generator of its own.
_global_bits = random.getrandbits
random.getrandbits = random.Random(0).getrandbits
import beartype
import beartype.roar

random.getrandbits = _global_bits
import hypothesis
import jaxtyping
import pytest
import torch

UNCHECKABLE: list[str] = []
# Where a float is wanted an int will do, as PEP 484 has it and pyright too.
CONFIGURATION = beartype.BeartypeConf(is_pep484_tower=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and result at every call, or note that the annotations cannot be read.

    Noted instead of raised, so that one such annotation fails one test (in test_house.py) and not
    the import of the package, and with it every test there is.
    """
    try:
        return beartype.beartype(conf=CONFIGURATION)(function)
    except beartype.roar.BeartypeDecorHintException as error:
        UNCHECKABLE.append(str(error).partition("\n")[0])
        return function


# Every annotation of the package, tensor shapes included, is checked at every call a test makes.
# The hook rewrites modules as they are imported, so it must be there first.
if any(name == "culpa" or name.startswith("culpa.") for name in sys.modules):
    raise RuntimeError("culpa was imported before tests/conftest.py; its annotations go unchecked.")
jaxtyping.install_import_hook("culpa", f"{__name__}.{checked.__name__}")

# Bitwise replay holds for one thread count: 2 instead of 1 changes the digests.
torch.set_num_threads(1)

# The same examples on every machine, and no deadline: a first call may compile or load.
# `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def uncheckable() -> list[str]:
    """Annotations of the package that beartype cannot read, once every module is imported."""
    importlib.import_module("culpa")
    package = Path(__file__).resolve().parents[1]
    for file in sorted((package / "culpa").rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
    return UNCHECKABLE


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
