"""`recurrent-db export`: write a run as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recurrent_db.arguments import parse


@dataclass
class Args:
    """Export a run to a Hugging Face transformers folder: weights, configuration, tokenizer and modelling code.

    Load it with `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`, and the tokenizer with `AutoTokenizer`
    and the same option. If the run has averaged weights (EMA), these are exported.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to create. It must be empty or not exist."""
    to: Literal["hf"] = "hf"
    """Format of the folder; hf is the only one."""
    k: int = 0
    """Default number of core iterations of the exported model (`num_recurrence`). 0 takes the objective's own default."""
    seed: int = 0
    """Seed of the random initial states."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.huggingface.export import export

    checkpoint = export(args.run, args.folder, args.k, args.seed)
    print(f"wrote {args.folder} from {checkpoint}", file=sys.stderr)
    return 0
