"""The rules of the house that no linter of the shelf checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "culpa"
FILES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

MAX_LINES = 300
PICKLES = {"pickle", "_pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib"}
# What only the report, the experiments and the command line need, or frameworks of the user.
NOT_WITH_CULPA = {
    *("altair", "vl_convert", "jinja2", "sklearn", "ruptures", "typer"),
    *("transformers", "peft", "lightning", "accelerate", "ray"),
}
# Names that code outside of this repository calls: they stay.
CONTRACT = {
    *("Problem", "record", "open_run", "Behaviour", "log_likelihood", "attribute", "embed"),
    *("StageEmbeddings", "replay", "agreement", "audit", "forecast"),
    *("CulpaError", "IntegrityError"),
}
# What a dependency of ours needs and does not declare, and whose objects only users bring.
FOR_OTHERS = {"accelerate", "peft", "trl"}
# Where a distribution's name is not the name it is imported by.
IMPORTED_AS = {
    "lazy-loader": "lazy_loader",
    "vl-convert-python": "vl_convert",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
}

every_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(tree: ast.Module) -> Iterator[str]:
    """Top-level names of everything imported anywhere in a file, inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "importlib.import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value).partition(".")[0]


def calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every call of a plain or dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield node.lineno, ast.unparse(node.func)


def test_the_package_is_where_these_tests_look() -> None:
    assert {"__init__.py", "errors.py", "tree.py"} <= {file.name for file in FILES}
    assert (PACKAGE / "py.typed").is_file()


@every_file
def test_no_file_outgrows_a_reader(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; one algorithm a file, {MAX_LINES} lines at most"


@every_file
def test_no_print_outside_of_the_command_line(file: Path) -> None:
    if file.relative_to(PACKAGE).parts[0] in {"cli.py", "cli"}:
        return
    prints = [line for line, name in calls(parse(file)) if name in {"print", "pprint"}]
    assert not prints, f"print in line(s) {prints}; report through culpa.progress or return a value"


@every_file
def test_no_pickle(file: Path) -> None:
    tree = parse(file)
    assert not PICKLES & set(imports(tree))
    writing = [line for line, name in calls(tree) if name == "torch.save"]
    assert not writing, f"line(s) {writing} write pickles; use safetensors"
    # Files of others' may be pickles: so opened, nothing in them is executed.
    calling = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call))
    loading = [call for call in calling if call.startswith("torch.load(")]
    assert all("weights_only=True" in call for call in loading), f"{loading} execute pickles"


def test_every_annotation_is_checked_while_the_tests_run(uncheckable: list[str]) -> None:
    # Usual causes: a Protocol without @runtime_checkable, a bare np.ndarray[Any, Any].
    assert not uncheckable


def test_third_party_imports_and_declared_dependencies_agree() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = PROJECT["project"]["dependencies"] + [
        requirement
        for extra, listed in extras.items()
        if extra not in {"all", "dev", "docs"}
        for requirement in listed
    ]
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in declared]
    allowed = {IMPORTED_AS.get(name, name) for name in names}
    used = {name for file in FILES for name in imports(parse(file))}
    third_party = used - set(sys.stdlib_module_names)
    assert not third_party - allowed, "imported, but no dependency in pyproject.toml"
    unused = allowed - third_party - {"culpa"} - FOR_OTHERS
    assert not unused, "a dependency that nothing imports"


def test_every_dependency_states_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = re.findall(r'^ *"[\w.-]+(?:\[[\w,]+\])?>=[\w.]+",(.*)$', text, re.MULTILINE)
    declared = PROJECT["project"]["dependencies"] + [
        requirement
        for extra in PROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
        if not requirement.startswith("culpa[")
    ]
    assert len(requirements) == len(declared)
    assert all(re.match(r"\s*# \S+ \S+", comment) for comment in requirements)


def public_names() -> dict[str, object]:
    """What the façade offers: everything in it but modules and private names."""
    import culpa

    everything = {name: getattr(culpa, name) for name in dir(culpa)}
    return {n: v for n, v in everything.items() if n[0] != "_" and not isinstance(v, ModuleType)}


def test_every_public_name_has_a_docstring() -> None:
    undocumented = [name for name, value in public_names().items() if not value.__doc__]
    assert not undocumented


def test_the_facade_offers_the_contract() -> None:
    from culpa import CulpaError

    names = public_names()
    assert not CONTRACT - set(names)
    classes = [value for value in names.values() if isinstance(value, type)]
    errors = [value for value in classes if issubclass(value, Exception)]
    assert len(errors) > 1
    assert all(issubclass(error, CulpaError) for error in errors)


def test_the_changelog_knows_this_version() -> None:
    import culpa

    assert f"## [{culpa.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_culpa_loads_a_module_only_when_a_name_of_it_is_used() -> None:
    program = "import sys, culpa; culpa.CulpaError; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.split() == [b"False"]


def test_import_culpa_brings_no_extra_and_no_framework() -> None:
    every_name = "[getattr(culpa, name) for name in culpa.__all__]"
    program = f"import sys, culpa; {every_name}; print(*{NOT_WITH_CULPA!r} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
