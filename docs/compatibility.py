"""Writes docs/compatibility.md from the tests: what can be recorded, replayed and differentiated.

A row is a feature and the test that holds it; docs/loops.md and docs/optimizers.md say which, and
``INTEGRATIONS`` below. A cell says yes only if that test, or a function of the tests that it uses,
calls what the column is about, and the page the row is from does not say otherwise.

Run it after changing tests or pages: ``python docs/compatibility.py``. A test fails when the page
is stale.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TARGET = DOCS / "compatibility.md"
COLUMNS = {
    "record": {"record", "record_trainer", "RecorderCallback", "open_run"},
    "replay": {"replay"},
    "adjoint": {"attribute"},
    "tangent": {"embed"},
}
"""By column the functions one of which a test must call."""

TRAINER = "tests/integrations/test_transformers.py"
LIGHTNING = "tests/integrations/test_lightning.py"
SEVERAL = "tests/distributed/test_integrations.py"
INTEGRATIONS = (
    ("`transformers.Trainer`: accumulation, clipping, scheduler, `num_items_in_batch`",
     f"{TRAINER}::test_without_an_update_against_a_loop_by_hand"),
    ("`transformers.Trainer`: bf16, label smoothing, SGD, a shorter last update",
     f"{TRAINER}::test_settings_of_the_trainer_replay"),
    ("`transformers.Trainer`: PEFT adapters with dropout",
     f"{TRAINER}::test_adapters_with_dropout"),
    ("`transformers.Trainer`: evaluation between updates, gradient checkpointing",
     f"{TRAINER}::test_dropout_beside_what_else_draws_or_computes_twice"),
    ("`transformers.Trainer`: `resume_from_checkpoint`",
     f"{TRAINER}::test_a_trainer_that_resumes_is_recorded_from_its_checkpoint_on"),
    ("`transformers.Trainer`: several in sequence, stages of one run",
     f"{TRAINER}::test_stages_of_trainers_in_sequence_are_attributed"),
    ("`transformers.Trainer` on several processes (`torchrun`, DistributedDataParallel)",
     f"{SEVERAL}::test_a_trainer_of_transformers"),
    ("TRL: `SFTTrainer`, `DPOTrainer` (run where TRL is installed)",
     "tests/integrations/test_trl.py::test_a_trainer_of_trl"),
    ("Lightning: epochs, validation, accumulation, clipping, schedulers by step or epoch",
     f"{LIGHTNING}::test_without_an_update_against_a_loop_by_hand"),
    ("Lightning: scores and effects",
     f"{LIGHTNING}::test_scores_and_effects_against_a_loop_by_hand"),
    ("Lightning: `trainer.fit` once a stage",
     f"{LIGHTNING}::test_two_fits_append_stages_to_one_run"),
    ("Lightning on several processes (`strategy=\"ddp\"`)",
     f"{SEVERAL}::test_a_trainer_of_lightning"),
    ("Accelerate: `prepare`, accumulation, clipping, bf16",
     "tests/integrations/test_accelerate.py"
     "::test_the_recipe_changes_nothing_and_every_update_replays"),
    ("Accelerate on several processes",
     f"{SEVERAL}::test_the_recipe_for_accelerate"),
)  # fmt: skip

MODELS = "tests/loops/test_models.py::test_a_model"
COUPLING = "tests/dynamics/test_coupling_optimizers.py"
STATISTICS = "tests/estimators/test_running_statistics.py"
ADAPTERS = "tests/integrations/test_adapters.py"
OWN = "tests/dynamics/test_user_optimizer.py"
BESIDE = {
    "tests/loops/test_models.py::test_products_of_weight_norm_are_those_of_its_formula": (MODELS,),
    "tests/loops/test_models.py::test_checkpointed_blocks_draw_their_masks_once_for_products": (
        MODELS,
    ),
    f"{COUPLING}::test_scores_and_effects_are_those_of_retraining": (
        f"{COUPLING}::test_recorded_and_replayed_bit_for_bit",
    ),
    f"{COUPLING}::test_a_coupling_of_parameters_is_noticed_and_no_score_trusted": (
        f"{COUPLING}::test_recorded_and_replayed_bit_for_bit",
    ),
    f"{OWN}::test_scores_and_effects_are_those_of_retraining": (
        f"{OWN}::test_recorded_and_replayed_bit_for_bit",
    ),
    f"{ADAPTERS}::test_without_a_stage_against_the_loop_by_hand": (
        f"{ADAPTERS}::test_scores_and_effects_go_through_wrapping_and_merging",
    ),
    f"{ADAPTERS}::test_the_merge_is_that_of_peft_bit_for_bit": (
        f"{ADAPTERS}::test_without_a_stage_against_the_loop_by_hand",
        f"{ADAPTERS}::test_scores_and_effects_go_through_wrapping_and_merging",
    ),
    f"{STATISTICS}::test_stages_against_retraining": (
        f"{STATISTICS}::test_scores_are_those_of_the_unrolled_run",
        "tests/trajectory/test_jobs.py::test_without_a_job_against_a_loop_that_skips_it",
    ),
}
"""Tests that hold more of a feature than the one which docs/loops.md names."""

Row = tuple[str, list[str], tuple[str, ...]]
"""A feature, its four cells, and its tests."""


@cache
def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a file by name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@cache
def shared() -> dict[str, tuple[Path, ast.FunctionDef]]:
    """The functions that several tests share."""
    files = sorted((ROOT / "tests" / "oracles").glob("*.py"))
    return {name: (file, node) for file in files for name, node in functions(file).items()}


def called(test: str) -> set[str]:
    """The names of everything a test calls, or a function of the tests that it mentions."""
    path, _, name = test.partition("::")
    start = ROOT / path
    found: set[str] = set()
    seen: set[tuple[Path, str]] = set()
    ahead = [(start, name)]
    while ahead:
        file, name = ahead.pop()
        if (file, name) in seen:
            continue
        seen.add((file, name))
        for node in ast.walk(functions(file)[name]):
            if isinstance(node, ast.Call):
                found.add(ast.unparse(node.func).rpartition(".")[2])
            mentioned = node.id if isinstance(node, ast.Name) else ""
            if mentioned in functions(file):
                ahead.append((file, mentioned))
            elif mentioned in shared():
                ahead.append((shared()[mentioned][0], mentioned))
    return found


def cells(tests: tuple[str, ...], recorded: str = "yes", modelled: str = "yes") -> list[str]:
    """yes, what the page says instead, or nothing where no test tries it."""
    calls = set[str]().union(*map(called, tests))
    made: list[str] = []
    for column, functions_of in COLUMNS.items():
        claim = recorded if column in ("record", "replay") else modelled
        if not claim.startswith(("yes", "on the")):
            made.append("no" if claim.startswith("refused") else "")
        else:
            made.append("yes" if functions_of & calls else "")
    return made


def table(page: str) -> Iterator[list[str]]:
    """The cells of every line of the page's tables, headings left out."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and not before.startswith("##") and before.strip():
            yield [cell.strip() for cell in line.strip("|").split("|")]


def of_loops() -> Iterator[Row]:
    """docs/loops.md, whose columns are: the loop, recorded, modelled, test."""
    for feature, recorded, modelled, test in table("loops.md"):
        named = test.strip("`")
        test = named if named.startswith("tests/") else f"tests/loops/{named}"
        tests = (test, *BESIDE.get(test, ()))
        yield feature, cells(tests, recorded, modelled), tests


def of_optimizers() -> Iterator[Row]:
    """docs/optimizers.md: class, derivative, record and replay, adjoint, tangent, notes."""
    file = "tests/dynamics/test_optimizers.py"
    both = (
        "test_recorded_and_replayed_bit_for_bit",
        "test_scores_and_effects_are_those_of_retraining",
    )
    own = {
        "Muon": ("test_muon",),
        "Rprop": (
            both[0],
            "test_rprop_is_replayed_and_embedded_by_differences_and_refused_otherwise",
        ),
        **dict.fromkeys(
            ("LBFGS", "SparseAdam"), ("test_what_cannot_be_recorded_is_refused_by_name",)
        ),
    }
    for name, _, recorded, adjoint, tangent, _ in table("optimizers.md"):
        bare = name.strip("`")
        tests = tuple(f"{file}::{test}" for test in own.get(bare, both))
        calls = set[str]().union(*map(called, tests))
        found = [
            claim if claim == "no" or functions_of & calls else ""
            for claim, functions_of in zip(
                [recorded, recorded, adjoint, tangent], COLUMNS.values(), strict=True
            )
        ]
        yield f"`torch.optim.{bare}`", found, tests


def of_integrations() -> Iterator[Row]:
    """The frameworks."""
    for feature, test in INTEGRATIONS:
        yield feature, cells((test,)), (test,)


def text() -> str:
    """The page."""
    parts = [
        "# What works with what",
        "Written by `docs/compatibility.py` from the tests and the pages beside it; do not edit."
        " *Record*: training is left as it is, bit for bit, and recorded. *Replay*:"
        " `culpa.replay` gives the same bits, and without updates those of retraining. *Adjoint*:"
        " `culpa.attribute`; *tangent*: `culpa.embed`; both held against retraining. A cell says"
        " yes only where the named test does this; *no*: refused, with the reason named; empty:"
        " not tested there, or it does not apply. The reasons stand in"
        " [loops.md](loops.md), [optimizers.md](optimizers.md) and"
        " [integrations.md](integrations.md).",
    ]
    sections = (
        ("Loops, losses and models", of_loops()),
        ("Optimizers", of_optimizers()),
        ("Frameworks", of_integrations()),
    )
    for title, rows in sections:
        lines = [f"| Feature | {' | '.join(COLUMNS)} | Test |", "|---|---|---|---|---|---|"]
        for feature, found, tests in rows:
            named = ", ".join(f"`{test}`" for test in tests)
            lines.append(f"| {feature} | {' | '.join(found)} | {named} |")
        parts += [f"## {title}", "\n".join(lines)]
    return re.sub(r"\|  (?=\|)", "| ", "\n\n".join(parts)) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
