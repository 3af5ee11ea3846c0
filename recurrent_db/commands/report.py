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

    A section whose data a run directory lacks is left out, and a note on the page says so.
    """

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Run directories. A baselines.json in their parent folder ({"unigram": nats, ...}) adds reference lines."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """HTML file to write."""
    png: Path | None = None
    """Folder for the plots as PNG files. By default none are written."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.report.page import write_report

    write_report(args.runs, args.output, png_dir=args.png)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0
