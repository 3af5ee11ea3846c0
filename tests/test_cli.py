"""The recurrent-db command."""

from __future__ import annotations

import resource
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
        (["flops", str(CONFIGS / "tiny.toml"), "--cache-bytes", "-2"], "--cache-bytes must be above 0"),
        (["flops", str(CONFIGS / "tiny.toml"), "--vocab-size", "0"], "--vocab-size must be above 0"),
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


def processor_seconds(code: str, *words: str) -> tuple[float, str]:
    """Processor time of a Python process that runs ``code``, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stdout


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_is_quick(words: list[str]) -> None:
    """It imports no torch and takes less than 0.3 s of processor time. On a busy machine every process takes longer: there
    the limit is 3.5 times what the parser's import takes at the same moment."""
    seconds: list[float] = []
    for _ in range(5):
        limit = max(0.3, 3.5 * processor_seconds("import tyro")[0])
        took, told = processor_seconds(HELP, *words)
        assert "usage: recurrent-db" in told
        if took < limit:
            return
        seconds.append(took)
    raise AssertionError(f"processor seconds: {seconds}")


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
