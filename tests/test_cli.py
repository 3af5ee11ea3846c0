"""The recurrent-db command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recurrent_db import arguments, cli
from recurrent_db.errors import UserError

CONFIGS = Path(__file__).parents[1] / "train/configs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flopz"], "unknown command 'flopz'"),
        (["flops"], "required"),
        (["flops", "nowhere.toml"], "no config file"),
        (["flops", str(CONFIGS / "tiny.toml"), "--epochs-ratio", "0"], "above 0"),
        (["flops", str(CONFIGS / "tiny.toml"), "--epochs-ratio", "nan"], "--epochs-ratio must be above 0"),
        (["flops", str(CONFIGS / "tiny.toml"), "--cache-bytes", "-2"], "--cache-bytes must be 1 or more, got -2"),
        (["flops", str(CONFIGS / "tiny.toml"), "--vocab-size", "0"], "--vocab-size must be 1 or more"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.run(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"recurrent-db {name}" in told for name in cli.COMMANDS)
    assert cli.run([]) == 2


HELP = """
import sys
from recurrent_db.cli import main

try:
    main()
finally:
    loaded = sorted({"torch", "numpy", "matplotlib"} & sys.modules.keys())
    assert not loaded, f"loaded: {loaded}"
"""


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_loads_nothing_large(words: list[str]) -> None:
    """It imports no torch, so that it takes a third of a second."""
    told = subprocess.run([sys.executable, "-c", HELP, *words], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert "usage: recurrent-db" in told.stdout


def test_of_several_processes_the_first_reports_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank, line, waited in (
        (None, "error: k\n", []),
        ("0", "error: k\n", []),
        ("1", "error (process 1): k\n", [20.0]),
    ):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            arguments.fail("k")
        assert stop.value.code == 2
        assert capsys.readouterr().err == line
        assert waits == waited
