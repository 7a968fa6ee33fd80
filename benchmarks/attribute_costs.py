"""What does attributing cost? In units of the run's own training, replay and checks included.

    python benchmarks/attribute_costs.py [--repeats 5] [--cases relu,gelu,...] [--out FILE]

Four runs, each recorded twice, thinned (the default) and with every state kept:

* ``relu``, ``gelu``: 784-128-128-10 on 512 batches of 100 MNIST images, SGD with momentum .9;
* ``resnet``: ResNet-8 with BatchNorm and ReLU on 64 batches of 32 random 32 x 32 pictures, so too;
* ``gpt``: GPT-2 of two layers, width 64, on 128 batches of 8 x 64 random tokens, AdamW (needs
  transformers; left out without).

Processor time (one thread; the machine may be shared) of the plain loop over batches in memory,
without culpa, and of ``culpa.attribute``: for 1 and 4 behaviours and with example scores, exact (as
it is by default), and for the smooth models, ``gelu`` and ``gpt``, with checked differences. All in
turn in one process; medians of the ratios to the training before and after. Peak memory is that of
a process of its own that trains or attributes (Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from spent import peak, resident
from stages import BATCH, mnist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.experiments.resnet import SmallResNet

EXACT = culpa.Exact(hvp="reverse-over-reverse")
DIFFERENCES = culpa.Exact(hvp="checked-difference")
SMOOTH = ("gelu", "gpt")
UPDATES = {"relu": 512, "gelu": 512, "resnet": 64, "gpt": 128}
KEPT: dict[str, Any] = {"thinned": None, "all kept": culpa.Every(1)}
Batch = tuple[Tensor, ...]
Optimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass
class Case:
    """One training job, and the batches of its behaviours."""

    model: nn.Module
    batches: list[Batch]
    optimizer: Optimizer
    asked: list[Batch]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """With the class last but one where there are several answers a row."""
    found = model(batch[0])
    return found if isinstance(found, Tensor) else found.logits[:, :-1].transpose(1, 2)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Each row's mean."""
    found = cross_entropy(logits_of(model, batch), batch[-1], reduction="none")
    return found if found.ndim == 1 else found.mean(1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean."""
    return cross_entropy(logits_of(model, batch), batch[-1])


def sgd(params: Any) -> torch.optim.Optimizer:
    """As in the paper."""
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def adamw(params: Any) -> torch.optim.Optimizer:
    """As language models are trained."""
    return torch.optim.AdamW(params, lr=3e-4)


def perceptron(kind: str) -> Case:
    """On digits."""
    images, labels, test, answers = mnist()
    torch.manual_seed(0)
    between: type[nn.Module] = nn.ReLU if kind == "relu" else nn.GELU
    first, second = (nn.Linear(784, 128), between()), (nn.Linear(128, 128), between())
    model = nn.Sequential(*first, *second, nn.Linear(128, 10))
    order = torch.cat([torch.randperm(len(labels)) for _ in range(26)]).split(BATCH)
    batches = [(images[r].flatten(1), labels[r]) for r in order[: UPDATES[kind]]]
    asked = list(zip(test.flatten(1).split(25), answers.split(25), strict=True))
    return Case(model, [*batches], sgd, [*asked])


def resnet() -> Case:
    """On noise: the cost is the same."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)))
        for _ in range(UPDATES["resnet"] + 4)
    ]
    return Case(SmallResNet(1, 10), batches[4:], sgd, batches[:4])


def gpt() -> Case:
    """On random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=512, **still)
    tokens = torch.randint(0, 512, (UPDATES["gpt"] + 4, 8, 64))
    batches: list[Batch] = [(one, one[:, 1:]) for one in tokens]
    return Case(GPT2LMHeadModel(config), batches[4:], adamw, batches[:4])


def case_of(kind: str) -> Case:
    """By name."""
    if kind in ("relu", "gelu"):
        return perceptron(kind)
    return resnet() if kind == "resnet" else gpt()


def train(case: Case) -> None:
    """The plain loop."""
    optimizer = case.optimizer(case.model.parameters())
    for batch in case.batches:
        optimizer.zero_grad()
        loss(case.model, batch).backward()
        optimizer.step()


def record(case: Case, folder: Path, checkpoints: Any) -> tuple[culpa.Run, culpa.Problem]:
    """The same loop, recorded."""
    problem = culpa.Problem(case.model, loss, losses)
    optimizer = case.optimizer(case.model.parameters())
    with culpa.record(folder, problem, optimizer, checkpoints=checkpoints) as recorder:
        for batch in recorder.batches(case.batches):
            optimizer.zero_grad()
            loss(case.model, batch).backward()
            optimizer.step()
    return culpa.open_run(folder), problem


def behaviours(case: Case) -> list[culpa.Behaviour]:
    """Log-likelihoods."""
    return [
        culpa.Behaviour(f"part {i}", lambda m, b: -losses(m, b), batch)
        for i, batch in enumerate(case.asked)
    ]


def seconds(work: Callable[[], Any]) -> float:
    """Processor time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def examine(kind: str, kept: str, repeats: int) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        case = case_of(kind)
        asked = behaviours(case)
        run, problem = record(case, Path(folder) / "run", KEPT[kept])
        strategy = ""

        def sweep(count: int, by: Any, by_example: bool = False) -> None:
            nonlocal strategy
            found = culpa.attribute(run, problem, asked[:count], propagator=by, examples=by_example)
            strategy = found.strategy if by is DIFFERENCES else strategy

        ways = {"exact": EXACT} | ({"differences": DIFFERENCES} if kind in SMOOTH else {})
        jobs: dict[str, Callable[[], Any]] = {"replay": partial(culpa.replay, run, problem)}
        for name, by in ways.items():
            jobs[f"{name}, 1"] = partial(sweep, 1, by)
            jobs[f"{name}, 4"] = partial(sweep, 4, by)
            jobs[f"{name}, 1 and examples"] = partial(sweep, 1, by, True)
        again, ratios = case_of(kind), dict[str, list[float]]()
        for turn in range(repeats + 1):
            before = seconds(lambda: train(again))
            for name, work in jobs.items():
                took = seconds(work)
                after = seconds(lambda: train(again))
                if turn:  # the first warms up
                    ratios.setdefault(name, []).append(2.0 * took / (before + after))
                before = after
    found = {name: round(statistics.median(values), 2) for name, values in ratios.items()}
    ranges = {n: [round(min(v), 2), round(max(v), 2)] for n, v in ratios.items()}
    return {"case": kind, "record": kept, "ratios": found, "ranges": ranges, "strategy": strategy}


def peaks(kind: str, kept: str) -> dict[str, Any]:
    """Megabytes above what the process held before, and of all of the process, at the most."""
    command = [sys.executable, __file__, "--peak", kind, kept]
    found: dict[str, Any] = {}
    for what in ("training", "exact"):
        raised, whole = map(int, subprocess.check_output([*command, what]).split())
        found[what] = {"raised": round(raised / 1e6, 1), "whole": round(whole / 1e6, 1)}
    return found


def child(kind: str, kept: str, what: str) -> None:
    """Prints two numbers of bytes: see ``peaks``."""
    with tempfile.TemporaryDirectory() as folder:
        case, path = case_of(kind), Path(folder) / "run"
        loss(case.model, case.batches[0]).backward()  # what torch sets up once
        case.model.zero_grad()
        work: Callable[[], Any] = partial(train, case)
        if what != "training":
            subprocess.check_call([sys.executable, __file__, "--peak", kind, kept, str(path)])
            run, problem = culpa.open_run(path), culpa.Problem(case.model, loss, losses)
            asked = behaviours(case)[:1]
            work = partial(culpa.attribute, run, problem, asked, propagator=EXACT)
        raised = peak(work)
        print(raised, resident("VmHWM"))


def main() -> None:
    """Every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(UPDATES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attribute_costs.json"))
    parser.add_argument("--peak", nargs=3, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        kind, kept, what = given.peak
        if what in ("training", "exact"):
            child(kind, kept, what)
        else:
            record(case_of(kind), Path(what), KEPT[kept])
        return
    results: list[dict[str, Any]] = []
    for kind in given.cases.split(","):
        try:
            case_of(kind)
        except ImportError as missing:
            print(f"{kind} is left out: {missing}", file=sys.stderr)
            continue
        for kept in KEPT:
            found = examine(kind, kept, given.repeats)
            results.append(found | {"updates": UPDATES[kind], "peak MB": peaks(kind, kept)})
            print(json.dumps(results[-1]), flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
