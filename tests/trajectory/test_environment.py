"""What a replay depends on is captured, compared, set where it can be, or refused, or measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.cli import early
from culpa.trajectory import environment, environment_fields
from culpa.trajectory.environment_fields import CUDA, FIELDS, NOWHERE, VARIABLES, Field
from culpa.trajectory.fidelity import Fidelity, relative_difference
from culpa.trajectory.state import State
from oracles.compare import assert_bitwise

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
SETTINGS = [(f, c) for f in FIELDS if f.write for c in (f.choices or ["1", "3"])]
IMPOSSIBLE = {  # torch: "backend 'cuda' does not support precision 'bf16'"
    (f.name, "bf16") for f in FIELDS if f.name.startswith("cud")
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------
# Fields


@pytest.mark.parametrize(
    ("setting", "choice"), SETTINGS, ids=[f"{f.name}={c}" for f, c in SETTINGS]
)
def test_a_setting_is_set_and_restored_and_touches_no_other(setting: Field, choice: str) -> None:
    before, raw = environment.capture(), [f.read() for f in FIELDS]
    with environment.as_recorded({**before, setting.name: choice}):
        inside = environment.capture()
    possible = (setting.name, choice) not in IMPOSSIBLE
    assert inside == ({**before, setting.name: choice} if possible else before)
    assert [f.read() for f in FIELDS] == raw


def test_settings_are_restored_after_an_error() -> None:
    before = environment.capture()
    other = {**before, "threads": "2", "default dtype": "float64"}

    def fail() -> None:
        with environment.as_recorded(other):
            assert torch.get_default_dtype() is torch.float64
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert environment.capture() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threads", "0"),
        ("threads", "1000000"),
        ("threads", "-1"),
        ("threads", "\N{FULLWIDTH DIGIT TWO}"),
        ("default dtype", "complex64"),
        ("deterministic algorithms", "maybe"),
        ("flush denormal", "None"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused(name: str, text: str) -> None:
    before = environment.capture()
    with (
        pytest.raises(culpa.IntegrityError, match=f"{name}.*none of"),
        environment.as_recorded({**before, name: text}),
    ):
        pytest.fail("went on")
    assert environment.capture() == before


def test_the_document_has_every_field_and_variable_and_where_they_matter() -> None:
    rows: dict[str, str] = {}
    for line in DOCUMENT.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        matters = [c for c in cells if c in ("everywhere", "CUDA", "nowhere")]
        if matters:
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[1]), matters[0].lower())
    fields = {f.name: f.matters for f in FIELDS} | dict(VARIABLES)
    where_it_is = dict.fromkeys(("device", "gpu", "cuda", "cudnn version"), "everywhere")
    assert rows == fields | where_it_is


def test_what_older_and_newer_culpas_recorded() -> None:
    here = environment.capture()
    older = {name: value for name, value in here.items() if name != "autocast"}
    assert environment.compare(older, here) == []
    (difference,) = environment.compare({**here, "phase of the moon": "full"}, here)
    assert difference.matters
    assert str(difference) == "phase of the moon: recorded full, here nothing"


def test_variables_are_compared_though_unset_ones_are_not_recorded() -> None:
    here = {name: v for name, v in environment.capture().items() if not name.startswith("$")}
    (difference,) = environment.compare({**here, "$MKL_CBWR": "AVX2"}, here)
    assert str(difference) == "$MKL_CBWR: recorded AVX2, here unset"
    (difference,) = environment.compare(here, {**here, "$MKL_CBWR": "AVX2"})
    assert str(difference) == "$MKL_CBWR: recorded unset, here AVX2"
    assert difference.matters


def test_cuda_settings_matter_to_runs_on_cuda_only() -> None:
    here = environment.capture()
    for field in (f for f in FIELDS if f.matters == CUDA):
        for device, matters in (("cpu", False), ("cuda", True), ("cpu, cuda", True)):
            recorded = {**here, "device": device, field.name: "another"}
            found = [d for d in environment.compare(recorded, here) if d.name == field.name]
            assert [d.matters for d in found] == [matters]


def test_a_model_on_another_device_is_a_difference() -> None:
    here = environment.capture([torch.empty(1, device="meta")])
    (difference,) = environment.compare(environment.capture(), here)
    assert str(difference) == "device: recorded cpu, here meta"


def test_denormals_are_measured() -> None:
    with environment.as_recorded({"flush denormal": "True"}):
        assert float(torch.tensor([1e-40]) * 1) == 0.0
    assert float(torch.tensor([1e-40]) * 1) > 0.0


def test_autocast_is_seen() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert environment.capture()["autocast"] == "cpu bfloat16"


# ----------------------------------------------------------------------------------------------
# Runs


class Counting:
    """A loss that counts its calls and makes a tensor of the default dtype."""

    def __init__(self, factor: float = 1.0) -> None:
        self.calls, self.factor = 0, factor

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        inputs, labels = batch
        third = torch.ones(1) / 3  # not the same number in float32 and in float64
        scores = model(inputs).to(third.dtype) * third * self.factor
        return nn.functional.cross_entropy(scores, labels)


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)).float()


def data() -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=torch.float32),
            torch.randint(0, 3, (8,), generator=generator),
        )
        for _ in range(8)
    ]


def problem() -> tuple[culpa.Problem, list[culpa.Behaviour]]:
    """For ``--problem``."""
    return culpa.Problem(net(), Counting()), [culpa.log_likelihood("b", data()[0])]


def recorded(path: Path) -> culpa.Run:
    task, _ = problem()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.05)
    with culpa.record(path, task, optimizer, checkpoints=culpa.Every(3)) as recorder:
        for name, part in (("first", data()[:4]), ("second", data()[4:])):
            with recorder.stage(name):
                for batch in recorder.batches(part):
                    optimizer.zero_grad()
                    task.loss(task.model, batch).backward()
                    optimizer.step()
    return culpa.open_run(path)


def claimed(run: culpa.Run, **facts: str) -> culpa.Run:
    """The run, were it recorded elsewhere."""
    named = {n.replace("_", " ").replace("+", "_"): v for n, v in facts.items()}
    other = run.manifest.environment | named
    run.manifest = msgspec.structs.replace(run.manifest, environment=other)
    return run


WORK: dict[str, Callable[..., Any]] = {
    "replay": lambda run, task, b, **o: culpa.replay(run, task, without="first", **o).claim,
    "attribute": lambda run, task, b, **o: culpa.attribute(run, task, b, **o).claim,
    "embed": lambda run, task, b, **o: culpa.embed(run, task, **o).facts["claim"],
    "audit": lambda run, task, b, **o: culpa.audit(run, task, b, **o).record.options["claim"],
    "interactions": lambda run, task, b, **o: culpa.interactions(run, task, b, **o).claim,
    "noise_floor": lambda run, task, b, **o: culpa.noise_floor(run, task, b, at=3, **o).claim,
    "noise_floor from the middle": (
        lambda run, task, b, **o: culpa.noise_floor(run, task, b, at=5, repeats=1, **o).claim
    ),
}


@pytest.mark.parametrize("work", WORK)
def test_a_difference_is_refused_before_any_work(work: str, tmp_path: Path) -> None:
    run = claimed(recorded(tmp_path / "run"), torch="0.4.1", cpu="abacus")
    loss = Counting()
    with pytest.raises(culpa.EnvironmentDifference) as caught:
        WORK[work](run, culpa.Problem(net(), loss), problem()[1])
    assert "cpu: recorded abacus, here" in str(caught.value)
    assert "torch: recorded 0.4.1, here" in str(caught.value)
    assert "allow_drift=True" in str(caught.value)
    assert loss.calls == 0


def test_verify_by_replay_refuses_a_difference(tmp_path: Path) -> None:
    # A manifest that was changed fails its digest already, so the difference is made in here.
    run = recorded(tmp_path / "run")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(culpa.EnvironmentDifference, match="autocast: recorded off, here cpu bfl"),
    ):
        run.verify(problem()[0], level="replay")


@pytest.mark.parametrize("work", WORK)
def test_a_difference_without_consequence_is_a_drift_of_zero(work: str, tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    assert WORK[work](run, *problem(), allow_drift=True) == "bitwise"
    assert WORK[work](claimed(run, torch="0.4.1"), *problem(), allow_drift=True) == "drift 0"


@pytest.mark.parametrize("work", WORK)
def test_what_does_not_reproduce_is_measured(work: str, tmp_path: Path) -> None:
    run, behaviours = recorded(tmp_path / "run"), problem()[1]
    other = culpa.Problem(net(), Counting(1.001))
    claim = WORK[work](run, other, behaviours, allow_drift=True)
    assert re.fullmatch(r"drift \d\.\de-[1-5]", claim)
    with pytest.raises(culpa.IntegrityError, match=r"update \d of .* does not reproduce"):
        WORK[work](run, other, behaviours)


def test_dvemb_carries_the_claim(tmp_path: Path) -> None:
    def each(model: nn.Module, batch: Any, factor: float = 1.0) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * factor

    def task(factor: float = 1.0) -> culpa.Problem:
        return culpa.Problem(
            net(), lambda m, b: each(m, b, factor).mean(), lambda m, b: each(m, b, factor)
        )

    first, behaviours = task(), problem()[1]
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.05)
    with culpa.record(tmp_path / "run", first, optimizer) as recorder:
        for batch in recorder.batches(data()):
            optimizer.zero_grad()
            first.loss(first.model, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    assert culpa.dvemb(run, task(), behaviours, allow_drift=True).claim == "bitwise"
    with pytest.raises(culpa.IntegrityError, match="does not reproduce"):
        culpa.dvemb(run, task(1.001), behaviours)
    found = culpa.dvemb(run, task(1.001), behaviours, allow_drift=True)
    assert re.fullmatch(r"drift \d\.\de-[1-9]", found.claim)
    elsewhere = claimed(run, torch="0.4.1")
    assert culpa.dvemb(elsewhere, task(), behaviours, allow_drift=True).claim == "drift 0"
    with pytest.raises(culpa.EnvironmentDifference):
        culpa.dvemb(elsewhere, task(), behaviours)


def test_drift_is_what_it_says(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    other = culpa.Problem(net(), Counting(1.001))
    found = culpa.replay(run, other, allow_drift=True)
    gaps = []
    for k in run.kept_states:
        upto = culpa.replay(
            claimed(run, torch="0.4.1"), other, without=range(k, run.num_steps), allow_drift=True
        )
        truth = torch.cat([v.flatten().double() for v in run.state(k).params.values()])
        there = torch.cat([upto.state[n].flatten().double() for n in run.state(k).params])
        gaps.append(float((there - truth).norm() / truth.norm()))
    assert max(gaps) > 0
    assert float(found.claim.removeprefix("drift ")) == pytest.approx(max(gaps), rel=0.05)


def test_harmless_differences_leave_a_replay_bitwise(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    final = run.final_state()
    run = claimed(run, interop_threads="64", cudnn_benchmark="True", efficient_attention="False")
    names = [f"${name}" for name, where in VARIABLES.items() if where in (NOWHERE, CUDA)]
    run = claimed(run, **{name.replace("_", "+"): "7" for name in names})
    found = culpa.replay(run, problem()[0])
    assert found.claim == "bitwise"
    assert_bitwise(found.state, final)


def test_the_default_dtype_is_set_for_the_time_of_the_work(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        run = recorded(tmp_path / "run")
    finally:
        torch.set_default_dtype(torch.float32)
    found = culpa.replay(run, problem()[0])
    assert found.claim == "bitwise"
    assert_bitwise(found.state, run.final_state())
    assert torch.get_default_dtype() is torch.float32


def test_effects_of_a_drifting_replay_can_be_read(tmp_path: Path) -> None:
    run = claimed(recorded(tmp_path / "run"), cpu="abacus")
    found = culpa.replay(run, problem()[0], without="second", allow_drift=True)
    assert found.updates_executed == 2 * 8 - 4 - 2 * 3  # from kept state 3, and again to measure
    assert found.effect(problem()[1][0]).shape == (8,)


def test_relative_difference() -> None:
    a = State({"w": torch.tensor([3.0, 4.0])}, {"m": torch.tensor([1.0]), "n": torch.tensor(3)})
    assert relative_difference(a, a) == 0.0
    b = State({"w": torch.tensor([3.0, 4.5])}, a.buffers)
    assert relative_difference(b, a) == pytest.approx(0.1)
    c = State(a.params, {"m": torch.tensor([1.5]), "n": torch.tensor(30)})
    assert relative_difference(c, a) == pytest.approx(0.5)
    for bad in (float("nan"), float("inf")):
        d = State({"w": torch.tensor([3.0, bad])}, a.buffers)
        assert relative_difference(d, a) == float("inf")


@pytest.mark.parametrize(
    ("drift", "claim"),
    [
        (3.14e-7, "drift 3.1e-7"),
        (0.0, "drift 0"),
        (12.0, "drift 1.2e1"),
        (float("inf"), "drift inf"),
        (None, "drift not measured"),
    ],
)
def test_claims(drift: float | None, claim: str) -> None:
    assert Fidelity(drift=drift).claim == "bitwise"
    assert Fidelity(exact=False, drift=drift).claim == claim


# ----------------------------------------------------------------------------------------------
# Before torch is loaded


def test_which_variables_are_set_before_torch_is_loaded() -> None:
    changes = early.changes
    assert changes({}, {"MKL_CBWR": "AVX2"}, 2) == {}
    assert changes({"threads": "2"}, {}, 2) == {}
    assert changes({"threads": "2"}, {}, 1) == {"OMP_NUM_THREADS": "2"}
    both = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert changes({"threads": "2"}, both, 1) == dict.fromkeys(both, "2")
    assert changes({"$OMP_NUM_THREADS": "4", "threads": "4"}, {}, 1) == {"OMP_NUM_THREADS": "4"}
    assert changes({"$MKL_CBWR": "AVX2"}, {}, 1) == {"MKL_CBWR": "AVX2"}
    assert changes({"threads": "1"}, {"MKL_CBWR": "AVX2"}, 1) == {"MKL_CBWR": None}
    name, value = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    assert changes({f"${name}": value, "device": "cuda"}, {}, 1) == {name: value}
    assert changes({f"${name}": value, "device": "cpu"}, {}, 1) == {}


@pytest.mark.parametrize(
    "hostile",
    [
        {"$LD_PRELOAD": "/tmp/evil.so", "$PYTHONPATH": "/tmp"},
        {"$MKL_CBWR": "AVX2; rm -rf /"},
        {"$MKL_CBWR": "x" * 65},
        {"$MKL_CBWR": ["AVX2"]},
        {"threads": "1000000"},
        {"threads": "²"},
        {"threads": None},
        {"threads": {"2": 2}},
    ],
)
def test_a_folder_sets_nothing_else(hostile: dict[str, Any]) -> None:
    assert early.changes(hostile, {}, 1) == {}


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"{", b'{"environment": 3}', b"\xff", b'{"environment": null}']
)
def test_a_manifest_that_is_none_sets_nothing(manifest: bytes, tmp_path: Path) -> None:
    (tmp_path / "culpa.json").write_bytes(manifest)
    assert early.recorded_environment(["verify", str(tmp_path)]) == {}


ELSEWHERE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}


def other_process(folder: Path, *arguments: str, **variables: str) -> Any:
    plain = {n: v for n, v in os.environ.items() if n not in VARIABLES}
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{Path(__file__).parent}"
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=plain | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was recorded by a process of another kind."""
    folder = tmp_path_factory.mktemp("elsewhere")
    program = (
        "import test_environment as t; from pathlib import Path; t.recorded(Path('run'));"
        "from culpa.trajectory.environment import capture; print(capture()['cpu capability'])"
    )
    done = other_process(folder, "-c", program, **ELSEWHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "DEFAULT\n"
    return folder


def test_the_command_line_sets_what_must_stand_before_torch_is_loaded(elsewhere: Path) -> None:
    command = ("-m", "culpa.cli", "verify", "run", "--problem", "test_environment:problem")
    done = other_process(elsewhere, *command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Starting again as it was recorded: ")
    for name, value in ELSEWHERE.items():
        assert f"{name}={value}" in done.stderr
    assert "8 updates executed again, bit for bit" in " ".join(done.stdout.split())


def test_a_running_process_cannot_and_says_so_or_measures(elsewhere: Path) -> None:
    run = culpa.open_run(elsewhere / "run")
    with pytest.raises(culpa.EnvironmentDifference) as caught:
        culpa.replay(run, problem()[0])
    assert "$MKL_CBWR: recorded COMPATIBLE, here unset" in str(caught.value)
    assert "threads" not in str(caught.value)  # which is set
    found = culpa.replay(run, problem()[0], allow_drift=True)
    assert 0 < float(found.claim.removeprefix("drift ")) < 1e-4
    gap = relative_difference(State(found.state), State(run.final_state()))
    assert gap <= float(found.claim.removeprefix("drift ")) * 1.05


def test_nothing_starts_again_without_need(elsewhere: Path) -> None:
    command = ("-m", "culpa.cli", "verify", "run", "--problem", "test_environment:problem")
    done = other_process(elsewhere, *command, **ELSEWHERE)
    assert (done.returncode, done.stderr) == (0, "")
    done = other_process(elsewhere, *command[:4])  # digests depend on nothing
    assert (done.returncode, done.stderr) == (0, "")


def test_fields_are_named_once() -> None:
    assert len({f.name for f in FIELDS}) == len(FIELDS) == len(environment_fields.NAMES)
