"""benchmarks/speed/busy.py: its rows, and that each process it measures has the policy that its row names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import load_script

benchmark = load_script("benchmarks/speed/busy.py")


def test_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str | None] = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # what this process has is not passed on

    def run(command: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(env.get("OMP_WAIT_POLICY"))
        return subprocess.CompletedProcess(command, 0, f"{len(seen)}.0\n")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.main(benchmark.Args(rounds=1, json=tmp_path / "rows.json")) == 0
    assert seen == [None, None, "PASSIVE", "PASSIVE"]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["policy"], row["ratio"]) for row in rows] == [("the runtime's own", 2.0), ("passive", 4 / 3)]
    assert "busy/idle" in capsys.readouterr().out


@pytest.mark.long
def test_a_process_is_measured() -> None:
    assert benchmark.measured(benchmark.Args(seconds=0.1), "PASSIVE") > 0
