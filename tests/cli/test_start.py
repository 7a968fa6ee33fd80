"""What a command loads before it has something to compute: a process that waits is not asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "altair", "jinja2", "vl_convert", "transformers", "sklearn"}

PROGRAM = f"""
import sys
from culpa.cli import main
sys.argv = ["culpa", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print("loaded", *sorted({HEAVY!r} & set(sys.modules)))
"""


def loaded(*arguments: str, folder: Path = ROOT) -> list[str]:
    """Which of the heavy packages a command has loaded when it is done."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()[-1].split()
    assert said[0] == "loaded"
    return said[1:]


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("audit", "--help"), ("forecast", "--help"), ("reproduce", "--no-such-option")],
    ids=" ".join,
)
def test_what_computes_nothing_does_not_load_torch(arguments: tuple[str, ...]) -> None:
    assert loaded(*arguments) == []


def test_a_command_without_a_run_does_not_load_torch_to_start_anew(tmp_path: Path) -> None:
    # `prepare` asks torch for its threads only where a recorded run says how many there were.
    program = "import sys; from culpa.cli.early import prepare\n"
    program += "prepare(['audit', 'nowhere']); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "audit", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
