"""What must stand in the environment before torch is loaded: read from the run, then start anew.

Libraries read these variables while they are loaded, so a process that finds itself unlike the
recording one replaces itself by one that begins with the recorded variables. A folder may only set
the variables that are listed in ``environment_fields``, and only to plain words and numbers.

Without a recorded run among the arguments nothing here loads torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("replay", "verify", "audit", "forecast")
MARK = "CULPA_STARTED_ANEW"
PLAIN = re.compile(r"[\w:,.+-]{1,64}")


def prepare(arguments: Sequence[str]) -> None:
    """Replace this process by one with the recorded variables, if they differ and matter."""
    if os.environ.pop(MARK, None) or not arguments or arguments[0] not in COMMANDS:
        return
    if arguments[0] == "verify" and not any(a.startswith("--problem") for a in arguments):
        return  # digests do not depend on it
    # Called from another program, its arguments are not ours to repeat.
    if not sys.executable or list(arguments) != sys.orig_argv[-len(arguments) :]:
        return
    recorded = recorded_environment(arguments)
    if not recorded:  # told apart before torch is loaded
        return
    import torch

    wanted = changes(recorded, os.environ, torch.get_num_threads())
    if not wanted:
        return
    said = ", ".join(f"{n}={v}" if v else f"{n} unset" for n, v in sorted(wanted.items()))
    sys.stderr.write(f"Starting again as it was recorded: {said}\n")
    sys.stderr.flush()
    kept = {name: value for name, value in os.environ.items() if name not in wanted}
    variables = kept | {name: value for name, value in wanted.items() if value} | {MARK: "1"}
    command = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "nt":  # where exec gives the terminal back to the shell at once
        sys.exit(subprocess.call(command, env=variables))
    os.execve(sys.executable, command, variables)


def recorded_environment(arguments: Sequence[str]) -> dict[str, Any]:
    """The environment in the manifest of the first argument that is a run folder; empty if none."""
    for argument in arguments[1:]:
        try:
            manifest = json.loads(Path(argument, "culpa.json").read_bytes())
        except (OSError, ValueError):
            continue
        found = manifest.get("environment") if isinstance(manifest, dict) else None
        return found if isinstance(found, dict) else {}
    return {}


def changes(
    recorded: Mapping[str, Any], environ: Mapping[str, str], threads: int
) -> dict[str, str | None]:
    """Which variables to set, or with ``None`` to unset, so that torch loads as it was recorded.

    Args:
        recorded: the manifest's environment, not to be trusted.
        environ: this process's variables.
        threads: how many torch uses here.
    """
    if not recorded:
        return {}
    from culpa.trajectory.environment_fields import MOST_THREADS, NOWHERE, VARIABLES, matters

    device = str(recorded.get("device", "cpu"))
    wanted: dict[str, str | None] = {}
    for name, where in VARIABLES.items():
        there, here = recorded.get(f"${name}"), environ.get(name)
        if there is None:
            if here is not None and matters(f"${name}", device):
                wanted[name] = None
        elif there != here and (where == NOWHERE or matters(f"${name}", device)):
            wanted[name] = str(there)
    many = str(recorded.get("threads", threads))
    if many.isdecimal() and 1 <= int(many) <= MOST_THREADS and int(many) != threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            if f"${name}" not in recorded and (name in environ or name.startswith("OMP")):
                wanted[name] = many
    return {n: v for n, v in wanted.items() if v is None or PLAIN.fullmatch(v)}
