"""Has something become twice as expensive? A few ratios against the committed ones.

    python benchmarks/guard.py            # exit code 1, and which, if one is over twice its own
    python benchmarks/guard.py --write    # measure anew and commit them

A 784-128-128-10 GELU perceptron, 30 updates of batches of 100, SGD with momentum: what recording,
``replay`` without the first update, ``attribute`` for one behaviour by exact products, and each
further behaviour take, over the plain loop. Of recording the processor time of all threads counts,
and what the training thread takes inside of the loop; of the others the time undisturbed (see
spent.py). Each is the least of some rounds, so that a busy machine disturbs little; a suspicion is
measured again, and stands only if every try has it. tests/test_benchmarks.py runs this, in a
process of its own because there every annotation of the package is checked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from spent import seconds, undisturbed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

UPDATES, BATCH, ROUNDS, TRIES = 30, 100, 2, 3
FURTHER = 2
"""Behaviours beside the first."""
MARGIN = 2.0
COMMITTED = Path(__file__).parent / "results" / "guard.json"
Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """The one whose recording is to cost little: an update takes about a millisecond."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def data(count: int, size: int) -> list[Batch]:
    """Made-up batches, no two alike."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, size, 784, generator=generator)
    targets = torch.randint(10, (count, size), generator=generator)
    return list(zip(inputs, targets, strict=True))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """What the loops minimise."""
    return cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    """The training."""
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def plain(batches: list[Batch]) -> None:
    """With nothing around it."""
    model = network()
    loop(model, sgd(model), batches)


def record(batches: list[Batch], folder: Path) -> float:
    """The same, recorded: what the training thread took inside of the loop."""
    model = network()
    problem, optimizer = culpa.Problem(model, loss), sgd(model)
    with culpa.record(folder, problem, optimizer) as recorder:
        return undisturbed(lambda: loop(model, optimizer, recorder.batches(batches)))[0]


def once(batches: list[Batch], folder: Path) -> dict[str, float]:
    """Seconds of every part, in turn."""
    spent = {"plain": undisturbed(lambda: plain(batches))[0]}
    spent["recording"], spent["loop"] = seconds(lambda: record(batches, folder))
    run, problem = culpa.open_run(folder), culpa.Problem(network(), loss)
    asked = [
        culpa.log_likelihood(f"part {i}", part) for i, part in enumerate(data(1 + FURTHER, 25))
    ]

    def attribute(count: int) -> Callable[[], culpa.Scores]:
        exact = culpa.Exact(hvp="reverse-over-reverse")
        return lambda: culpa.attribute(run, problem, asked[:count], propagator=exact)

    spent["replay"], _ = undisturbed(lambda: culpa.replay(run, problem, without=[0]))
    spent["attribute"], _ = undisturbed(attribute(1))
    spent["attribute more"], _ = undisturbed(attribute(1 + FURTHER))
    return spent


def measure(rounds: int = ROUNDS) -> dict[str, float]:
    """Every ratio: of the least seconds of its part and of the plain loop."""
    batches, least = data(UPDATES, BATCH), dict[str, float]()
    for _ in range(rounds + 1):  # the first warms up, and cannot be the least
        with tempfile.TemporaryDirectory() as folder:
            for name, spent in once(batches, Path(folder, "run")).items():
                least[name] = min(spent, least.get(name, spent))
    further = (least["attribute more"] - least["attribute"]) / FURTHER
    return {
        "recording": least["recording"] / least["plain"],
        "recording, in the loop": least["loop"] / least["plain"],
        "replay": least["replay"] / least["plain"],
        "attribute, exact": least["attribute"] / least["plain"],
        "each further behaviour": further / least["plain"],
    }


def slips(found: Mapping[str, float], committed: Mapping[str, float]) -> dict[str, str]:
    """What is over the margin, by name, in words."""
    return {
        name: f"{name}: {found[name]:.2f} times plain training, committed are {was:.2f}"
        for name, was in committed.items()
        if not found[name] <= MARGIN * was
    }


def check(committed: Mapping[str, float]) -> str:
    """What is over the margin in every try, in words; measured again as long as something is."""
    suspected, said = set(committed), dict[str, str]()
    for _ in range(TRIES):
        found = measure()
        if set(found) != set(committed):
            return f"committed are {sorted(committed)}, measured {sorted(found)}; --write."
        print({name: round(ratio, 2) for name, ratio in found.items()}, flush=True)
        said = {name: words for name, words in slips(found, committed).items() if name in suspected}
        suspected = set(said)
        if not said:
            return ""
    return "\n".join([*said.values(), "Found in every try; if it is meant: --write."])


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="commit what is measured now")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.write:
        found = {name: round(ratio, 2) for name, ratio in measure(3 * ROUNDS).items()}
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found))
        return
    sys.exit(check(json.loads(COMMITTED.read_text(encoding="utf-8"))) or 0)


if __name__ == "__main__":
    main()
