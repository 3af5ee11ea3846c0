"""Which block a training step trains, and whether it trains what all blocks share."""

from __future__ import annotations

from recurrent_db.config import Config
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import Rng


def drawn_block(config: Config, rng: Rng) -> int:
    """The block that a step trains, from 1: ``blocks.only``, or a uniform draw."""
    return config.blocks.only or 1 + int(rng.scalar("block") * config.model.n_blocks)


def trains_shared(config: Config, block: int) -> bool:
    """Whether a step of this block also trains the shared embedding and head, or its copy of them."""
    return {"all": True, "frozen": False, "owned": block == config.blocks.owner}[config.blocks.shared]


def freeze_shared(config: Config, model: LoopedLM) -> None:
    """In a process that trains one block, freeze embedding and head if that block does not train them. They then need
    neither gradients nor optimizer state."""
    if isinstance(model, BlocksLM) and config.blocks.only:
        model.train_shared(trains_shared(config, config.blocks.only))
