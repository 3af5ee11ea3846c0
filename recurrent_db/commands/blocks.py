"""`recurrent-db blocks join`: join blocks that were trained separately into one model."""

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
    """Join blocks that were trained separately into one model: `recurrent-db blocks join RUN... OUT`.

    One of the runs may be an earlier joined model. It supplies the blocks that no other run has.
    """

    action: Annotated[Literal["join"], tyro.conf.Positional]
    """The action; join is the only one."""
    paths: Annotated[list[Path], tyro.conf.Positional]
    """Run directories or checkpoints of the blocks, in any order, then the run directory to create."""
    overwrite: bool = False
    """Replace an existing joined run once the new one is complete. An existing run with the same blocks is left unchanged.
    One that was evaluated or trained further is renamed and kept."""
    json: bool = False
    """Print the layers, tokens and FLOPs of each block as JSON."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.store.join_blocks import join

    if len(args.paths) < 2:
        raise UserError("blocks join needs at least one run, followed by the run directory to create")
    *runs, out = args.paths
    account = join(runs, out, args.overwrite)
    if args.json:
        print(json.dumps(account, indent=1))
        return 0
    for number, block in account["blocks"].items():
        if block["budget_spent"] < 1:
            print(f"note: {block['run']} was stopped at {block['budget_spent']:.0%} of its budget", file=sys.stderr)
        print(
            f"block {number}: {block['layers']} layers, {_format(block['tokens'], ',')} tokens,"
            f" {_format(block['flops'], '.4g')} FLOPs,"
            f" from {block['run']} ({block['checkpoint']})"
        )
    print(f"joined model: {out}", file=sys.stderr)
    return 0


def _format(value: float | None, spec: str) -> str:
    return "unknown" if value is None else format(value, spec)
