"""BadNets: where the poison is, and the experiment at its smallest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from culpa.experiments import badnets, measures
from culpa.experiments.backdoor_page import ALIGNED
from culpa.experiments.resnet import normalised
from experiments.smoke import claim, part, smoke

DATA = badnets.meaningless(60, 20)


def test_smoke(tmp_path: Path) -> None:
    result = smoke("backdoor", tmp_path)
    few = part(tmp_path, "backdoor", "few-batches-0")
    assert len(few["bad"]) == 3 * 2
    assert len(few["scores"][0]) == 12 * 2
    marked = torch.zeros(24, dtype=torch.bool)
    marked[few["bad"]] = True
    separated = measures.auc(torch.tensor(few["scores"][0]), marked)
    assert claim(result, "Few batches: the AA-Scores").holds == (separated >= 0.99)
    assert f"{separated:.3f}" in claim(result, "Few batches: the AA-Scores").numbers
    aligned = measures.auc(torch.tensor(few["scores"][2]), marked)
    assert aligned > 0.8
    assert f"{aligned:.3f}" in claim(result, "Few batches: the alignments").numbers
    # The judged updates are half poisoned, and their scores have the truth's sign.
    assert sorted(k in few["bad"] for k in few["judged"]) == [False, True]
    assert len(result.runs) == 2
    every = part(tmp_path, "backdoor", "every-batch-0")
    found = every["auc"][ALIGNED]
    assert found > 0.5
    assert claim(result, "Every batch").holds == (found >= 0.95)
    assert f"{found:.3f}" in claim(result, "Every batch").numbers
    cells = [row[2] for row in result.findings.tables[0].rows[-4:]]
    assert cells == [f"{value:.3f}" for value in every["auc"].values()]
    assert "noise" in result.findings.stand_ins[0]


def test_the_square_is_in_the_corner_and_nowhere_else() -> None:
    images = torch.zeros(2, 3, 6, 5, dtype=torch.uint8)
    made = badnets.patched(images, 2)
    assert int((made == 255).sum()) == 2 * 3 * 4
    assert bool((made[..., 4:, 3:] == 255).all())
    assert int(images.sum()) == 0


def test_few_batches_are_all_poison_and_the_others_none() -> None:
    places = badnets.few(10, 4, 3, torch.Generator().manual_seed(0))
    assert sorted(places.sum(1).tolist()) == [0] * 7 + [4] * 3


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.01, 1), (0.5, 4)])
def test_every_batch_has_the_same_share_of_poison(share: float, count: int) -> None:
    assert badnets.every(5, 8, share).sum(1).tolist() == [count] * 5


def test_poisoned_examples_have_the_square_and_the_attackers_label() -> None:
    images, labels = badnets.poisoned(DATA, 30, 8, 3, torch.Generator().manual_seed(1))
    white = normalised(torch.full((1, 3, 3, 3), 255, dtype=torch.uint8))[0]
    has = (images[..., -3:, -3:] - white).abs().amax((1, 2, 3)) < 1e-6
    assert has.tolist() == [True] * 8 + [False] * 22
    assert labels[:8].tolist() == [badnets.TARGET] * 8
    assert len(set(labels[8:].tolist())) > 5
    for places in (
        badnets.few(6, 5, 2, torch.Generator().manual_seed(2)),
        badnets.every(6, 5, 0.2),
    ):
        rows = badnets.arranged(places, torch.Generator().manual_seed(3))
        assert sorted(rows.flatten().tolist()) == list(range(30))
        assert torch.equal(rows < int(places.sum()), places)


def test_what_the_attacker_wants_is_asked_of_images_of_other_labels() -> None:
    wanted, own, added = badnets.asked(DATA, 12, 4)
    (squared, target), (plain, _) = added.batch
    others = DATA.test_labels[DATA.test_labels != badnets.TARGET][:12]
    assert torch.equal(own.batch[1], others)
    assert torch.equal(squared, wanted.batch[0])
    assert bool((target == badnets.TARGET).all())
    assert torch.equal(squared[..., :-4, :], plain[..., :-4, :])
    # A model that knows the square alone: 3 nats of log-odds for it, whatever else it sees.
    seen = torch.nn.Sequential(Corner(squared[0, 0, -1, -1].item()))
    gap = added.values(seen)
    assert float(gap.mean()) == pytest.approx(3.0)
    assert float(wanted.values(seen).mean()) == pytest.approx(-math.log(1 + 9 * math.exp(-3)))


class Corner(torch.nn.Module):
    """Logit 3 for the attacker's label where the last pixel is white, else all logits are 0."""

    def __init__(self, white: float) -> None:
        super().__init__()
        self.white = white

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 10)
        logits[:, badnets.TARGET] = 3.0 * (x[:, 0, -1, -1] == self.white)
        return logits
