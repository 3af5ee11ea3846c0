"""Nobody knows an objective by name: outside its own rooms no name of one occurs, and a new one touches one file and its
section."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MICRO, ROOT, micro_config, synthetic_data

from recurrent_db.objective_config import OBJECTIVE_NAMES
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
    blocks = ["--model.n_blocks", 1, "--model.n_prelude", 0, "--model.n_coda", 0] if name == "masked" else []
    objective = build_objective(micro_config("--objective.name", name, *blocks))
    assert objective.default_k >= 1
    assert objective.recurrence.loop is None or objective.recurrence.walk is None


NEW_FILE = '''"""`two_pass`: two iterations, all backpropagated."""

import torch

from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Objective, cross_entropy
from recurrent_db.recurrence.loop import PlainLoop


class TwoPass(Objective):
    recurrence = PlainLoop(initial="zeros")
    default_k = 2

    def __init__(self, options):
        self.smoothing = options.smoothing

    def __call__(self, model, batch, rng, progress):
        visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(batch.tokens_BT, visible)
        state_BTD = model.iterate(torch.zeros_like(e_BTD), e_BTD, 2, visible=visible)
        loss, _ = cross_entropy(model, model.decode(state_BTD, visible=visible), batch.targets_BT)
        return loss * (1 - self.smoothing), {}

    def passes(self, rng, progress):
        return Passes(core_grad=2)


def build(config):
    return TwoPass(config.objective.two_pass)
'''
NEW_SECTION = '''@dataclass
class TwoPassConfig(ObjectiveSection):
    """Two iterations, all backpropagated."""

    smoothing: Share = 0.1
    """Share of the loss that is left out."""


@dataclass
class Objectives(Section):
'''
NEW_FIELD = "    two_pass: TwoPassConfig = field(default_factory=TwoPassConfig)\n    masked: MaskedConfig"


def test_a_new_objective_is_one_file_and_a_section(tmp_path: Path) -> None:
    """Trained, continued, scored by K, generated from and exported, in a copy of the package."""
    shutil.copytree(ROOT / "recurrent_db", tmp_path / "copy/recurrent_db", ignore=shutil.ignore_patterns("__pycache__"))
    config = tmp_path / "copy/recurrent_db/objective_config.py"
    text = config.read_text(encoding="utf-8")
    for old, new in (
        ("@dataclass\nclass Objectives(Section):\n", NEW_SECTION),
        ("    masked: MaskedConfig", NEW_FIELD),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    config.write_text(text, encoding="utf-8")
    (tmp_path / "copy/recurrent_db/objectives/two_pass.py").write_text(NEW_FILE, encoding="utf-8")
    data, run = synthetic_data(tmp_path / "data"), tmp_path / "run"

    def call(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "copy")}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    words = [*MICRO, "--objective.name", "two_pass", "--objective.two_pass.smoothing", "0.2", "--data.path", data]
    train = ["-m", "recurrent_db", "train", *words, "--run.dir", run, "--eval.points", 1]
    call(*train, "--budget.steps", 3)
    call(*train, "--budget.steps", 6, "--resume")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["eval/nll_k2"] > 0
    call(
        ROOT / "eval/depth_curve.py",
        run,
        "--k",
        "1,2,3",
        "--data",
        data,
        "--tokens",
        256,
        "--json",
        tmp_path / "k.json",
    )
    assert set(json.loads((tmp_path / "k.json").read_text())["by_k"]) == {"1", "2", "3"}
    call("-m", "recurrent_db", "export", run, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_recurrence"] == 2
    load = "import recurrent_db as r; m, t = r.load('run', 'cpu'); print(r.generate(m, t, 'a', k=2, max_new_tokens=3))"
    assert call("-c", load)
