"""The sdist and the wheel hold what an installation needs, and an installed wheel works away from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "recurrent_db").rglob("*.py")}


def python(*words: object, cwd: Path, path: str = "") -> str:
    """Output of the interpreter away from the repository, with ``path`` in front of its packages."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of this tree and the wheel that was built from the sdist."""
    pytest.importorskip("build", reason="the package `build` is not installed")
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("dist")
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("recurrent_db", "train", "eval", "tokenizers", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    [wheel] = built.glob("*.whl")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_the_sdist_holds_the_package_and_its_metadata(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*MODULES, "recurrent_db/py.typed", "pyproject.toml", "README.md", "LICENSE"}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    [info] = {name.partition("/")[0] for name in names if not name.startswith("recurrent_db/")}
    assert info.endswith(".dist-info")
    assert {name for name in names if name.startswith("recurrent_db/")} == {*MODULES, "recurrent_db/py.typed"}


USE = """
import io, sys
from importlib.metadata import entry_points

import recurrent_db
from recurrent_db.cli import main

print(recurrent_db.__file__)
for words in (["train", "run.toml"], ["repl", "run", "--max-new-tokens", "4"], ["report", "run", "-o", "report.html"]):
    sys.argv = ["recurrent-db", *words]
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"def\\n"))
    try:
        status = main()
    except SystemExit as exit:
        status = exit.code
    assert not status, words
[entry] = [entry for entry in entry_points(group="lm_eval.models") if entry.name == "recurrent_db"][:1]
from lm_eval.api.instance import Instance

model = entry.load()(checkpoint="run", k=2)
[[score, greedy]] = model.loglikelihood([Instance("loglikelihood", {}, ("def", " main"), 0)])
print("score", score)
"""


def test_an_installed_wheel_trains_talks_reports_and_is_a_model_of_lm_eval(
    installed: Path, data_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the harness is not installed")
    (tmp_path / "run.toml").write_text(
        f'[model]\nd_model = 32\nn_heads = 2\nd_mlp = 64\nmax_seq_len = 64\n[data]\npath = "{data_dir}"\n'
        'sequence_length = 64\nbatch_size = 2\n[run]\ndir = "run"\n[budget]\nsteps = 2\n[objective]\nname = "one_step"\n'
    )
    (tmp_path / "use.py").write_text(USE)
    printed = python("use.py", cwd=tmp_path, path=str(installed))
    assert printed.startswith(str(installed))
    assert re.search(r"^score -\d", printed, re.MULTILINE), printed
    assert "one_step" in (tmp_path / "report.html").read_text(encoding="utf-8")
