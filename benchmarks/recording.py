"""What recording costs: time against the same loop without it, and bytes against every state.

    python benchmarks/recording.py [--repeats 5] [--out benchmarks/results/recording.json]

Plain and recorded training alternate in one process, each from the same seed; a ratio is the median
over pairs. The recorded time is that of the whole block: opening the folder, executing the first
update of each stage twice, hashing, writing, closing. ``loop`` leaves opening and closing out;
``cpu`` is the training thread's own processor time in the loops, which a busy machine disturbs
least; ``beside`` is the processor time of the thread that writes, per update.

What comes once is told apart from what comes with every update, so that a run of any length can be
foreseen: ``per_update`` is the ratio of the updates that are not the first of their stage, and
``once_updates`` what all the rest takes longer, in plain updates: opening, the first update of each
stage, which is proved to be what the record says, and closing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from training_loops import CASES, Case, loss

import culpa
from culpa.trajectory import environment


class Spent(NamedTuple):
    """Seconds: of the whole, the loops, the training thread's processor there, other threads'.

    ``later`` are those of the loops without the first update of each stage, ``later_cpu`` those of
    the training thread's processor.
    """

    whole: float
    loop: float
    cpu: float
    beside: float
    later: float
    later_cpu: float


def train(case: Case, path: Path | None) -> Spent:
    """Train; recorded if there is a path."""
    torch.manual_seed(0)
    model = case.model()
    optimizer, stages = case.optimizer(model), list(case.stages())
    looped = used = later = later_used = 0.0
    elsewhere, began = _elsewhere(), time.perf_counter()
    context: Any = nullcontext()
    if path is not None:
        context = culpa.record(path, culpa.Problem(model, loss), optimizer)
    with context as recorder:
        for name, batches in stages:
            first, entered, at = True, time.perf_counter(), time.thread_time()
            since, since_used = entered, at
            with recorder.stage(name) if recorder else nullcontext():
                for batch in recorder.batches(batches) if recorder else batches:
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
                    if first:
                        first, since, since_used = False, time.perf_counter(), time.thread_time()
            looped += time.perf_counter() - entered
            used += time.thread_time() - at
            later += time.perf_counter() - since
            later_used += time.thread_time() - since_used
    whole = time.perf_counter() - began
    return Spent(whole, looped, used, _elsewhere() - elsewhere, later, later_used)


def _elsewhere() -> float:
    """Processor time of other threads."""
    return time.process_time() - time.thread_time()


def measure(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Alternate plain and recorded training after one of each to warm up."""
    torch.set_num_threads(threads)
    plain: list[Spent] = []
    recorded: list[Spent] = []
    with tempfile.TemporaryDirectory() as folder:
        for at in range(repeats + 1):
            plain.append(train(case, None))
            recorded.append(train(case, Path(folder, str(at))))
        run = culpa.open_run(Path(folder, str(repeats)))
        parts, updates, kept = run.bytes_by_part(), run.num_steps, len(run.kept_states)
        state, stages = len(run.state(updates).encode()), len(run.stages)
    pairs = list(zip(plain[1:], recorded[1:], strict=True))
    whole = [r.whole / p.whole for p, r in pairs]
    every, repeated = state * (updates + 1), updates - stages
    return {
        "case": case.name,
        "threads": threads,
        "updates": updates,
        "repeats": repeats,
        "plain_seconds": _median(p.whole for p in plain[1:]),
        "recorded_seconds": _median(r.whole for r in recorded[1:]),
        "ratio": _median(whole),
        "ratio_range": [round(min(whole), 3), round(max(whole), 3)],
        "ratio_per_update": _median(r.later / p.later for p, r in pairs),
        "ratio_per_update_cpu": _median(r.later_cpu / p.later_cpu for p, r in pairs),
        "once_updates": _median(
            (r.whole - r.later - p.whole + p.later) / (p.later / repeated) for p, r in pairs
        ),
        "stages": stages,
        "ratio_loop": _median(r.loop / p.loop for p, r in pairs),
        "ratio_cpu_of_training_thread": _median(r.cpu / p.cpu for p, r in pairs),
        "plain_microseconds_cpu": round(1e6 * min(p.cpu for p in plain[1:]) / updates, 1),
        "recorded_microseconds_cpu": round(1e6 * min(r.cpu for r in recorded[1:]) / updates, 1),
        "beside_microseconds_cpu": round(1e6 * min(r.beside for r in recorded[1:]) / updates, 1),
        "bytes": parts,
        "bytes_total": sum(parts.values()),
        "kept_states": kept,
        "most_states": round(2 * updates**0.5 + 4, 1),
        "bytes_of_a_state": state,
        "bytes_of_every_state": every,
        "states_to_every_state": round(parts["states"] / every, 4),
        "total_to_every_state": round(sum(parts.values()) / every, 4),
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)


def main() -> None:
    """Measure every case with one thread and with two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recording.json"))
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    machine = environment.capture() | {"cores": str(os.cpu_count())}
    content = {
        "what": "recorded against plain training, alternating in one process",
        "culpa": culpa.__version__,
        "machine": machine,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for threads in options.threads:
        for case in [CASES[number] for number in options.cases]:
            load = os.getloadavg()[0]  # more than ours of the cores: a ratio to mistrust
            found = measure(case, threads, options.repeats) | {"load_before": round(load, 2)}
            results.append(found)
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(
                f"{case.name}, {threads} thread(s): {found['ratio']:.2f} times plain"
                f" ({found['ratio_per_update']:.3f} an update,"
                f" {found['ratio_per_update_cpu']:.3f} in the training thread's processor time,"
                f" and {found['once_updates']:.1f} updates once),"
                f" {found['bytes_total'] / 1e6:.1f} MB,"
                f" {found['total_to_every_state']:.2f} of every state\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
