"""`recurrent-db flops`: FLOPs of training and generation, by part of the model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from recurrent_db.arguments import parse
from recurrent_db.config import Config, load_config, validate
from recurrent_db.schema import Positive, PositiveInt


@dataclass
class Args:
    """Count the FLOPs of a config's model: per training token for every objective, and per generated token by K.

    Training FLOPs are split by part of the model. For a network for images they are per image.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    epochs_ratio: Positive = 3.0
    """Tokens that `denoise` trains on per token of `unrolled`. The default is the paper's 15 epochs against 5."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size in tokens, used if the config leaves it to the tokenizer."""
    cache_bytes: PositiveInt = 2
    """Bytes per number in the key-value cache. The default is bfloat16."""
    image_size: PositiveInt = 32
    """Height and width of the images in pixels, for networks for images."""
    classes: PositiveInt = 10
    """Number of classes of the images, for networks for images."""
    json: bool = False
    """Print JSON instead of tables."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.objectives.cost_table import blocks_lines, image_lines, lines

    config = load_config(args.config)
    if config.model.network != "language":
        found = images(config, args.image_size, args.classes)
        print(json.dumps(found, indent=1) if args.json else "\n".join(image_lines(found, args.config)))
        return 0
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


def images(config: Config, side: int, classes: int) -> dict[str, Any]:
    """FLOPs of a network for images of ``side`` x ``side`` pixels."""
    from recurrent_db.objectives.cost_table import image_table
    from recurrent_db.objectives.costs import image_steps

    config.model.image_size, config.model.n_classes = [side, side], classes
    validate(config)
    return image_table(config, image_steps(config))
