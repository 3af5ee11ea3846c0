"""`recurrent-db train`: its words, its help, and that it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MICRO, ROOT

from recurrent_db import cli
from recurrent_db.commands.train import arguments
from recurrent_db.errors import UserError

TINY = str(ROOT / "train/configs/tiny.toml")


def test_what_stands_after_resume() -> None:
    for given, expected in ((["--resume"], "newest"), (["--resume", "last-good"], "last-good"), ([], "")):
        config, resume, overwrite = arguments([TINY, *given, "--seed", "3"])
        assert (config.seed, resume, overwrite) == (3, expected, False)
    assert arguments([TINY, "--overwrite"])[1:] == ("", True)
    with pytest.raises(UserError, match="--resume takes no value or last-good, not 'last-god'"):
        arguments([TINY, "--resume", "last-god"])
    with pytest.raises(UserError, match="cannot be combined"):
        arguments([TINY, "--resume", "--overwrite"])


def test_help_is_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(["train", "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "usage: recurrent-db train CONFIG.toml" in told
    for words in ("--resume", "--overwrite", "--model.d-model INT", "Width of the residual stream"):
        assert words in told


def test_it_trains_and_continues(data: Path, tmp_path: Path) -> None:
    words = ["train", *MICRO, "--data.path", str(data), "--run.dir", str(tmp_path / "run"), "--eval.points", "0"]
    assert cli.run([*words, "--budget.steps", "2"]) == 0
    assert cli.run([*words, "--budget.steps", "3", "--resume"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    with pytest.raises(UserError, match="--overwrite"):
        cli.run([*words, "--budget.steps", "2"])


@pytest.mark.parametrize("program", [["train/pretrain.py"], ["-m", "recurrent_db", "train"]], ids=["script", "command"])
def test_torchrun_starts_it(data: Path, tmp_path: Path, program: list[str], quick_python: str) -> None:
    """Two processes, whichever way torchrun starts them, end with the losses of one."""
    words = [*MICRO, "--data.path", str(data), "--eval.points", "0", "--budget.steps", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *program]
    done = subprocess.run(
        [*command, *words, "--run.dir", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHON_EXEC": quick_python},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cli.run(["train", *words, "--run.dir", str(tmp_path / "one")]) == 0
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)
