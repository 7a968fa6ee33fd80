"""The README's example is run as it is printed, its output compared, its links looked up."""

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
OUTPUTS = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MAX_CODE_LINES = 12


def code_lines(block: str) -> list[str]:
    """The lines of a block that are neither empty nor comments."""
    return [line for line in block.splitlines() if line.strip() and line.strip()[0] != "#"]


def test_the_main_example_stays_short() -> None:
    assert BLOCKS, "README.md has no ```python block"
    lines = code_lines(BLOCKS[0])
    assert len(lines) <= MAX_CODE_LINES, f"the main example has {len(lines)} lines of code"
    assert max(map(len, lines)) <= 100, "a line of the main example is too wide to read"


def run(program: str, folder: Path) -> str:
    """What a program prints, in a process of its own."""
    folder.mkdir(exist_ok=True)
    # A warning here is a warning in front of every new user, so it is an error; only
    # DeprecationWarnings of imported modules (torch's of torch.jit) does Python itself hide.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *warnings, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(text: str) -> list[str]:
    """Words and numbers of a printed table, without its frame."""
    return re.findall(r"[^\s|]*[^\s|+-][^\s|]*", text.replace("\N{MINUS SIGN}", "-"))


def test_the_examples_print_what_the_readme_says(tmp_path: Path) -> None:
    # One program, like somebody who pastes one block after the other.
    output = run("\n".join(BLOCKS), tmp_path)
    printed, promised = words(output), words("\n".join(OUTPUTS))
    assert len(printed) == len(promised), f"the text block of README.md is no longer:\n{output}"
    for there, here in zip(promised, printed, strict=True):
        if re.fullmatch(r"[+-]?[\d.]+,?", there):
            # Another processor rounds differently, and training carries that on.
            number = float(there.rstrip(","))
            assert float(here.rstrip(",")) == pytest.approx(number, rel=0.02)
        else:
            assert here == there, f"the text block of README.md is no longer:\n{output}"


def test_at_a_larger_learning_rate_the_first_stage_is_not_identified(tmp_path: Path) -> None:
    example = BLOCKS[0].replace("lr=0.02", "lr=0.2")
    unproved = example.replace("(x, y))])", "(x, y))], budget=0)")
    assert len({BLOCKS[0], example, unproved}) == 3
    row, proved = (
        next(line for line in run(text, tmp_path / str(at)).splitlines() if line[:7] == "| clean")
        for at, text in enumerate((unproved, example))
    )
    sentence = next(line for line in README.splitlines() if "learning rate of 0.2" in line)
    (_, estimate), (_, truth) = (re.findall(r"[+-]\d[\d.]*", line) for line in (row, proved))
    said = re.findall(r"[+-]\d[\d.]*\d", sentence.partition("estimated effect is")[2])
    assert [float(x) for x in said] == pytest.approx([float(estimate), float(truth)], rel=0.05)
    assert "not identified" in row
    assert "`not identified`" in sentence


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+?)\)", README))))
def test_what_the_readme_links_to_exists(target: str) -> None:
    assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"
