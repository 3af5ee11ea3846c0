"""`recurrent-db flops`: what training and generation cost, by part."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from recurrent_db.arguments import parse
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError


@dataclass
class Args:
    """FLOPs per training token by part, for every way of training, and per generated token by K, at a config's shape."""

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    epochs_ratio: float = 3.0
    """Tokens that `denoise` is trained on for each token of `unrolled`; the paper's 15 epochs against 5 are 3."""
    vocab_size: int = 2048
    """Vocabulary where the config takes the tokenizer's."""
    cache_bytes: int = 2
    """Bytes of a number in the key-value cache (2: bfloat16)."""
    json: bool = False
    """Print JSON instead of tables."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.objectives.cost_table import blocks_lines, lines

    for option, value in (("--epochs-ratio", args.epochs_ratio), ("--cache-bytes", args.cache_bytes),
                          ("--vocab-size", args.vocab_size)):  # fmt: skip
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{option} must be above 0, got {value}")
    config = load_config(args.config)
    config.model.vocab_size = config.model.vocab_size or args.vocab_size
    if args.json:
        in_blocks = blocks(config) if config.model.n_blocks else {}
        print(json.dumps(table(config, args.epochs_ratio, args.cache_bytes) | in_blocks, indent=1))
    elif config.model.n_blocks:
        print("\n".join(blocks_lines(blocks(config), args.config)))
    else:
        found = table(config, args.epochs_ratio, args.cache_bytes)
        print("\n".join(lines(found, config, args.config, args.cache_bytes)))
    return 0


def table(config: Config, epochs_ratio: float, cache_bytes: int) -> dict[str, Any]:
    """What each way of training and each recurrence costs. The layers of a model in blocks count as a core."""
    from recurrent_db.objectives.cost_table import flops_table
    from recurrent_db.objectives.costs import inference_passes, skip_core_phase, training_passes

    config = copy.deepcopy(config)
    config.model.n_blocks, config.model.block_layers = 0, []
    found = flops_table(config, training_passes(config), inference_passes(config), epochs_ratio, cache_bytes)
    return found | skip_core_phase(config)


def blocks(config: Config) -> dict[str, Any]:
    """What each block of a model in blocks costs."""
    from recurrent_db.objectives.cost_table import blocks_table
    from recurrent_db.objectives.costs import block_passes, whole_passes

    return blocks_table(config, block_passes(config), whole_passes(config))
