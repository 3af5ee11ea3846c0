"""`recurrent-db report`: one HTML page that compares runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recurrent_db.arguments import parse


@dataclass
class Args:
    """Compare runs on one self-contained HTML page: loss against FLOPs, NLL by K, FLOPs, memory, throughput, samples.

    What a run directory does not hold is left out of the page, with a note.
    """

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Run directories. A baselines.json beside them ({"unigram": nats, ...}) adds reference lines."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """HTML file to write."""
    png: Path | None = None
    """Folder for the same plots as PNG files."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.report.page import write_report

    write_report(args.runs, args.output, png_dir=args.png)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0
