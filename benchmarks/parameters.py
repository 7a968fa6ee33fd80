"""How cost grows with the size of a base model under adapters: 1e5 to 1e8 parameters.

    python benchmarks/parameters.py [--sizes 1e5 1e6] [--out benchmarks/results/parameters.json]

A decoder of random weights (attention, gated feed-forward, as Llama has them) is frozen; adapters
of rank 8 on queries and values are trained by AdamW on random tokens, in two stages, recorded with
``frozen="reference"``. Every phase runs in a process of its own, from the same seed, so that its
peak memory is its own. Seconds are processor time of one thread, of the loop or the call alone;
memory is the peak of the whole process beyond what it held when torch and culpa were loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import culpa
from culpa.trajectory import environment

BATCH, TOKENS, UPDATES, RANK, WORDS = 2, 64, 8, 8, 256
HEAD = 16
"""Width of an attention head."""
PHASES = ("plain", "record", "replay", "attribute", "attribute, on disk")
SHAPES = {1e5: (64, 2), 1e6: (160, 3), 1e7: (384, 6), 1e8: (768, 14), 3e8: (1024, 24)}
"""Width and depth."""


class Adapted(nn.Module):
    """A frozen linear map and a trained one of low rank beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, RANK, bias=False)
        self.up = nn.Linear(RANK, width, bias=False)
        nn.init.normal_(self.up.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    """Causal attention, then a gated feed-forward, each behind a norm and a residual."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.heads = width // head
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.value = Adapted(width), Adapted(width)
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same."""
        y = self.before(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        y = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens ``[batch, tokens]`` to the logits of the next ones."""

    def __init__(self, width: int, depth: int, head: int = HEAD) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.blocks = nn.Sequential(*(Block(width, head) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)
        for name, p in self.named_parameters():
            p.requires_grad_(".query.up." in name or ".query.down." in name
                             or ".value.up." in name or ".value.down." in name)  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.norm(self.blocks(self.words(tokens))))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def log_likelihoods(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of each sequence, by token."""
    logits, after = model(tokens[:, :-1]), tokens[:, 1:]
    return -nn.functional.cross_entropy(logits.transpose(1, 2), after, reduction="none").mean(1)


def batches(seed: int) -> list[Tensor]:
    """``UPDATES / 2`` batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, TOKENS + 1)
    return [torch.randint(WORDS, shape, generator=generator) for _ in range(UPDATES // 2)]


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


def peak() -> int:
    """Bytes: the most this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm() -> None:
    """Load what torch and culpa load with their first use: seconds that no size explains."""
    model = Decoder(*SHAPES[1e5])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss(model, batches(0)[0]).backward()
    optimizer.step()
    assert all(callable(f) for f in (culpa.record, culpa.replay, culpa.attribute, culpa.OnDisk))


def phase(what: str, size: float, path: Path) -> dict[str, float]:
    """One phase, in this process."""
    warm()
    loaded = peak()
    torch.manual_seed(0)
    model = Decoder(*SHAPES[size])
    trained = [p for p in model.parameters() if p.requires_grad]
    problem = culpa.Problem(model, loss)
    stages = {"one": batches(1), "two": batches(2)}
    found: dict[str, float] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
    }

    def update(optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    def plainly() -> None:
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for each in stages.values():
            for batch in each:
                update(optimizer, batch)

    def recorded() -> None:
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        with culpa.record(path, problem, optimizer, frozen="reference") as recorder:
            for name, each in stages.items():
                with recorder.stage(name):
                    for batch in recorder.batches(each):
                        update(optimizer, batch)

    if what in ("plain", "record"):
        found["seconds"] = timed(plainly if what == "plain" else recorded)
    else:
        run = culpa.open_run(path)
        asked = culpa.Behaviour("test", log_likelihoods, batches(3)[0])
        if what == "replay":
            found["seconds"] = timed(lambda: culpa.replay(run, problem, without=[0]))
        else:
            hold = culpa.OnDisk(path.parent) if what != "attribute" else None
            found["seconds"] = timed(lambda: culpa.attribute(run, problem, [asked], hold=hold))
        found["bytes"] = run.bytes_on_disk
        found["states"] = len(run.kept_states)
    return found | {"memory": peak() - loaded}


def measured(size: float) -> dict[str, dict[str, float]]:
    """All phases of one size, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="culpa-bench-") as folder:
        for what in PHASES:
            command = [sys.executable, __file__, "--phase", what, "--sizes", f"{size:g}"]
            done = subprocess.run(
                [*command, "--path", str(Path(folder, "run"))],
                check=True,
                capture_output=True,
                text=True,
            )
            found[what] = json.loads(done.stdout)
            print(f"  {what}: {found[what]}", file=sys.stderr)
    return found


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.phase:
        print(json.dumps(phase(given.phase, given.sizes[0], given.path)))
        return
    results: list[dict[str, object]] = []
    for size in given.sizes:
        print(f"{size:g} parameters", file=sys.stderr)
        found = measured(size)
        plain = found["plain"]
        results.append(
            {
                "parameters": plain["parameters"],
                "trained": plain["trained"],
                "seconds_an_update": plain["seconds"] / UPDATES,
                "memory_of_training": plain["memory"],
                "bytes_on_disk": found["replay"]["bytes"],
                "kept_states": found["replay"]["states"],
                "time": {w: found[w]["seconds"] / plain["seconds"] for w in PHASES[1:]},
                "memory": {w: found[w]["memory"] / plain["memory"] for w in PHASES[1:]},
            }
        )
    whole = {
        "what": "adapters on a frozen decoder; ratios to plain training of the same model",
        "culpa": culpa.__version__,
        "machine": environment.capture(()),
        "updates": UPDATES,
        "tokens_a_batch": BATCH * TOKENS,
        "results": results,
    }
    print(json.dumps(results, indent=1))
    if given.out:
        given.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
