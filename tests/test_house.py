"""The rules of the house as tests: types, style, imports, dead code, sizes, codes that are documented."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvmhv"

FILE_LINES_MAX = 400
TEST_FILE_LINES_MAX = 500
"""Tests are read one at a time, and their cases are tables."""
FUNCTION_LINES_MAX = 60

LONG_FILES = {
    "kvmhv/ports.py": "the catalogue of outside things: Protocols and their promises, no behaviour",
    "kvmhv/model.py": "the one vocabulary that every room shares: records and their docstrings, no behaviour",
}
"""Files that may be longer, and why."""

LONG_FUNCTIONS: dict[str, str] = {}
"""`file:function` that may be longer, and why."""

NOT_IMPLEMENTED = {
    "kvmhv/agent/api/openapi.py": "how a schema_hook tells msgspec that a type is not its own",
}
"""Files that may raise NotImplementedError, and why."""

ONLY_WRITER_OF_CONT = "kvmhv/core/handover.py"


def _run(*command: str) -> None:
    """Run a tool in the checkout; what it said is the failure."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- tools --------------------------------------------------------------------------------------------------------


def test_types() -> None:
    _run("mypy")


def test_lint() -> None:
    _run("ruff", "check", ".")


def test_format() -> None:
    _run("ruff", "format", "--check", ".")


def test_rule_of_imports() -> None:
    _run("lint-imports", "--no-cache")


def test_no_dead_code() -> None:
    _run("vulture")


# --- size ---------------------------------------------------------------------------------------------------------


def test_no_file_has_outgrown_its_room() -> None:
    lengths = {_relative(path): len(path.read_text().splitlines()) for path in _sources("kvmhv", "tests", "vm-images")}
    limits = {name: TEST_FILE_LINES_MAX if name.startswith("tests/") else FILE_LINES_MAX for name in lengths}
    too_long = {name for name, lines in lengths.items() if lines > limits[name]}
    assert {name: lengths[name] for name in too_long - set(LONG_FILES)} == {}
    assert set(LONG_FILES) - too_long == set(), "an exception that is needed no longer"


def test_no_function_has_outgrown_its_room() -> None:
    too_long = {
        f"{_relative(path)}:{function.name}": lines
        for path in _sources("kvmhv", "tests", "vm-images")
        for function in _functions(path)
        if (lines := (function.end_lineno or function.lineno) - function.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert {name: lines for name, lines in too_long.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) - set(too_long) == set(), "an exception that is needed no longer"


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


# --- nothing half-done --------------------------------------------------------------------------------------------


def test_nothing_is_left_for_later() -> None:
    found = [
        f"{_relative(path)}:{token.start[0]}: {token.string}"
        for path in _sources("kvmhv", "tests", "vm-images")
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string)
    ]
    assert found == []


def test_nothing_is_a_stub() -> None:
    """A body that does nothing belongs to a Protocol; NotImplementedError to what a library asks for."""
    found = []
    for path in _sources("kvmhv"):
        module = ast.parse(path.read_text())
        protocols = {id(item) for node in ast.walk(module) if _is_protocol(node) for item in ast.walk(node)}
        for node in ast.walk(module):
            place = f"{_relative(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                found += [] if _relative(path) in NOT_IMPLEMENTED else [place]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and id(node) not in protocols:
                found += [place] if _does_nothing(node) else []
    assert found == []


def _is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Protocol") for base in node.bases)


def _does_nothing(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and item.value.value is ...
        for item in function.body
    )


# --- the handover, the codes --------------------------------------------------------------------------------------


def test_only_the_handover_lets_a_guest_run() -> None:
    writers = {
        _relative(path)
        for path in _sources("kvmhv")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Cont"
    }
    assert writers == {ONLY_WRITER_OF_CONT}


def _codes() -> dict[str, set[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.error_codes"], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes: dict[str, set[str]] = {}
    kind = ""
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            codes[kind].add(line.split()[0])
        else:
            kind = line.rstrip(":")
            codes[kind] = set()
    return codes


def test_codes_are_literals_that_can_be_looked_up() -> None:
    assert len(_codes()["errors"]) > 50


@pytest.mark.parametrize("kind", ["errors", "findings", "problems"])
def test_every_code_is_in_the_manual(kind: str) -> None:
    manual = (ROOT / "docs" / "errors.md").read_text()
    documented = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)*)`", manual))
    assert sorted(_codes()[kind] - documented) == []


def test_the_manual_explains_no_error_that_is_gone() -> None:
    headings = set(re.findall(r"^#+ `([a-z0-9-]+)`", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    assert headings, "each code has a heading of its own"
    assert sorted(headings - set().union(*_codes().values())) == []
