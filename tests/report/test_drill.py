"""Below the stages: examples as what they are, only where asked, and layers that add up."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.record import (
    AuditRecord,
    ExampleFindings,
    LayerFindings,
    PlaceboFinding,
    WindowFinding,
)
from culpa.report.conduct import WINDOWS, conduct, windows
from culpa.report.drill import LAYERS, STAGES, drills
from culpa.report.html import render
from culpa.report.picture import LARGEST, data_address, image_shaped
from culpa.report.showing import LETTERS, SHOWN, as_it_is, shown_examples
from report.page import Page

pytest.importorskip("altair", reason="needs: pip install 'culpa[report]'")
pytest.importorskip("vl_convert", reason="needs: pip install 'culpa[report]'")

replace = msgspec.structs.replace
COUNT, BATCH = 12, 4


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(COUNT, 1, 6, 5, generator=generator), torch.arange(COUNT) % 3


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(model(batch["picture"]), batch["label"], reduction="none")


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return losses(model, batch).mean()


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[culpa.Run, culpa.Audit]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 3))
    problem = culpa.Problem(model, mean_loss, losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = pictures()
    path = tmp_path_factory.mktemp("drill") / "run"
    with culpa.record(path, problem, optimizer) as recorder:
        for name in ("first", "second"):
            with recorder.stage(name):
                parts = [slice(i, i + BATCH) for i in range(0, COUNT, BATCH)]
                loader = [{"picture": images[p], "label": labels[p]} for p in parts]
                for batch in recorder.batches(loader):
                    optimizer.zero_grad()
                    mean_loss(model, batch).backward()
                    optimizer.step()
    batch = {"picture": images, "label": labels}
    behaviour = culpa.Behaviour("right", lambda m, b: -losses(m, b), batch)
    run = culpa.open_run(path)
    return run, culpa.audit(run, problem, [behaviour], budget=3.0)


def pixels(address: str) -> Tensor:
    """A PNG of filter 0 read back, [h, w, channels]; its checksums are checked."""
    head, data = address.split(",")
    assert head == "data:image/png;base64"
    png = base64.b64decode(data)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, parts = 8, {}
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        parts[kind] = body
        at += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    channels = {0: 1, 2: 3}[colour]
    assert depth == 8
    lines = torch.tensor(list(zlib.decompress(parts[b"IDAT"])), dtype=torch.uint8)
    lines = lines.view(height, 1 + width * channels)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (6, 5, 3)])
def test_a_picture_holds_the_pixels(shape: tuple[int, ...]) -> None:
    image = torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert image_shaped(image)
    channels_last = image.permute(1, 2, 0) if shape[0] in (1, 3) else image
    expected = channels_last.reshape(6, 5, -1)
    assert torch.equal(pixels(data_address(image)), expected)
    stretched = pixels(data_address(image.double() * 0.01 - 3.0))
    low, high = int(image.min()), int(image.max())
    assert torch.allclose(
        stretched.double(), (expected.double() - low) * 255 / (high - low), atol=0.501
    )


def test_what_is_no_picture_and_what_is_too_large() -> None:
    for value in (torch.zeros(30), torch.zeros(2, 6, 5), torch.zeros(6, 3), torch.arange(36)):
        assert not image_shaped(value)
    large = pixels(data_address(torch.rand(1000, 300)))
    assert max(large.shape) <= LARGEST
    assert not pixels(data_address(torch.full((6, 5), math.nan))).any()


def test_examples_are_shown_as_what_they_are() -> None:
    told = as_it_is({"picture": torch.rand(1, 6, 5), "label": torch.tensor(7)})
    assert pixels(told.picture).shape == (6, 5, 1)
    assert told.text == "label: 7"
    row = as_it_is((torch.arange(9.0), torch.tensor(2)))
    assert row.picture == ""
    assert row.text == "0, 1.00, 2.00, 3.00, 4.00, 5.00, … (9); 2"
    assert len(as_it_is("x" * 9999).text) == LETTERS


def test_no_example_is_shown_unless_it_is_asked_for(audited: tuple[culpa.Run, culpa.Audit]) -> None:
    _, audit = audited
    assert audit.record.examples[0].helpful
    document = render(audit.record)
    assert "data:image" not in document
    assert not Page(document).all("img")
    with pytest.raises(culpa.OptionError, match="give both"):
        render(audit.record, show=str)


def test_the_examples_named_are_those_shown(
    audited: tuple[culpa.Run, culpa.Audit], tmp_path: Path
) -> None:
    run, audit = audited
    audit.to_html(tmp_path / "page.html", run=run)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    found = audit.record.examples[0]
    named = [*found.harmful[:SHOWN], *found.helpful[:SHOWN]]
    shown = page.all("img")
    assert [e.attributes["alt"] for e in shown] == [f"Training example {i}" for i in named]
    images, labels = pictures()
    for i, picture in zip(named, shown, strict=True):  # rows are numbered as they first came
        grey = images[i, 0]
        expected = (grey - grey.min()) / (grey.max() - grey.min()) * 255
        got = pixels(picture.attributes["src"])[:, :, 0].double()
        assert torch.allclose(got, expected.double(), atol=0.501)
        card = page.below(picture.parents[-1], "p")[0]
        assert card.text == f"label: {labels[i]}"


@pytest.mark.parametrize(
    ("made", "picture", "text"),
    [
        ("a <b>word\x1b[31m", False, "a <b>word\ufffd[31m"),
        (torch.rand(6, 5), True, ""),
        ((torch.rand(6, 5), "caption"), True, "caption"),
    ],
)
def test_a_function_of_the_user_decides_what_is_shown(
    made: Any, picture: bool, text: str, audited: tuple[culpa.Run, culpa.Audit]
) -> None:
    run, audit = audited
    seen: list[Any] = []

    def show(example: Any) -> Any:
        seen.append(example)
        return made

    found = shown_examples(audit.record, run, show)
    assert found
    assert all((bool(s.picture), s.text) == (picture, text) for s in found.values())
    assert all(e["picture"].shape == (1, 6, 5) and e["label"].shape == () for e in seen)
    if "<b>" in text:
        page = Page(render(audit.record, run=run, show=show))
        assert not [e for e in page.all("b") if "word" in e.text]
        assert text in page.one("section", id="drill").text


def test_another_run_and_another_type_are_refused(audited: tuple[culpa.Run, culpa.Audit]) -> None:
    run, audit = audited
    with pytest.raises(culpa.OptionError, match="show returns a text, a tensor"):
        shown_examples(audit.record, run, lambda example: 3)
    other = replace(audit.record, run=replace(audit.record.run, root_digest="blake3:0"))
    with pytest.raises(culpa.OptionError, match="its examples have other numbers"):
        shown_examples(other, run, None)


def test_layers_add_up_to_the_effect(audited: tuple[culpa.Run, culpa.Audit]) -> None:
    _, audit = audited
    (drill,) = drills(audit.record, {})
    for row, stage in zip(drill.rows, audit.record.stages, strict=True):
        assert row.effect == pytest.approx(stage.replayed[0])
        assert math.fsum([*row.parts, row.others, row.rest]) == pytest.approx(row.effect)
        assert row.updates == stage.sums[0]


def test_many_layers_stages_and_windows_are_cut(build: Callable[..., AuditRecord]) -> None:
    names = [f"s{i}" for i in range(40)]
    record = build(stages=names, behaviours=[("right", "nats")], steps=80)
    effects = {f"layer {j}": 0.01 * j for j in range(9)}
    record = replace(
        record,
        layers=[
            LayerFindings(
                stage=n,
                behaviour="right",
                effects=effects | {"layer 8": float(i)},
                rest=0.5,
            )
            for i, n in enumerate(names)
        ],
        windows=[
            WindowFinding(start=k, stop=k + 1, jumps=[0.1 * k], replayed=[9.0] if k == 3 else None)
            for k in range(80)
        ],
    )
    (drill,) = drills(record, {})
    assert drill.layers == ["layer 8", *(f"layer {j}" for j in (7, 6, 5, 4))]
    assert (len(drill.layers), drill.more_layers) == (LAYERS, 4)
    assert [row.stage for row in drill.rows] == names[-STAGES:]
    assert drill.rows[0].others == pytest.approx(0.01 * (1 + 2 + 3))
    listed = windows(record)
    assert len(listed) == WINDOWS
    assert [w.start for w in listed][:3] == [3, 79, 78]
    text = Page(render(record)).one("section", id="conduct").text
    assert "80 windows examined, 1 of them left out and replayed" in text


def test_how_the_audit_was_conducted_is_told(record: AuditRecord) -> None:
    record = replace(
        record,
        budget=1.0,
        used=0.75,
        stopped="the budget was used up",
        settled=[True, False, True],
        placebos=[
            PlaceboFinding(kind="rounding", at=3, effects=[0.2, -1e-9, 0.0]),
            PlaceboFinding(kind="neutral update", at=9, effects=[-0.03, 0.0, 0.0]),
        ],
        tradeoffs=["One was bought at the price of another."],
        examples=[
            ExampleFindings(behaviour="none", helpful=[], harmful=[], scores={}, updates={}),
        ],
    )
    said = list(conduct(record))
    assert said[0].startswith("Spent 0.75 of 1 trainings")
    names = [b.name for b in record.behaviours]
    assert said[1].startswith(f"Not settled at 95 %: which stage comes first for {names[1]}.")
    assert f"rounding noise moved {names[0]} by up to 0.20 nats" in said[2]
    assert "skipping a neutral update moved it by −0.030 nats beyond its score" in said[2]
    assert "less than a thousandth of the largest effect" in said[3]
    page = Page(render(record))
    text = page.one("section", id="conduct").text
    assert all(line in text for line in said if line not in record.tradeoffs)
    assert record.tradeoffs[0] in page.one("section", id="matrix").text
