"""The scripts of docs/distributed.md, as ``torchrun`` would run them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch

from docs.blocks import blocks_of
from tests.distributed.processes import run_ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def already(_: str) -> None:
    """These processes have joined their group."""


def test_the_scripts_of_the_page_run_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded wrapped and sharded; afterwards in shards."""
    scripts = {b.file: b.code for b in blocks_of(PAGE.read_text(encoding="utf-8")) if b.file}
    monkeypatch.chdir(tmp_path)

    def work(rank: int) -> str:
        torch.distributed.init_process_group = already
        os.environ["RANK"] = str(rank)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            for name, *arguments in (["train.py"], ["train.py", "sharded"], ["afterwards.py"]):
                sys.argv = [name, *arguments]
                exec(compile(scripts[name], name, "exec"), {"__name__": "__main__"})
        return said.getvalue()

    first, other = run_ranks(2, tmp_path / "stores", work)
    assert first.splitlines()[:2] == ["bitwise", "bitwise"]
    assert first.splitlines()[2].startswith("first: ")
    assert other == ""
    assert (tmp_path / "without-first.safetensors").exists()
