"""`recurrent-db flops`: FLOPs of training and generation, by part of the model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from recurrent_db.arguments import parse
from recurrent_db.config import Config, load_config
from recurrent_db.schema import Positive, PositiveInt


@dataclass
class Args:
    """Count the FLOPs of a config's model: per training token for every objective, and per generated token by K.

    Training FLOPs are split by part of the model.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    epochs_ratio: Positive = 3.0
    """Tokens that `denoise` trains on per token of `unrolled`. The default is the paper's 15 epochs against 5."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size in tokens, used if the config leaves it to the tokenizer."""
    cache_bytes: PositiveInt = 2
    """Bytes per number in the key-value cache. The default is bfloat16."""
    json: bool = False
    """Print JSON instead of tables."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.objectives.cost_table import blocks_lines, lines

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


def table(config: Config, epochs_ratio: Positive, cache_bytes: int) -> dict[str, Any]:
    """FLOPs of each objective and of inference by K. The layers of a model in blocks are counted as its core."""
    from recurrent_db.objectives.cost_table import flops_table
    from recurrent_db.objectives.costs import inference_passes, skip_core_phase, training_passes

    config = copy.deepcopy(config)
    config.model.n_blocks, config.model.block_layers = 0, []
    found = flops_table(config, training_passes(config), inference_passes(config), epochs_ratio, cache_bytes)
    return found | skip_core_phase(config)


def blocks(config: Config) -> dict[str, Any]:
    """FLOPs of each block of a model in blocks."""
    from recurrent_db.objectives.cost_table import blocks_table
    from recurrent_db.objectives.costs import block_passes, whole_passes

    return blocks_table(config, block_passes(config), whole_passes(config))
