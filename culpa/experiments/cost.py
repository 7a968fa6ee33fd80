"""What recording and attributing cost, as multiples of training (Tables 3 and 4).

Processor time of this thread: training alone, the same training recorded (the paper's "log"), and
the scores of every update (the paper's AA-Score), in turn and repeatedly; of each the least counts.
Peak memory is measured where Linux tells it, for the largest number of examples: by how much the
process grew during the phase, in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from culpa.estimators.adjoint import attribute
from culpa.experiments import sized
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Claim, Findings, Table
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import SGD, Job, loss, train
from culpa.trajectory.run import open_run

PAPER = {
    "ResNet-18": ("3.1 / .72", "3.4 / .88", "3.5 / 1.00", "350M, 1.1G"),
    "ResNet-34": ("4.8 / 1.56", "5.8 / 1.69", "6.1 / 1.78", "512M, 2G"),
    "Pythia-70M, LoRA": ("1.16 / 1.42", "1.20 / 1.84", "1.15 / 1.74", "875M, 1.3G"),
    "Pythia-160M, LoRA": ("1.15 / 1.47", "1.12 / 1.51", "1.11 / 1.44", "2.4G, 2.4G"),
    "Pythia-410M, LoRA": ("1.10 / 1.65", "1.07 / 1.71", "1.07 / 1.53", "6.4G, 6.4G"),
}
"""Log and attribute over train, from Tables 3 and 4; peak memory of training and of AA-Score."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PHASES = ("train", "log", "attribute")
IN_MEMORY = ("train", "attribute")
RATE = 5e-4


class Options(sized.Grid, frozen=True):
    """``counts``: training examples; ``repeats``: of every phase; ``memory``: whether to measure.

    Seeds are but other examples: what is spread over them is the machine's doing.
    """

    repeats: int = 3
    memory: bool = True


def peak_of(work: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of this process grew at most; ``None`` if unknown."""
    try:
        CLEAR.write_text("5")  # the peak is from now on
        before = _resident("VmRSS")
        work()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(found.group(1)) if found else 0


def plain(model: nn.Module, job: Job, optimizer: torch.optim.Optimizer) -> None:
    """The loop without culpa."""
    model.train()
    for batch in job.batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


class Phases:
    """Of one task, each as often as wanted; the first ``attribute`` needs a ``log`` before."""

    def __init__(
        self, options: Options, folder: DataFolder, name: str, count: int, seed: int, path: Path
    ) -> None:
        self._path = path
        self._model, self._job, self._behaviour = sized.task(
            options.sizes, folder, name, count, seed
        )

    def do(self, which: str) -> float:
        """Seconds of processor time of a phase, from the task's untrained model."""
        model, before = self._model, deepcopy(self._model.state_dict())
        again = deepcopy(model)  # what torch does only once is not timed
        plain(again, Job("", self._job.batches[:2]), SGD(RATE)(again))
        began = time.thread_time()
        if which == "train":
            plain(model, self._job, SGD(RATE)(model))
        elif which == "log":
            train(self._path, model, [self._job], SGD(RATE))
        else:
            attribute(open_run(self._path), sized.problem_of(model), [self._behaviour])
        seconds = time.thread_time() - began
        model.load_state_dict(before)
        return seconds


def peak(which: str, *task: Any) -> int | None:
    """Peak bytes of a phase of ``Phases(*task)``, in a process that does nothing else."""
    torch.set_num_threads(1)
    phases = Phases(*task)
    return peak_of(lambda: phases.do(which))


def examine(
    options: Options, folder: DataFolder, name: str, count: int, seed: int, part: Part
) -> Any:
    """All phases: seconds of every repeat, peaks, and the record's bytes."""
    path = part.folder("run")
    task = (options, folder, name, count, seed, path)
    phases, found = Phases(*task), dict[str, Any]()
    turns = [{which: phases.do(which) for which in PHASES} for _ in range(options.repeats)]
    if options.memory and count == max(options.counts):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            found["peaks"] = [pool.submit(peak, which, *task).result() for which in IN_MEMORY]
    run = part.opened("run")
    return found | {
        "seconds": {which: [turn[which] for turn in turns] for which in PHASES},
        "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "updates": run.num_steps,
    }


def run(setup: Setup) -> Findings:
    """Every model at every number of examples."""
    options: Options = setup.options
    found = sized.parts(setup, examine)
    theirs = [(f"{name} (the paper)", *cells) for name, cells in PAPER.items()]
    ours = [
        (
            name,
            *(
                f"{_ratio(found[name, c], 'log'):.2f} / {_ratio(found[name, c], 'attribute'):.2f}"
                for c in options.counts
            ),
            _memory(found[name, options.counts[-1]]),
        )
        for name in options.models
    ]
    counts = [f"{c:,}" for c in options.counts]
    seconds = tuple(
        (
            name,
            *(f"{_least(found[name, c], 'train'):.2f} s" for c in options.counts),
            f"{found[name, options.counts[-1]][0]['bytes'] / 2**20:.1f} MiB",
        )
        for name in options.models
    )
    return Findings(
        settings=(
            f"Blond hair on CelebA images of {options.size} x {options.size} in batches of"
            f" {options.image_batch}, and toxicity of comments of {options.tokens} tokens in"
            f" batches of {options.text_batch} by LoRA; SGD with momentum. Log: the"
            " recorded loop over the plain one. Attribute: `culpa.attribute`, the score of every"
            f" update (and so of every stage) for one behaviour of {options.test} test examples,"
            " over plain training."
        ),
        claims=_claims(options, found),
        tables=(
            Table(
                "Tables 3 and 4: log / attribute, as multiples of training",
                ("", *options.columns, "peak: train, attribute"),
                (*theirs, *ours),
                "The paper's are wall-clock seconds on an A100, of 2K, 4K and 8K examples; ours are"
                f" seconds of one thread's processor time, the least of {options.repeats}"
                " alternating repeats, of as many examples as the columns say. Peak memory of ours"
                " is growth during the phase, for the largest number.",
            ),
            Table(
                "Plain training and the record's size",
                ("", *counts, "record, largest"),
                seconds,
            ),
        ),
        stand_ins=()
        if setup.scale == "paper"
        else (
            "small networks, small images and a Llama of 260,032 parameters (and its first two"
            " layers) for ResNet-18/34 and Pythia; a processor for a GPU; the machine was shared"
            " while this was measured, which processor time does not hide altogether.",
        ),
        notes=(
            "LoRA of rank 8 on queries, keys and values and a head without bias has exactly the"
            " number of parameters that the paper's Table 4 gives, so it is taken for its setting.",
            "The paper logs gradients and optimizer states; culpa records batches, digests and a"
            " few states, and computes the rest again when it attributes.",
        ),
    )


def _least(found: list[Any], which: str) -> float:
    """Seconds of the quickest repeat."""
    return min(seconds for f in found for seconds in f["seconds"][which])


def _ratio(found: list[Any], which: str) -> float:
    return _least(found, which) / _least(found, "train")


def _memory(found: list[Any]) -> str:
    peaks = found[0].get("peaks", (None,) * len(IN_MEMORY))
    return ", ".join("not told" if p is None else f"{p / 2**20:.0f} MiB" for p in peaks)


def _claims(options: Options, found: dict[tuple[str, int], list[Any]]) -> tuple[Claim, ...]:
    largest = options.counts[-1]
    logs = {name: _ratio(found[name, largest], "log") for name in options.models}
    sweeps = {name: _ratio(found[name, largest], "attribute") for name in options.models}

    def words(ratios: dict[str, float]) -> str:
        return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + "."

    return (
        Claim(
            "Recording costs less than the paper's logging (3 to 6 times training for ResNets, 1.1"
            " to 1.2 times for LoRA).",
            all(r < (3.0 if n.startswith("resnet") else 1.2) for n, r in logs.items()),
            f"At {largest:,} examples: {words(logs)}",
        ),
        Claim(
            "Attribution costs .7 to 1.8 times training, as in the paper.",
            max(sweeps.values()) <= 1.8,
            f"At {largest:,} examples: {words(sweeps)}",
        ),
    )


EXPERIMENT = Experiment(
    name="cost",
    title="What recording and attributing cost",
    paper="§C.2, Tables 3 and 4",
    must_show="beside the paper's: logging 3–6× (ResNet), 1.1–1.2× (LoRA), attribution .7–1.8×",
    scales={
        "paper": Options(
            models=("resnet18", "resnet34", "pythia-70m", "pythia-160m", "pythia-410m"),
            counts=(2_000, 4_000, 8_000), image_batch=2, text_batch=50, size=224, tokens=128,
        ),
        "small": Options(),
        "smoke": Options(
            models=("resnet8", "bytes"), counts=(8, 12, 16), image_batch=4, text_batch=4, size=16,
            tokens=8, test=20, memory=False,
        ),
    },
    run=run,
)  # fmt: skip
