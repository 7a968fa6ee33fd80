"""The commands as a person at a terminal of 80 columns, and as a script, meets them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from torch import nn

import culpa
from culpa.cli import main
from culpa.cli.summary import Summary

PROBLEM = """
import torch
import culpa
from torch import nn

CALLS = []

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def loss(model, batch):
    CALLS.append(1)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)

def problem():
    return culpa.Problem(net(), loss), [culpa.log_likelihood("test", data(9))]

def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

def with_examples():
    return culpa.Problem(net(), loss, losses), [culpa.log_likelihood("test", data(9))]

def words(example):
    return f"in words: {int(example[1])}"

def wrong_loss():
    return culpa.Problem(net(), lambda model, batch: loss(model, batch) * 1.01), []

def broken():
    raise ZeroDivisionError("in the user's own code")

def nothing():
    return 3
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command line in a folder that holds the run ``run`` and the problem ``small``."""
    (tmp_path / "small.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    sys.modules.pop("small", None)
    monkeypatch.setenv("COLUMNS", "80")

    def answer(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["culpa", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return answer


def train(
    path: str = "run",
    model: nn.Module | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> culpa.Run:
    import small  # pyright: ignore[reportMissingImports]

    model = model or small.net()
    stepper = optimizer(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(stepper, 4, 0.1)
    with culpa.record(path, culpa.Problem(model, small.loss), stepper) as recorder:
        for name in ("early", "late [bold]stage"):
            with recorder.stage(name):
                for batch in recorder.batches([small.data(i) for i in range(3)]):
                    stepper.zero_grad()
                    small.loss(model, batch).backward()
                    stepper.step()
                    schedule.step()
    return culpa.open_run(path)


def edit_manifest(**changes: Any) -> None:
    path = Path("run/culpa.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flat(text: str) -> str:
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------
# inspect


def test_inspect_is_one_screen_of_80_columns(ask: Ask) -> None:
    run = train()
    import small  # pyright: ignore[reportMissingImports]

    small.CALLS.clear()
    answer = ask("inspect", "run")
    assert not small.CALLS, "executed something"
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    assert [i for i, line in enumerate(lines) if not line.strip()], "no blank line between tables"
    said = flat(answer.out)
    assert run.root_digest in said
    assert "43 parameters in 4 tensors" in said
    assert "6 updates in 2 stages over 18 distinct examples" in said
    assert "closed" in said
    assert f"{len(run.kept_states)} of 7 states kept" in said
    assert "late [bold]stage 3 to 5 SGD 0.01 to 0.1" in said  # shown as it is, not as markup
    assert "early 0 to 2 SGD 0.1" in said
    assert re.search(r"replay .* 1\.3 .* attribute .* 7\.5 .* embed .* 3\.8 ", said)


def test_inspect_as_json(ask: Ask) -> None:
    run = train()
    answer = ask("inspect", "run", "--json")
    summary = msgspec.json.decode(answer.out, type=Summary)
    assert summary.root_digest == run.root_digest
    assert [(s.name, s.start, s.stop) for s in summary.stages] == [
        (s.name, s.start, s.stop) for s in run.stages
    ]
    assert sum(summary.bytes.values()) == run.bytes_on_disk
    assert summary.updates == 6
    assert summary.parameters == 43
    assert summary.training_seconds == run.manifest.plain_seconds
    replay, attribute, embed = summary.jobs
    plain = run.manifest.plain_seconds
    assert replay.seconds == pytest.approx(1.3 * plain)
    assert embed.seconds == pytest.approx((1.3 + 5.0 * 3 / 6) * plain)  # 3 updates after stage 1
    assert attribute.possible
    assert embed.possible


class Averaging(nn.Module):
    """Keeps an average of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(5))
        self.average: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * inputs.mean(0))
        return inputs


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (
            {"optimizer": torch.optim.Rprop},
            "its step depends on gradients through their signs only",
        ),
        (
            {"model": nn.Sequential(nn.Linear(4, 5), Averaging(), nn.Linear(5, 3))},
            "training changed the buffer",
        ),
    ],
    ids=["optimizer", "another buffer"],
)
def test_inspect_says_what_cannot_be_attributed_and_why(
    build: dict[str, Any], why: str, ask: Ask
) -> None:
    train(**build)
    jobs = json.loads(ask("inspect", "run", "--json").out)["jobs"]
    assert [job["possible"] for job in jobs] == [True, False, False]
    assert all(why in job["why"] for job in jobs[1:])
    screen = ask("inspect", "run").out
    assert max(map(len, screen.splitlines())) <= 80
    assert flat(screen).count(why) == 1
    assert "not possible, see below - -" in flat(screen)


def test_inspect_tells_an_interrupted_run(ask: Ask) -> None:
    import small  # pyright: ignore[reportMissingImports]

    model = small.net()
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = culpa.Problem(model, small.loss)

    def interrupted() -> None:
        with culpa.record("run", problem, stepper) as recorder:
            for at, batch in enumerate(recorder.batches([small.data(i) for i in range(3)])):
                stepper.zero_grad()
                small.loss(model, batch).backward()
                stepper.step()
                if at == 1:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    answer = ask("inspect", "run")
    assert answer.code == 0
    assert "closed early (KeyboardInterrupt" in flat(answer.out)
    assert "2 updates in 1 stage" in flat(answer.out)


def test_inspect_lists_what_differs_here(ask: Ask) -> None:
    run = train()
    here = run.manifest.environment
    edit_manifest(environment=here | {"torch": "0.4.1", "interop threads": "99", "threads": "3"})
    said = flat(ask("inspect", "run").out)
    assert "DIFFERENT HERE, so replays need --allow-drift: torch: recorded 0.4.1, here" in said
    assert "interop" not in said
    edit_manifest(environment=here | {"interop threads": "99", "threads": "3"})
    said = flat(ask("inspect", "run").out)
    assert "replays are bitwise here" in said
    assert "threads: recorded 3, here 1" in said
    facts = json.loads(ask("inspect", "run", "--json").out)
    assert facts["differences"] == []
    assert len(facts["harmless_differences"]) == 2


# ----------------------------------------------------------------------------------------------
# verify, replay, audit


def test_verify(ask: Ask) -> None:
    run = train()
    for extra, level in (((), "digest"), (("--problem", "small:problem"), "replay")):
        answer = ask("verify", "run", *extra)
        assert answer.code == 0
        assert f"root digest {run.root_digest}" in " ".join(answer.out.split())
        facts = json.loads(ask("verify", "run", "--json", *extra).out)
        executed = run.num_steps if level == "replay" else 0
        assert facts.pop("bytes_hashed") > 0
        assert facts == {
            "run": "run",
            "level": level,
            "intact": True,
            "finished": True,
            "root_digest": run.root_digest,
            "updates": run.num_steps,
            "states": len(run.kept_states),
            "examples": run.num_examples,
            "executed": executed,
        }


def test_replay_without_a_stage(ask: Ask) -> None:
    run = train()
    arguments = ("replay", "run", "--problem", "small:problem", "--without", "early")
    answer = ask(*arguments, "--out", "model.safetensors")
    assert answer.code == 0
    assert max(map(len, answer.out.splitlines())) <= 80
    assert "Without early (3 updates; 3 updates executed). Bitwise" in flat(answer.out)
    facts = json.loads(ask(*arguments, "--json").out)
    import small  # pyright: ignore[reportMissingImports]

    problem, (behaviour,) = small.problem()
    found = culpa.replay(run, problem, without="early")
    assert facts["claim"] == "bitwise"
    assert facts["updates_removed"] == 3
    assert facts["effects"] == [
        {"behaviour": "test", "unit": "nats", "effect": float(found.effect(behaviour).mean())}
    ]
    with safe_open("model.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["culpa"])
        names = set(file.keys())
    assert told == {
        "root_digest": run.root_digest,
        "without": [[0, 3]],
        "counterfactual": "skip",
        "claim": "bitwise",
    }
    assert names == set(found.state)


def test_the_estimated_model_without_a_stage(ask: Ask) -> None:
    run = train()
    arguments = ("replay", "run", *P, "--estimate", "--without", "early")
    answer = ask(*arguments, "--out", "model.safetensors")
    assert (answer.code, answer.err) == (0, "")
    assert max(map(len, answer.out.splitlines())) <= 80
    assert "Without early (3 updates). Not replayed: estimated, " in flat(answer.out)
    assert "Estimated effect" in answer.out
    import small  # pyright: ignore[reportMissingImports]

    problem, (behaviour,) = small.problem()
    found = culpa.embed(run, problem, stages=["early"])
    facts = json.loads(ask(*arguments, "--json").out)
    assert facts["claim"] == f"estimated, {found.trust['early'].grade}"
    assert facts["effects"][0]["effect"] == pytest.approx(
        float(found.effect(behaviour).mean()), abs=1e-6
    )
    with safe_open("model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["culpa"])["claim"] == facts["claim"]
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = found.counterfactual("early")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    two = ask(*arguments, "--without", "late [bold]stage")
    assert two.code == 2
    assert "leaves out one stage" in two.err


def test_the_page_shows_examples_only_when_asked(ask: Ask) -> None:
    train()
    by = ("--problem", "small:with_examples")
    assert ask("audit", "run", *by, "--out", "found").code == 0
    again = ("report", "found/audit.json", "--html", "page.html")
    for more in (("--show", "as-is"), ("--run", "run")):
        answer = ask(*again, *more)
        assert answer.code == 2
        assert "--show needs --run" in flat(answer.err)
    assert ask(*again, "--run", "run", "--show", "small:nowhere").code == 2
    assert ask(*again, "--run", "run", "--show", "small:words").code == 0
    shown = Path("page.html").read_text()
    assert ask(*again).code == 0
    assert "in words: " in shown
    assert "in words: " not in Path("page.html").read_text()
    assert "in words: " not in Path("found/audit.html").read_text()
    assert ask("audit", "run", *by, "--out", "found", "--show", "small:words").code == 0
    assert "in words: " in Path("found/audit.html").read_text()


def test_a_saved_model_has_the_same_bytes_every_time(ask: Ask) -> None:
    train()
    arguments = ("replay", "run", "--problem", "small:problem", "--without", "late [bold]stage")
    for name in ("one", "two"):
        assert ask(*arguments, "--out", name).code == 0
    assert Path("one").read_bytes() == Path("two").read_bytes()


def test_replay_of_the_run_itself(ask: Ask) -> None:
    train()
    answer = ask("replay", "run", "--problem", "small:problem")
    assert "The run itself, executed again (6 updates). Bitwise" in flat(answer.out)


def test_replay_with_drift_says_so(ask: Ask) -> None:
    run = train()
    edit_manifest(environment=run.manifest.environment | {"cpu": "abacus"})
    arguments = ("replay", "run", "--problem", "small:problem", "--without", "early")
    refused = ask(*arguments)
    assert refused.code == 3
    assert "cpu: recorded abacus, here" in flat(refused.err)
    assert "--allow-drift" in refused.err
    answer = ask(*arguments, "--allow-drift")
    assert answer.code == 0
    assert "Not bitwise: drift 0 from the record" in flat(answer.out)
    assert json.loads(ask(*arguments, "--allow-drift", "--json").out)["claim"] == "drift 0"


def test_audit(ask: Ask) -> None:
    run = train()
    answer = ask("audit", "run", "--problem", "small:problem", "--json", "--out", "found")
    assert answer.code == 0
    record = json.loads(answer.out)
    assert record["run"]["root_digest"] == run.root_digest
    assert record["options"]["claim"] == "bitwise"
    assert json.loads(Path("found/audit.json").read_text()) == record
    assert culpa.Audit.load("found/audit.json").record.run.root_digest == run.root_digest
    edit_manifest(environment=run.manifest.environment | {"cpu": "abacus"})
    drifting = ask("audit", "run", "--problem", "small:problem", "--allow-drift")
    assert drifting.code == 0
    assert "No number is bitwise: the replays it rests on have drift 0" in flat(drifting.out)
    assert "drift 0" in Path("run-audit/audit.html").read_text()


# ----------------------------------------------------------------------------------------------
# Errors

P = ("--problem", "small:problem")
ERRORS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no run": (("inspect", "nowhere"), 1, "is no culpa run"),
    "no problem": (("audit", "run", "--problem", "small:nix"), 2, "no attribute 'nix'"),
    "no executor": (("audit", "run", *P, "--executor", "slurm"), 2, "is processes or ray"),
    "no module": (("verify", "run", "--problem", "nix:nix"), 2, "No module named 'nix'"),
    "no name": (("verify", "run", "--problem", "small"), 2, "MODULE:FUNCTION"),
    "no problem returned": (("verify", "run", "--problem", "small:nothing"), 2, "must return"),
    "no stage": (("replay", "run", *P, "--without", "nix"), 2, "no stage 'nix'"),
    "no meaning": (("replay", "run", *P, "--counterfactual", "nix"), 2, "must be one of"),
    "no option": (("inspect", "run", "--nix"), 2, "No such option"),
    "no command": (("nix",), 2, "No such command"),
    "another loss": (("verify", "run", "--problem", "small:wrong_loss"), 3, "does not reproduce"),
    "another loss in a replay": (
        ("replay", "run", "--problem", "small:wrong_loss", "--without", "early"),
        3,
        "does not reproduce",
    ),
    "the user's own error": (
        ("verify", "run", "--problem", "small:broken"),
        1,
        "ZeroDivisionError: in the user's own code",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_message_and_an_exit_code(case: str, ask: Ask) -> None:
    train()
    arguments, code, message = ERRORS[case]
    answer = ask(*arguments)
    assert answer.code == code
    assert message in flat(answer.err)
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_damage_has_an_exit_code_of_its_own(ask: Ask) -> None:
    train()
    pack = Path("run/examples.pack")
    data = bytearray(pack.read_bytes())
    data[10] ^= 1
    pack.write_bytes(data)
    answer = ask("verify", "run", "--json")
    assert answer.code == 3
    assert "examples.pack" in answer.err


@pytest.mark.parametrize("at", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(at: int, ask: Ask) -> None:
    arguments = ["inspect", "nowhere"]
    arguments.insert(at, "--debug")
    with pytest.raises(culpa.StoreError, match="is no culpa run"):
        ask(*arguments)


def test_help_documents_the_exit_codes_and_debug(ask: Ask) -> None:
    said = flat(ask("--help").out)
    for code in ("0 fine", "1 an error", "2 something asked for", "3 something is not as"):
        assert code in said
    assert "--debug" in said
    for command in ("inspect", "verify", "replay", "audit"):
        assert "--json" in ask(command, "--help").out


def test_an_audit_is_reproduced_or_says_what_differs(ask: Ask) -> None:
    train()
    assert ask("audit", "run", *P, "--out", "found").code == 0
    again = ask("audit", "run", *P, "--again", "found/audit.json")
    assert (again.code, again.err) == (0, "")
    assert "Reproduced: every number" in flat(again.out)
    path = Path("found/audit.json")
    record = json.loads(path.read_text())
    record["stages"][0]["replayed"][0] += 0.1
    path.write_text(json.dumps(record))
    changed = ask("audit", "run", *P, "--again", "found/audit.json")
    assert changed.code == 3
    assert "stage 'early' on test: replayed" in flat(changed.err)
    record["run"]["root_digest"] = "another"
    path.write_text(json.dumps(record))
    assert "has root digest another" not in flat(changed.err)
    assert ask("audit", "run", *P, "--again", "found/audit.json").code == 3


def test_an_audit_whose_replays_run_side_by_side_is_the_same(ask: Ask) -> None:
    train()
    assert ask("audit", "run", *P, "--budget", "4", "--out", "found").code == 0
    again = ("audit", "run", *P, "--again", "found/audit.json", "--executor", "processes")
    answer = ask(*again, "--workers", "2")
    assert "Reproduced: every number" in flat(answer.out), answer.err


def test_an_audit_keeps_its_results_and_takes_them_up_again(ask: Ask) -> None:
    train()
    assert ask("audit", "run", *P, "--out", "found").code == 0
    kept = Path("found", "work", "results.jsonl")
    first, found = kept.read_bytes(), json.loads(Path("found/audit.json").read_text())
    kept.write_bytes(b"".join(first.splitlines(keepends=True)[:-2]))  # as if interrupted
    assert ask("audit", "run", *P, "--out", "found", "--resume").code == 0
    assert len(kept.read_bytes().splitlines()) >= len(first.splitlines())
    resumed = json.loads(Path("found/audit.json").read_text())
    for part in ("stages", "updates", "verdicts", "used", "stopped", "placebos"):
        assert resumed[part] == found[part]
