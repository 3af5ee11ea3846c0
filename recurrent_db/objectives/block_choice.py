"""Which block a step trains, and who trains the tables (embedding and head) that all blocks share."""

from __future__ import annotations

from recurrent_db.config import Config
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import Rng


def drawn_block(config: Config, rng: Rng) -> int:
    """The block that a step trains."""
    return config.blocks.only or 1 + int(rng.scalar("block") * config.model.n_blocks)


def trains_shared(config: Config, block: int) -> bool:
    """Whether a step of this block trains the shared tables too."""
    return {"all": True, "frozen": False, "owned": block == config.blocks.owner}[config.blocks.shared]


def freeze_shared(config: Config, model: LoopedLM) -> None:
    """In a process that trains one block: no gradients, and no optimizer's state, for tables that it does not train."""
    if isinstance(model, BlocksLM) and config.blocks.only:
        model.train_shared(trains_shared(config, config.blocks.only))
