"""Shared output of the reliability benchmarks. Each writes its own rows into the table of docs/measurements.md."""

from __future__ import annotations

import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

from recurrent_db.files import write_atomic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measurements.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = ["| what | result | command | date, machine |", "| --- | --- | --- | --- |"]


def finish(result: dict[str, Any], json_path: Path | None, rows: dict[str, tuple[str, str]] | None) -> int:
    """Print a benchmark's result, and write it to ``json_path`` and ``rows`` into the table if given. Returns the exit
    status, which is 1 if ``result["failures"]`` is not empty."""
    text = json.dumps(result, indent=1)
    print(text)
    if json_path:
        write_atomic(json_path, text + "\n")
    if rows:
        write_rows(rows)
    return int(bool(result["failures"]))


def read_rows(page: Path = PAGE) -> dict[str, str]:
    """Lines of the table, by the text of their first column."""
    block = page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = [line for line in block.splitlines() if line.startswith("| ") and line not in HEAD]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def write_rows(rows: dict[str, tuple[str, str]], page: Path = PAGE) -> None:
    """Write rows, name -> (result, command), into the table. They replace older rows of the same name."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    stamp = f"{datetime.date.today().isoformat()}, {platform.machine()}, Python {platform.python_version()}"
    lines = read_rows(page)
    for what, (result, command) in rows.items():
        command = re.sub(r" --(json|run) \S+", "", command)  # leave out local paths
        command = re.sub(r" --data \S+", " --data DIR", command)
        lines[what] = f"| {what} | {result} | `{command}` | {stamp} |"
    write_atomic(page, "\n".join([before + BEGIN, *HEAD, *lines.values(), END]) + after)
