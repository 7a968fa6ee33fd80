"""``culpa forecast``, what an audit says of its cost, and what every command has in common."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.test_commands import Ask, P, ask, flat, train
from culpa.cli import announce as module
from culpa.report import forecast as view

__all__ = ["ask"]
COMMANDS = ("audit", "demo", "forecast", "inspect", "replay", "report", "reproduce", "verify")
PLAN = """

def plan():
    task, behaviours = problem()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    stages = {"early": 300, "late": 200}
    return culpa.Plan(task, optimizer, [data(i) for i in range(4)], stages), behaviours
"""


def test_forecast_of_a_run(ask: Ask) -> None:
    run = train()
    answer = ask("forecast", "run", *P)
    assert answer.code == 0
    assert max(map(len, answer.out.splitlines())) <= 80
    assert re.search(r"^audit +(up to )?[\d.]+ s +\d+ MB", answer.out, re.MULTILINE)
    assert f"{run.num_steps} updates of" in flat(answer.out)
    elsewhere = ("--hold", "disk", "--half", "--processes", "2")
    facts = json.loads(ask("forecast", "run", *P, "--json", *elsewhere).out)
    attribute = facts["jobs"]["attribute"]
    assert attribute["processes"] == 2
    assert attribute["disk"] > 0
    assert set(facts["jobs"]) == {"replay", "attribute", "embed", "audit"}
    assert facts["missing"] == {}
    assert facts["jobs"]["replay"]["memory"] > 50e6


def test_forecast_of_a_plan(ask: Ask) -> None:
    with Path("small.py").open("a") as file:
        file.write(PLAN)
    facts = json.loads(ask("forecast", "--problem", "small:plan", "--json").out)
    assert facts["updates"] == 500
    assert facts["jobs"]["record"]["disk"] > 100_000
    assert not list(Path().glob("run*"))
    wrong = ask("forecast", *P)
    assert (wrong.code, wrong.out) == (2, "")
    assert "must return a culpa.Plan" in flat(wrong.err)
    assert ask("forecast").code == 2


def test_an_audit_says_beforehand_what_it_takes(ask: Ask) -> None:
    train()
    answer = ask("audit", "run", *P, "--json")
    assert "by the recorder's clock" in flat(answer.err)
    assert json.loads(answer.out)["verdicts"]


def test_an_audit_that_does_not_fit_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    train()
    monkeypatch.setattr(module, "WORTH", 0.0)
    fits = ask("audit", "run", *P)
    assert fits.code == 0
    assert re.search(r"The audit will take .* s and [\d.]+ MB of memory", flat(fits.err))
    monkeypatch.setattr(view, "memory_left", lambda: -1)
    refused = ask("audit", "run", *P, "--out", "other")
    assert refused.code == 1
    assert "audit would take" in flat(refused.err)
    assert "--anyway" in flat(refused.err)
    assert not Path("other/audit.json").exists()
    assert ask("audit", "run", *P, "--out", "other", "--anyway").code == 0


def test_the_report_is_exported(ask: Ask) -> None:
    train()
    assert ask("audit", "run", *P, "--out", "found").code == 0
    answer = ask("report", "found/audit.json", "--markdown", "card.md", "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == {"report": "found/audit.html", "written": ["card.md"]}
    assert Path("card.md").read_text().startswith("## Training accountability")
    nowhere = ask("report", "found/audit.json", "--markdown", "no/such/card.md")
    assert (nowhere.code, nowhere.out) == (1, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_json_at_80_columns(command: str, ask: Ask) -> None:
    answer = ask(command, "--help")
    assert f"Example: culpa {command}" in flat(answer.out)
    assert max(map(len, answer.out.splitlines())) <= 80
    if command != "reproduce":  # which writes pages
        assert "--json" in answer.out


def test_the_shell_completes_commands(ask: Ask) -> None:
    assert "--install-completion" in ask("--help").out
