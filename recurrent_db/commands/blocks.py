"""`recurrent-db blocks join`: one model of blocks that were trained apart."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recurrent_db.arguments import parse
from recurrent_db.errors import UserError


@dataclass
class Args:
    """Make one model of blocks that were trained apart: `recurrent-db blocks join RUN... OUT`.

    A run of a whole model among them (an earlier join) gives the blocks that no other run has.
    """

    action: Annotated[Literal["join"], tyro.conf.Positional]
    """What to do with the blocks."""
    paths: Annotated[list[Path], tyro.conf.Positional]
    """Run directories (or checkpoints) of the blocks, in any order, and last the run directory to make."""
    overwrite: bool = False
    """Replace an older joined run of that name, once the new one is complete. One that has these blocks already stays as it
    is; one that was evaluated or trained further is moved aside."""
    json: bool = False
    """Print what each block cost as JSON."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.store.join_blocks import join

    if len(args.paths) < 2:
        raise UserError("blocks join needs one run or more, and last the run directory to make")
    *runs, out = args.paths
    account = join(runs, out, args.overwrite)
    if args.json:
        print(json.dumps(account, indent=1))
        return 0
    for number, block in account["blocks"].items():
        if block["budget_spent"] < 1:
            print(f"note: {block['run']} was stopped at {block['budget_spent']:.0%} of its budget", file=sys.stderr)
        print(
            f"block {number}: {block['layers']} layers, {_told(block['tokens'], ',')} tokens,"
            f" {_told(block['flops'], '.4g')} FLOPs,"
            f" from {block['run']} ({block['checkpoint']})"
        )
    print(f"the joined model: {out}", file=sys.stderr)
    return 0


def _told(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
