"""The recurrent-db command."""

from __future__ import annotations

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
    assert all(name in told for name in cli.COMMANDS)
    assert cli.run([]) == 2


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
