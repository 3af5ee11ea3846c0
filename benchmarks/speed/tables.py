"""The tables of benchmarks/speed/training.py, and their place in docs/measurements.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from recurrent_db.errors import UserError


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["-" * w for w in widths], *lines[1:]])


def both(row: dict[str, Any], key: str, show: Callable[[Any], str]) -> str:
    """Our value, and the reference's after a slash."""
    values = [row.get(prefix + key) for prefix in ("", "reference_")]
    return " / ".join(show(value) for value in values if value is not None) or "-"


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Shares of the profiled time, by prefix and group."""
    found: dict[str, float] = {}
    for prefix in ("", "reference_"):
        times = row.get(f"{prefix}time_by_group", {})
        found |= {prefix + group: seconds / sum(times.values()) for group, seconds in times.items()}
    return found


def tables(result: dict[str, Any]) -> str:
    """A whole result as Markdown."""
    rows, machine, percent = result["rows"], result["machine"], "{:.0%}".format
    on_gpu = machine["device"].startswith("cuda")
    unit, unit_name = (1e12, "TFLOP/s") if on_gpu else (1e9, "GFLOP/s")

    def name(row: dict[str, Any]) -> list[str]:
        return [row["preset"], row["backend"], "compiled" if row["compiled"] else "eager"]

    def spread(row: dict[str, Any]) -> str:
        return "-" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_least']:.2f}-{row['ratio_most']:.2f})"

    head = ["objective", "preset", "attention", "mode", "batch", "tokens/s", unit_name, "ratio",
            "MFU" if on_gpu else "share of peak", "peak MiB",
            "outside matmul and attention", "slow first steps", "their seconds"]  # fmt: skip
    main = [
        [
            row["objective"], *name(row), f"{row['batch_size']} x {row['length']}", f"{row['tokens_per_s']:,.0f}",
            both(row, "flops_per_s", lambda v: f"{v / unit:,.1f}"), spread(row),
            both(row, "share_of_peak", percent), both(row, "peak_memory_bytes", lambda v: f"{v / 2**20:,.0f}"),
            both(row, "outside_matmul_and_attention", percent),
            both(row, "slow_first_steps", str), both(row, "slow_first_seconds", "{:.1f}".format),
        ]
        for row in rows
    ]  # fmt: skip
    groups = list(rows[0]["time_by_group"]) if rows else []
    parts = [[row["objective"], *name(row), *(both(shares(row), group, percent) for group in groups)] for row in rows]
    # Femtoseconds per FLOP on a GPU, picoseconds on a CPU.
    cores = [
        [*name(row), str(row["iterations"]), f"{row['seconds_per_flop_one'] * unit * 1e3:.2f}",
         f"{row['seconds_per_flop_deep'] * unit * 1e3:.2f}", spread(row)]
        for row in result["core"]
    ]  # fmt: skip
    versions = ", ".join(f"{package} {machine['packages'][package]}" for package in ("torch", "transformers"))
    described = (
        f"{machine['device_name']}, {machine['threads']} threads, {versions}, Python {machine['python']},"
        f" seed {result['seed']}, commit {(machine['git_commit'] or 'unknown')[:12]}:\n"
    ) + "\n".join(f"`{command}`" for command in result["command"])
    return "\n\n".join([
        described, table(head, main),
        "Time by part, of a profiled step:", table(["objective", "preset", "attention", "mode", *groups], parts),
        f"The core alone, forward and backward, in {'femto' if on_gpu else 'pico'}seconds per FLOP:",
        table(["preset", "attention", "mode", "iterations", "one", "all of them", "ratio"], cores),
    ])  # fmt: skip


BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
SECTIONS = {"cpu": "### On a CPU", "cuda": "### On a GPU"}
UNMEASURED = (
    "Not yet measured. On a machine with a GPU `benchmarks/gpu.sh` measures, and then\n"
    "`python benchmarks/speed/training.py --load benchmarks/results/gpu/{sdpa,compiled,flex,flash}.json --markdown\n"
    "docs/measurements.md` writes the tables."
)


def rewrite(text: str, kind: str, content: str) -> str:
    """Replace the section of device ``kind`` between the marks in ``text`` by ``content``. All other text stays the same.

    Raises:
        UserError: the marks are missing.
    """
    found = re.search(rf"(?s)(.*{BEGIN}\n)(.*)({END}.*)", text)
    if found is None:
        raise UserError(f"--markdown: the file has no lines {BEGIN} and {END}")
    old = dict(re.findall(r"(?s)<!-- speed: (cpu|cuda) -->\n### [^\n]*\n\n(.*?)\n\n(?=<!-- speed|\Z)", found[2]))
    new = {each: old.get(each, UNMEASURED) for each in SECTIONS} | {kind: content}
    region = "".join(f"<!-- speed: {each} -->\n{SECTIONS[each]}\n\n{new[each]}\n\n" for each in SECTIONS)
    return found[1] + region + found[3]
