"""Every forged folder is refused with a message, in bounded time and memory, executing nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import culpa
from hostile import forge
from hostile.corpus import CORPUS

SECONDS = 10.0
BYTES = 600 * 2**20
"""That one folder may take beyond what torch takes: half of it is the manifest of 64 MiB."""

MEASURED = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import culpa
from pathlib import Path
from hostile.forge import examine, walk

torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
for path in sys.argv[2:]:
    for ask in (examine, walk):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start, said = time.monotonic(), ""
        try:
            ask(Path(path))
        except culpa.CulpaError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = f"ESCAPED {type(error).__name__}: {error}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(json.dumps([path, ask.__name__, said, time.monotonic() - start, grown]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list]:
    """What each folder was answered, measured in one process of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    forge.record(folder / "run")
    paths: dict[str, str] = {}
    for number, (name, change) in enumerate(CORPUS.items()):
        path = forge.copy_of(folder / "run", folder / str(number) / "run")
        change(path)
        paths[str(path)] = name
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tests, *paths],
        cwd=Path(tests).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(paths[path], ask): rest for path, ask, *rest in found}


def test_the_honest_run_passes(tmp_path: Path) -> None:
    run = forge.record(tmp_path / "run")
    forge.walk(tmp_path / "run")
    assert run.verify().finished
    assert run.verify(forge.problem(), level="replay").executed == forge.UPDATES


@pytest.mark.parametrize("name", CORPUS)
def test_a_forged_folder_is_refused(name: str, answers: dict) -> None:
    said, seconds, grown = answers[name, "examine"]
    # A run that says it never ended has no root digest to fail; what else it says must hold.
    assert said.startswith(("IntegrityError", "StoreError")), said or "nothing was noticed"
    assert len(said) < 2000
    assert seconds < SECONDS
    assert grown < BYTES


@pytest.mark.parametrize("name", CORPUS)
def test_reading_without_verifying_is_safe(name: str, answers: dict) -> None:
    said, seconds, grown = answers[name, "walk"]
    assert not said.startswith("ESCAPED"), said
    assert seconds < SECONDS
    assert grown < BYTES


def test_what_is_linked_to_stays_as_it_was(tmp_path: Path) -> None:
    forge.record(tmp_path / "run")
    CORPUS["link beside the log"](tmp_path / "run")
    with pytest.raises(culpa.IntegrityError, match=r"log\.sqlite-wal is a link"):
        culpa.open_run(tmp_path / "run")
    assert (tmp_path / "target").read_bytes() == b"precious"
