"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

RunPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The folder given to culpa.record, or an address such as s3://..."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead.")]
AllowDrift = Annotated[
    bool,
    typer.Option(
        "--allow-drift",
        help="In another environment: measure the drift and go on, instead of refusing.",
    ),
]
ProblemName = Annotated[
    str,
    typer.Option(
        "--problem",
        metavar="MODULE:FUNCTION",
        help=(
            "A function without arguments that returns (problem, behaviours); found like an import "
            "from the current folder."
        ),
    ),
]
ShowName = Annotated[
    str | None,
    typer.Option(
        "--show",
        metavar="as-is|MODULE:FUNCTION",
        help=(
            "Show training examples in the page: as they are, or what a function makes of each, a"
            " text or a tensor."
        ),
    ),
]
Removal = Annotated[
    str,
    typer.Option(help="What 'without' means: skip, restart or zero-gradient.", metavar="MEANING"),
]
Anyway = Annotated[
    bool,
    typer.Option("--anyway", help="Do not ask or refuse where memory or disk would not suffice."),
]
