"""`recurrent-db export`: a run as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recurrent_db.arguments import parse


@dataclass
class Args:
    """Write a run as a folder for Hugging Face transformers: weights, configuration, tokenizer and modelling code.

    `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` loads it, and so does `AutoTokenizer` with the same
    option. Where the run kept an average of its weights, that is what is written, as everywhere else.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist or be empty."""
    to: Literal["hf"] = "hf"
    """Format; there is one."""
    k: int = 0
    """Core iterations where a caller does not say (`num_recurrence`); 0 takes the objective's own."""
    seed: int = 0
    """Seed of random initial states."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.huggingface.export import export

    checkpoint = export(args.run, args.folder, args.k, args.seed)
    print(f"wrote {args.folder} from {checkpoint}", file=sys.stderr)
    return 0
