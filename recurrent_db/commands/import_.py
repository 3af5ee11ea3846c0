"""`recurrent-db import`: turn a Hugging Face transformers folder into a run directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recurrent_db.arguments import parse


@dataclass
class Args:
    """Create a run from a Hugging Face transformers folder: one written by export, or a Huginn checkpoint.

    Weights are read from safetensors files only, and nothing in the folder is executed. The run can be scored and sampled.
    To train it further, prepare data with its tokenizer and run `train/pretrain.py CONFIG.toml --init.from RUN`.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with config.json, *.safetensors and the tokenizer."""
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory to create. It must be empty or not exist."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.huggingface.import_folder import import_folder

    model = import_folder(args.folder, args.run)
    print(f"wrote {args.run}: {model.parameter_counts()['total']:,} parameters", file=sys.stderr)
    return 0
