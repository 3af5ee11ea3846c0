"""`recurrent-db import`: a folder of Hugging Face transformers as a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recurrent_db.arguments import parse


@dataclass
class Args:
    """Make a run of a folder of Hugging Face transformers: one that export wrote, or a Huginn checkpoint.

    Weights are read from safetensors alone and nothing in the folder is executed. The run can be scored, sampled, and
    trained on (`train/pretrain.py CONFIG.toml --init.from RUN`, on data prepared with its tokenizer).
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with config.json, *.safetensors and the tokenizer."""
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory to make; it must not exist or be empty."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.huggingface.import_folder import import_folder

    model = import_folder(args.folder, args.run)
    print(f"made {args.run}: {model.parameter_counts()['total']:,} parameters", file=sys.stderr)
    return 0
