"""The README's example is run as it is printed, and what it links to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MAX_CODE_LINES = 12


def code_lines(block: str) -> list[str]:
    """The lines of a block that are neither empty nor comments."""
    return [line for line in block.splitlines() if line.strip() and line.strip()[0] != "#"]


def test_the_main_example_stays_short() -> None:
    assert BLOCKS, "README.md has no ```python block"
    lines = code_lines(BLOCKS[0])
    assert len(lines) <= MAX_CODE_LINES, f"the main example has {len(lines)} lines of code"
    assert max(map(len, lines)) <= 100, "a line of the main example is too wide to read"


def test_the_examples_run_as_printed(tmp_path: Path) -> None:
    # One program, one process, like somebody who pastes one block after the other. A warning here
    # is a warning in front of every new user, so it is an error; only DeprecationWarnings of
    # imported modules (torch's of torch.jit) are hidden from users by Python itself.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *warnings, "-c", "\n".join(BLOCKS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # What the text around the example says it prints.
    assert "clean" in done.stdout
    assert "flipped" in done.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+?)\)", README))))
def test_what_the_readme_links_to_exists(target: str) -> None:
    assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"
