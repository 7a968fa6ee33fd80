"""The report's charts as PNG or SVG pictures, for places that show no web page."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Final

from culpa.auditing.record import AuditRecord
from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.report.charts.theme import Drawing
from culpa.report.panels import panel
from culpa.report.record_check import checked

WIDTH: Final = 760
"""Pixels, before scaling."""
SCALE: Final = 2.0
WORDS: Final = ("datasets", "params", "description")


KINDS: Final = ("png", "svg")


def figures(record: AuditRecord, kind: str = "png") -> list[tuple[str, str, bytes]]:
    """``(behaviour, "stages" or "updates", file)`` for every chart of the report, in light colours.

    Raises:
        UnsupportedError: if Altair or vl-convert is not installed.
        OptionError: if the record contradicts itself, or for another kind of picture.
    """
    if kind not in KINDS:
        raise OptionError(f"figures are {' or '.join(KINDS)}, got {kind!r}.")
    record = checked(record)
    found: list[tuple[str, str, bytes]] = []
    for q, behaviour in enumerate(record.behaviours):
        charts = panel(record, q)
        for name, drawing in (("stages", charts.bars), ("updates", charts.strip)):
            if drawing is not None:
                found.append((behaviour.name, name, _picture(drawing, kind)))
    return found


def _picture(drawing: Drawing, kind: str) -> bytes:
    try:
        import vl_convert
    except ImportError as error:
        raise UnsupportedError(
            "figures need vl-convert, which is not installed. Run: pip install 'culpa[report]'."
        ) from error
    # Words of the record stand in these, never in colours or expressions (charts/theme.py).
    words = {key: drawing.spec[key] for key in WORDS if key in drawing.spec}
    spec = {key: value for key, value in drawing.spec.items() if key not in WORDS}
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", _style().partition("}")[0]))
    text = re.sub(r"var\(--([\w-]+)\)", lambda m: colours[m[1]], json.dumps(spec))
    page = json.loads(text.replace("containerSize()[0]", str(WIDTH))) | words
    page |= {"width": WIDTH, "autosize": {"type": "fit-x", "contains": "padding"}, "padding": 12}
    page["config"] |= {"background": colours["surface"]}
    if kind == "svg":
        return vl_convert.vegalite_to_svg(json.dumps(page)).encode()
    return bytes(vl_convert.vegalite_to_png(json.dumps(page), scale=SCALE))


def write(record: AuditRecord, folder: Path, kind: str = "png") -> list[Path]:
    """Write every chart into ``folder``, as ``stages-0.png`` for the first behaviour; the files.

    Raises:
        StoreError: if a file cannot be written.
        and whatever ``figures`` raises.
    """
    numbers = {behaviour.name: q for q, behaviour in enumerate(checked(record).behaviours)}
    written: list[Path] = []
    for behaviour, name, data in figures(record, kind):
        path = folder / f"{name}-{numbers[behaviour]}.{kind}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}.") from error
        written.append(path)
    return written


def _style() -> str:
    return files("culpa.report").joinpath("style.css").read_text(encoding="utf-8")
