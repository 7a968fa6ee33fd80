"""culpa.attribute against bergson's MAGIC on its own ground: a causal language model under AdamW.

    make bench-peers, or in that environment:
    python benchmarks/peers_bergson.py [--repeats 5] [--out benchmarks/results/peers_bergson.json]

Both answer one question: by how much does the final loss on held-out text change with the weight of
each training sequence (``counterfactual="zero-gradient"``). A GPT-2 of two layers reads bytes of
the standard library's documentation: 100 updates of 8 sequences of 64 bytes, AdamW, float32.
bergson trains through its own functional trainer and keeps every tenth state
(``save_mode="sqrt"``); culpa records ``torch.optim``'s loop, thinned. Then each goes back over the
whole run. The two embeddings are not tied: bergson trains tied ones otherwise than ``torch.optim``
does.

In one process, in turn, with one thread, after one round to warm up: processor seconds of each part
over those of the plain loop of the same round, and of our sweep over bergson's; medians of
``--repeats`` rounds. The scores must agree, or the comparison means nothing. Peak memory is that of
a process of its own for each (``--alone``), above what it held before the part began.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from spent import peak, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.experiments.frame.machine import machine

UPDATES, BATCH, LENGTH = 100, 8, 64
ADAMW: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}
RATE = 3e-4
SWEEPS = {
    "exact": culpa.Exact(hvp="reverse-over-reverse"),
    "differences": culpa.Exact(hvp="checked-difference"),
}


def sequences() -> tuple[Tensor, Tensor]:
    """Training sequences in the order of the updates, and 8 more: [N, length] of byte numbers."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    numbers = torch.tensor(list(text.encode("utf-8", "replace")))
    rows = numbers[: len(numbers) // LENGTH * LENGTH].reshape(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    training = UPDATES * BATCH
    return rows[order[:training]], rows[order[training : training + BATCH]]


def gpt2() -> nn.Module:
    """Two layers of width 128: 480,000 parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross-entropy of each sequence's next bytes: [B]."""
    logits = model(input_ids=batch).logits[:, :-1]
    found = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return found.view(len(batch), -1).mean(1)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Its mean, which the loop minimises."""
    return losses(model, batch).mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As ``torch.optim`` has it."""
    return torch.optim.AdamW(model.parameters(), lr=RATE, **ADAMW)


def plain(training: Tensor) -> nn.Module:
    """The loop, with nothing around it."""
    model = gpt2()
    optimizer = adamw(model)
    for batch in training.split(BATCH):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


def record(training: Tensor, folder: Path) -> tuple[culpa.Run, culpa.Problem]:
    """The same loop, recorded."""
    model = gpt2()
    problem, optimizer = culpa.Problem(model, loss, example_losses=losses), adamw(model)
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches(training.split(BATCH)):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return culpa.open_run(folder), problem


def sweep(run: culpa.Run, problem: culpa.Problem, asked: Tensor, by: Any) -> Tensor:
    """Our scores of the training sequences, in the order of the updates: [N]."""
    behaviour = culpa.Behaviour("held-out text", lambda model, batch: -losses(model, batch), asked)
    scores = culpa.attribute(
        run, problem, [behaviour], propagator=by, counterfactual="zero-gradient", examples=True
    )
    rows = [example for k in range(run.num_steps) for example in run.example_ids(k)]
    assert scores.examples is not None
    return torch.as_tensor(scores.examples)[rows, 0]


class Theirs:
    """bergson's trainer on the same model, optimiser and order of examples."""

    def __init__(self, training: Tensor, asked: Tensor) -> None:
        import torchopt
        from bergson.magic import DataStream, Trainer
        from bergson.utils import weighted_causal_lm_ce
        from datasets import Dataset

        def stream(rows: Tensor) -> Any:
            return DataStream(Dataset.from_dict({"input_ids": rows.tolist()}), BATCH)

        self.data, self.asked = stream(training), stream(asked)
        model: Any = gpt2()
        model.loss_function = partial(weighted_causal_lm_ce, reduction="mean")
        optimizer = torchopt.adamw(RATE, **ADAMW, eps_root=1e-17)  # its default, against nan
        self.model = model
        self.trainer, self.state = Trainer.initialize(model, optimizer)

    @contextlib.contextmanager
    def _quietly(self) -> Generator[None]:
        """Without its progress bars."""
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def train(self, folder: Path) -> None:
        """Keep a state every so many updates that the way back never holds more than these."""
        with self._quietly():
            self.state = self.trainer.train(
                self.state, self.data, inplace=True, save_dir=str(folder), save_mode="sqrt"
            )

    def sweep(self, folder: Path) -> Tensor:
        """The derivative of the held-out loss by every sequence's weight: [N]."""
        from bergson.magic import BackwardState
        from bergson.magic.cli import compute_query_gradients
        from torchopt.pytree import tree_iter

        with self._quietly():
            gradients, _ = compute_query_gradients(self.state, self.model, self.asked)
        self.data.requires_grad = True
        slots = [
            torch.zeros_like(slot)
            for slot in tree_iter(self.state.opt_state)
            if isinstance(slot, Tensor) and slot.is_floating_point()
        ]
        start = BackwardState(gradients, slots, torch.zeros_like(self.data.weights))
        with self._quietly():
            found = self.trainer.backward(
                str(folder), self.data, start, self.state, inplace=True, save_mode="sqrt"
            )
        return found.weight_grads.detach()


def once(folder: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Every part, in turn: its seconds; and the scores."""
    training, asked = sequences()
    spent, found = dict[str, float](), dict[str, Tensor]()
    spent["plain"], _ = seconds(lambda: plain(training))
    theirs = Theirs(training, asked)
    spent["bergson training"], _ = seconds(lambda: theirs.train(folder / "bergson"))
    spent["bergson sweep"], found["bergson"] = seconds(lambda: -theirs.sweep(folder / "bergson"))
    spent["culpa recording"], made = seconds(lambda: record(training, folder / "culpa"))
    for name, by in SWEEPS.items():
        spent[f"culpa {name}"], found[name] = seconds(lambda by=by: sweep(*made, asked, by))
    return spent, found


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two lists of scores are apart, relative to the largest."""
    both = torch.stack([ours.double(), theirs.double()])
    gap = (both[0] - both[1]).abs().max() / both[1].abs().max()
    return {"largest gap": float(gap), "correlation": float(torch.corrcoef(both)[0, 1])}


def alone(part: str) -> None:
    """One part in this process: prints by how many bytes it raised the peak of resident memory."""
    training, asked = sequences()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part == "training":
            plain(training[:BATCH])
            work: Callable[[], Any] = partial(plain, training)
        elif part == "bergson":
            theirs = Theirs(training, asked)
            theirs.train(folder)
            work = partial(theirs.sweep, folder)
        else:
            made = record(training, folder)
            work = partial(sweep, *made, asked, SWEEPS[part])
        sys.stdout.write(f"{peak(work)}\n")


def peaks() -> dict[str, int]:
    """Bytes above what was held, of every part in a process of its own."""
    command = [sys.executable, __file__, "--alone"]
    parts = ("training", "bergson", *SWEEPS)
    done = {p: subprocess.run([*command, p], capture_output=True, check=True) for p in parts}
    return {part: int(process.stdout) for part, process in done.items()}


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", default=None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers_bergson.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.alone:
        alone(given.alone)
        return
    load, rounds, found = os.getloadavg()[0], list[dict[str, float]](), dict[str, Tensor]()
    for _ in range(given.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            spent, found = once(Path(folder))
        rounds.append(spent)
        print({k: round(v / spent["plain"], 2) for k, v in spent.items()}, flush=True)
    names = [name for name in rounds[0] if name != "plain"]

    def middle(a: str, b: str) -> float:
        return round(statistics.median(r[a] / r[b] for r in rounds[1:]), 3)

    result = {
        "what": f"{UPDATES} updates of GPT-2, AdamW: sweeps over plain training, processor time",
        "machine": machine(),
        "load before": round(load, 2),
        "versions": {p: version(p) for p in ("torch", "transformers", "bergson", "culpa")},
        "repeats": given.repeats,
        "plain seconds": round(statistics.median(r["plain"] for r in rounds[1:]), 3),
        "times plain training": {name: middle(name, "plain") for name in names},
        "of bergson's sweep": {n: middle(f"culpa {n}", "bergson sweep") for n in SWEEPS},
        "against bergson's scores": {n: agreement(found[n], found["bergson"]) for n in SWEEPS},
        "peak memory, bytes": peaks(),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
