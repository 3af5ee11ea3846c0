"""The package's rules: imports point down the rooms, functions and modules stay short, the trainer is flat."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "recurrent_db"
MOST_FUNCTION, MOST_MODULE = 80, 450
"""Lines."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package and the contract in ``folder``."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def copy_package(folder: Path) -> Path:
    """The package and its contract, in ``folder``; the copy's package."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    return Path(shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")))


def test_imports_point_down_the_rooms(tmp_path: Path) -> None:
    copy_package(tmp_path)  # not the tree: folders that git does not know may lie there
    result = lint(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    with (package / "model/head.py").open("a") as module:
        module.write("\nif TYPE_CHECKING:\n    from recurrent_db.training import guard\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "recurrent_db.model is not allowed to import recurrent_db.training" in result.stdout


def test_a_cycle_within_a_room_is_found(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    with (package / "data/tokenizer_backend.py").open("a") as module:
        module.write("\nfrom recurrent_db.data import tokenizer\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "No cycles are allowed in recurrent_db.data" in result.stdout


def test_a_room_that_the_contract_does_not_know_is_found(tmp_path: Path) -> None:
    (copy_package(tmp_path) / "attic.py").write_text("")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert "attic" in result.stdout + result.stderr


def test_the_document_has_the_rooms_in_order() -> None:
    """docs/architecture.md lists what the contract lists."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    ordered = [room for layer in contract["layers"] for room in layer.split(" : ")]
    table = (ROOT / "docs/architecture.md").read_text().split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert ordered == ["__main__", *named]


def test_the_functions_that_the_document_names_exist() -> None:
    """Names such as `data/loader.py:locate` in docs/architecture.md."""
    named = re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / "docs/architecture.md").read_text())
    assert len(named) > 20
    missing = [
        f"{path}:{name}"
        for path, name in named
        if not re.search(rf"^ *(def|class) {name}\b", (PACKAGE / path).read_text(), re.MULTILINE)
    ]
    assert missing == []


def modules(room: str = "") -> Iterator[tuple[str, str]]:
    """Each module's path within the package, and its text."""
    for path in sorted((PACKAGE / room).rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short() -> None:
    long = {
        f"{path}: {function.name}"
        for path, text in modules()
        for function in functions(text)
        if (function.end_lineno or 0) - function.lineno >= MOST_FUNCTION
    }
    assert long == set()


def test_modules_are_short() -> None:
    assert {path for path, text in modules() if len(text.splitlines()) > MOST_MODULE} == set()


def test_the_trainer_has_no_nested_functions() -> None:
    nested = {
        f"{path}: {inner.name}"
        for path, text in modules("training")
        for function in functions(text)
        for inner in ast.walk(function)
        if inner is not function and isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert nested == set()


def test_the_trainer_has_no_nonlocal() -> None:
    for path, text in modules("training"):
        assert not any(isinstance(node, ast.Nonlocal) for node in ast.walk(ast.parse(text))), path


@pytest.mark.parametrize("folder", ["train", "eval", "tokenizers"])
def test_script_folders_are_no_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_the_loop_is_read_in_one_sitting() -> None:
    """`Trainer.run` holds the loop: at most 110 lines."""
    [run] = [
        f
        for path, text in modules("training")
        if path.endswith("trainer.py")
        for f in functions(text)
        if f.name == "run"
    ]
    assert (run.end_lineno or 0) - run.lineno < 110
