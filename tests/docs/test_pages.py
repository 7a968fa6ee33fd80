"""Every code block of every page runs, and prints what the page says it prints.

``blocks.py`` says what running a block means. README.md has tests/test_readme.py.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.blocks import Block, blocks_of, execute, require_printed
from docs.granted import GRANTED

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
FRAMEWORKS = ("transformers", "lightning", "accelerate", "peft", "sklearn", "tensorboard")
NOISY = {"transformers", "lightning", "accelerate", "peft", "tensorboard"}
"""They warn of each other's deprecations and of small data; no page can help that."""
TUTORIAL = "tutorial.md"
HOW_TO = "how-to/"


def blocks(page: str) -> list[Block]:
    return blocks_of((DOCS / page).read_text(encoding="utf-8"))


def runnable(block: Block) -> bool:
    return block.language == "python" or bool(block.commands)


EXECUTED = [page for page in PAGES if any(map(runnable, blocks(page)))]


def needed(page: str) -> set[str]:
    """The frameworks that a page imports, or is given."""
    code = "\n".join(block.code for block in blocks(page) if block.language == "python")
    said = set(re.findall(r"^\s*(?:import|from) +(\w+)", code, re.MULTILINE))
    said |= set(re.findall(r"culpa\.integrations\.(\w+)", code))
    given = {name for needs, _ in GRANTED.get(page, {}).values() for name in needs}
    return (said | given) & set(FRAMEWORKS)


@contextlib.contextmanager
def at_home(folder: Path) -> Iterator[None]:
    """In this folder, with imports from it, and nothing of it left behind."""
    modules, path, arguments = set(sys.modules), list(sys.path), list(sys.argv)
    draws = torch.get_rng_state()
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path[:], sys.argv[:] = path, arguments
        torch.set_rng_state(draws)
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


def run_page(page: str, folder: Path) -> int:
    """Execute the blocks of a page in a folder; how many those were."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, executed, given = "", 0, GRANTED.get(page, {})
    with at_home(folder), warnings.catch_warnings():
        if needed(page) & NOISY:
            warnings.simplefilter("ignore")
        for block in blocks(page):
            if block.section in given and block.language == "python":
                names |= given[block.section][1](folder)
                given = {k: v for k, v in given.items() if k != block.section}
            if block.file is not None:
                Path(block.file).write_text(block.code, encoding="utf-8")
            elif block.language == "text" and block.follows and executed:
                require_printed(block, printed, page)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                execute(block, page, names)
            if runnable(block):
                printed, executed = out.getvalue(), executed + 1
    assert not given, f"{page} has no section {', '.join(map(repr, given))} with code any more"
    return executed


@pytest.fixture(scope="session")
def after_the_tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's script and the run that it recorded, where the how-to guides go on."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("tutorial")
    script = next(block for block in blocks(TUTORIAL) if block.file)
    (folder / str(script.file)).write_text(script.code, encoding="utf-8")
    with at_home(folder):
        execute(Block("sh", f"python {script.file}\n", 1, "", False), TUTORIAL, {})
    return folder


@pytest.mark.parametrize("page", EXECUTED)
def test_the_blocks_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for framework in sorted(needed(page)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(framework)
    monkeypatch.setenv("COLUMNS", "80")
    if page.startswith(HOW_TO):
        shutil.copytree(request.getfixturevalue("after_the_tutorial"), tmp_path, dirs_exist_ok=True)
    assert run_page(page, tmp_path) == sum(map(runnable, blocks(page)))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in EXECUTED])
def test_other_pages_have_no_code(page: str) -> None:
    languages = {block.language for block in blocks(page)}
    assert "python" not in languages


def test_a_file_shown_on_a_page_is_used_there() -> None:
    for page in PAGES:
        everything = blocks(page)
        for shown in everything:
            if shown.file is None:
                continue
            stem = Path(shown.file).stem
            used = rf"\b(python {shown.file}|torchrun .*{shown.file}|{stem}:|from {stem})"
            others = "\n".join(block.code for block in everything if block is not shown)
            assert re.search(used, others), f"{page} shows {shown.file} and never uses it"


def test_a_block_that_prints_something_else_is_found(tmp_path: Path) -> None:
    page = "```python\nprint('| a | +1.00 |')\n```\n\n```text\n| a | +{} |\n```\n"
    for number, fails in (("1.01", False), ("1.04", True)):
        first, second = blocks_of(page.format(number))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            execute(first, "page", {})
        if fails:
            with pytest.raises(pytest.fail.Exception, match="not printed"):
                require_printed(second, out.getvalue(), "page")
        else:
            require_printed(second, out.getvalue(), "page")


def test_a_block_that_fails_names_its_line() -> None:
    (block,) = blocks_of("# A page\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        execute(block, "page.md", {})
    assert (caught.traceback[-1].lineno + 1, str(caught.traceback[-1].path)[-7:]) == (5, "page.md")
