"""Nobody knows an objective by name: outside its own rooms no name of one occurs, and a new one touches one file and its
section."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MICRO, ROOT, micro_config, synthetic_data
from image_runs import OBJECTIVES as ON_IMAGES
from image_runs import kind

from recurrent_db.objective_config import OBJECTIVE_NAMES, name_help
from recurrent_db.objectives import build_objective

OWN_ROOMS = ("objectives", "recurrence")
CLASSES = {
    "DenoiseWalk",
    "PlainLoop",
    "BlockWalk",
    "NextToken",
    "Unrolled",
    "OneStep",
    "Denoise",
    "DenoiseBlocks",
    "Masked",
    "Classify",
    "DenoiseClass",
    "DenoiseImage",
    "ImageBlocks",
}


def mentions(source: str) -> list[str]:
    """Names of objectives as strings, and checks for the class of an objective or a recurrence."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in OBJECTIVE_NAMES:
            found.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            found += [f"line {node.lineno}: isinstance {name}" for name in sorted(asked & CLASSES)]
    return sorted(found)


def test_no_objective_is_asked_for_by_name() -> None:
    found = {
        str(path): mentions(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "recurrent_db").rglob("*.py"))
        if path.relative_to(ROOT / "recurrent_db").parts[0] not in OWN_ROOMS
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_mentions_are_found() -> None:
    assert mentions('if name == "unrolled": pass\nisinstance(walk, (int, DenoiseWalk))') == [
        "line 1: 'unrolled'", "line 2: isinstance DenoiseWalk",
    ]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_every_name_has_its_file(name: str) -> None:
    bare = ["--model.n_prelude", 0, "--model.n_coda", 0]
    needed = {"masked": [*bare, "--model.n_blocks", 1], **{other: kind(other, 1) for other in ON_IMAGES}}
    objective = build_objective(micro_config("--objective.name", name, *needed.get(name, [])))
    assert objective.default_k >= 1
    if name not in ON_IMAGES:
        assert objective.recurrence.loop is None or objective.recurrence.walk is None


def test_the_help_describes_every_objective() -> None:
    described = re.findall(r"(\w+): `?(\w+)", name_help())
    assert [name for name, _ in described if name in OBJECTIVE_NAMES] == list(OBJECTIVE_NAMES)
    assert not any(word.endswith("Config") for _, word in described)  # what dataclass makes up without a docstring


PAGE = (ROOT / "docs/adding-an-objective.md").read_text(encoding="utf-8")


HELPERS = (ROOT / "tests/helpers.py").read_text(encoding="utf-8")
TESTS_OF_EVERY_OBJECTIVE = ("tests/objectives/test_objectives.py", "tests/accounting/test_flops.py")


def code_of_page(title: str) -> str:
    """The block of docs/adding-an-objective.md under this title."""
    [code] = re.findall(rf'```python title="{re.escape(title)}"\n(.*?)```', PAGE, re.DOTALL)
    return str(code)


COMMANDS = """
import json, runpy, sys
import pytest
import recurrent_db
from recurrent_db import cli

words, evaluation, tests = json.loads(sys.argv[1])
train = ["train", *words, "--eval.points", "1"]
assert cli.run([*train, "--budget.steps", "3"]) == 0
assert cli.run([*train, "--budget.steps", "6", "--resume"]) == 0
sys.argv = evaluation
try:
    runpy.run_path(evaluation[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code
assert cli.run(["export", "run", "--to", "hf", "out"]) == 0
model, tokenizer = recurrent_db.load("run", "cpu")
assert recurrent_db.generate(model, tokenizer, "a", k=2, max_new_tokens=3)
raise SystemExit(pytest.main(["-v", "-p", "no:cacheprovider", "-k", "deep_supervision", *tests]))
"""


def test_a_new_objective_is_one_file_and_a_section(tmp_path: Path) -> None:
    """The example of the documentation is trained, continued, scored by K, exported and generated from, in a copy of the
    package. It passes its own test, and those that cover every objective."""
    package = tmp_path / "copy/recurrent_db"
    shutil.copytree(ROOT / "recurrent_db", package, ignore=shutil.ignore_patterns("__pycache__"))
    config = package / "objective_config.py"
    text = config.read_text(encoding="utf-8")
    class_of_all, last_field = "@dataclass\nclass Objectives(Section):\n", "    masked: MaskedConfig"
    section = code_of_page("recurrent_db/objective_config.py, before Objectives")
    field = code_of_page("recurrent_db/objective_config.py, in Objectives")
    for place, new in ((class_of_all, section + "\n\n"), (last_field, field)):
        assert text.count(place) == 1
        text = text.replace(place, new + place)
    config.write_text(text, encoding="utf-8")
    code = code_of_page("recurrent_db/objectives/deep_supervision.py")
    (package / "objectives/deep_supervision.py").write_text(code, encoding="utf-8")
    data, name = synthetic_data(tmp_path / "data"), "deep_supervision"
    own_test = "tests/objectives/test_deep_supervision.py"
    changed = {
        own_test: code_of_page(own_test),
        "tests/helpers.py": HELPERS.replace("\nOBJECTIVES = (", f'\nOBJECTIVES = ("{name}", '),
        **{test: (ROOT / test).read_text(encoding="utf-8") for test in TESTS_OF_EVERY_OBJECTIVE},
    }
    for path, code in changed.items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_text(code, encoding="utf-8")
    tests = [str(tmp_path / "copy" / test) for test in (own_test, *TESTS_OF_EVERY_OBJECTIVE)]

    words = [*MICRO, "--objective.name", name, f"--objective.{name}.iterations", "3", "--data.path", str(data)]
    evaluation = [str(ROOT / "eval/depth_curve.py"), "run", "--k", "1,2,3", "--data", str(data)]
    evaluation += ["--tokens", "256", "--json", "k.json"]
    arguments = json.dumps([[*words, "--run.dir", "run"], evaluation, tests])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'copy'}{os.pathsep}{tmp_path / 'copy/tests'}"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"(test_\w+\.py)::\S+ PASSED", done.stdout)
    assert set(passed) == {Path(test).name for test in tests}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["eval/nll_k2"] > 0 and rows[-1]["loss_last"] > 0
    assert set(json.loads((tmp_path / "k.json").read_text())["by_k"]) == {"1", "2", "3"}
    assert json.loads((tmp_path / "out/config.json").read_text())["num_recurrence"] == 3
