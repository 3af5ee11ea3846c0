"""`recurrent-db import`: turn a Hugging Face transformers folder into a run directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recurrent_db.arguments import parse
from recurrent_db.errors import UserError


@dataclass
class Args:
    """Create a run from a Hugging Face transformers folder: one written by export, a Huginn checkpoint, or with --as looped
    a pretrained Llama, Mistral, Qwen2, Qwen3, SmolLM or GPT-NeoX (Pythia).

    Weights are read from safetensors files only, and nothing in the folder is executed. The run can be scored and sampled.
    To train it further, prepare data with its tokenizer and run `train/pretrain.py CONFIG.toml --init.from RUN`.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with config.json, *.safetensors and the tokenizer."""
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory to create. It must be empty or not exist."""
    as_: Annotated[Literal["looped"] | None, tyro.conf.arg(name="as")] = None
    """Cut the layers of a pretrained transformer into prelude, core and coda. The run computes the same logits as the
    source until it is trained, for any number of iterations."""
    prelude: int | None = None
    """Number of layers in the prelude; by default a quarter of the layers."""
    core: int | None = None
    """Number of layers in the core; by default those that are left."""
    coda: int | None = None
    """Number of layers in the coda; by default a quarter of the layers."""
    drop: str = ""
    """Layers to leave out, counted from 0: 12-15, or 3,12-15. The logits then differ from the source's."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.huggingface.import_folder import import_folder
    from recurrent_db.huggingface.retrofit import Cut

    cut = Cut(args.prelude, args.core, args.coda, args.drop)
    if args.as_ is None and cut != Cut():
        raise UserError("--prelude, --core, --coda and --drop need --as looped")
    model = import_folder(args.folder, args.run, cut if args.as_ else None)
    print(f"wrote {args.run}: {model.parameter_counts()['total']:,} parameters", file=sys.stderr)
    return 0
