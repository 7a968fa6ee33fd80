"""docs/signing.md, executed: a signed run verifies, and one flipped bit does not."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import culpa

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "signing.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
(PYTHON,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
CHECK = next(line for line in COMMANDS if "model_signing verify" in line)

needs_the_tool = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("model_signing", "OpenSSL"))
    or shutil.which("openssl") is None,
    reason="needs `pip install model-signing pyopenssl` and openssl: see docs/signing.md",
)


def squared(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


@pytest.fixture
def run(tmp_path: Path) -> culpa.Run:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    problem, optimizer = culpa.Problem(model, squared), torch.optim.SGD(model.parameters(), lr=0.1)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for batch in recorder.batches([torch.randn(4, 3) for _ in range(5)]):
            optimizer.zero_grad()
            squared(model, batch).backward()
            optimizer.step()
    return culpa.open_run(tmp_path / "run")


def execute(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the document, by this interpreter."""
    words = [sys.executable if word == "python" else word for word in command.split()]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_document_has_the_commands_this_test_is_about() -> None:
    assert [line.split()[:4] for line in COMMANDS] == [
        ["openssl", "ecparam", "-name", "prime256v1"],
        ["openssl", "ec", "-in", "signer.key"],
        ["python", "-m", "culpa.cli", "verify"],
        ["python", "-m", "model_signing", "sign"],
        ["python", "-m", "model_signing", "verify"],
        ["python", "-m", "culpa.cli", "verify"],
    ]


def test_a_saved_model_is_tied_to_its_run(run: culpa.Run, tmp_path: Path) -> None:
    problem = culpa.Problem(nn.Linear(3, 2), squared)
    culpa.replay(run, problem, without=[1, 2, 4]).save(tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PYTHON], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = tmp_path / "run" / "culpa.json"
    manifest.write_text(manifest.read_text().replace(run.root_digest, "0" * 64))
    done = subprocess.run(
        [sys.executable, "-c", PYTHON], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "AssertionError" in done.stderr


@needs_the_tool
def test_a_signed_run_verifies_and_a_changed_one_does_not(run: culpa.Run, tmp_path: Path) -> None:
    for command in COMMANDS:
        done = execute(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert run.root_digest in done.stdout
    files = sorted(file for file in run.path.rglob("*") if file.is_file())
    assert len(files) > 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = execute(CHECK, tmp_path)
        assert done.returncode == 1, f"one bit of {file.name}"
        assert file.name in done.stdout + done.stderr
        file.write_bytes(whole)
    added = run.path / ".gitignore"
    added.write_text("*")
    assert execute(CHECK, tmp_path).returncode == 1
    added.unlink()
    files[0].rename(tmp_path / "elsewhere")
    assert execute(CHECK, tmp_path).returncode == 1
    (tmp_path / "elsewhere").rename(files[0])
    assert execute(CHECK, tmp_path).returncode == 0


@needs_the_tool
def test_another_key_does_not_verify(run: culpa.Run, tmp_path: Path) -> None:
    for command in COMMANDS[:4]:
        assert execute(command, tmp_path).returncode == 0
    for command in COMMANDS[:2]:
        assert execute(command, tmp_path).returncode == 0
    assert execute(CHECK, tmp_path).returncode == 1
