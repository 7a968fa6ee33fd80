"""The benchmarks' guard against a slip, and the parts of the benchmarks that compute something."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark, imported as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_nothing_has_become_twice_as_expensive() -> None:
    command = [sys.executable, str(BENCHMARKS / "guard.py")]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guard_names_what_slipped_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    slips = script("guard", monkeypatch).slips
    committed = {"replay": 1.1, "attribute": 3.0}
    assert slips({"replay": 2.19, "attribute": 5.9}, committed) == {}
    assert set(slips({"replay": 2.21, "attribute": 5.9}, committed)) == {"replay"}
    assert set(slips({"replay": math.nan, "attribute": 9.0}, committed)) == {"replay", "attribute"}


def test_undisturbed_time_counts_sleep_and_work_but_no_waiting_for_a_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = script("spent", monkeypatch)
    if not spent.SCHEDULER.exists():
        pytest.skip("this system does not tell how long a thread waited")
    slept, made = spent.undisturbed(lambda: time.sleep(0.05) or "made")
    assert slept >= 0.049
    assert made == "made"

    def work() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass

    worked, _ = spent.undisturbed(work)
    assert 0.09 <= worked < 0.3


def test_peak_memory_is_that_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from spent import peak; print(peak(lambda: len(bytes(range(256)) * 200_000)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not tell the peak of one's memory")
    assert 50e6 < int(done.stdout) < 60e6


def test_an_exponent_is_read_off_the_upper_decade(monkeypatch: pytest.MonkeyPatch) -> None:
    exponent = script("growth_figure", monkeypatch).exponent
    points = [(x, 5.0 + 3e-3 * x**2) for x in (1, 10, 1000, 3000, 10000)]
    assert exponent(points) == pytest.approx(2.0, abs=0.01)


def test_the_figure_of_growth_is_that_of_the_committed_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growth = script("growth", monkeypatch)
    results = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))
    assert "<svg" in growth.picture(
        results, growth.TITLES, (*growth.PARTS, growth.FROM_CHECKPOINTS)
    )
    kept = (ROOT / "docs" / "results" / "figures" / "growth.svg").read_text(encoding="utf-8")
    assert kept.endswith(f"{growth.mark(RESULTS / 'growth.json')}\n"), (
        "python benchmarks/growth.py --draw"
    )


def test_the_tables_of_the_pages_are_those_of_the_committed_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    performance = script("performance", monkeypatch)
    for page in performance.PAGES:
        text = page.read_text(encoding="utf-8")
        assert performance.rendered(page) == text, "python benchmarks/performance.py"


def test_the_benchmark_of_a_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu", monkeypatch)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"no CUDA device here.*--device cpu"):
        gpu.main()


def test_make_bench_runs_scripts_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"benchmarks/[\w/]+\.(?:py|sh)", makefile)
    assert "benchmarks/growth.py" in named
    assert not [name for name in named if not (ROOT / name).is_file()]
