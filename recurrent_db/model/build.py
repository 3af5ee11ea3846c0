"""Makes the network that a configuration describes: `looped.LoopedLM`, or `blocks_lm.BlocksLM` for one in blocks."""

from __future__ import annotations

import torch

from recurrent_db.config import ModelConfig
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import key


def build_model(
    config: ModelConfig, seed: int | None, device: torch.device | str = "cpu", only_block: int = 0
) -> LoopedLM:
    """A model on ``device`` with Huginn's initialisation drawn from ``seed``; ``seed=None`` leaves it empty.

    Weights are drawn on the CPU, so that every device starts from the same ones. Of a model in blocks ``only_block`` (from
    1) makes that block and the embedding alone, with the values that they have in the whole.
    """
    with torch.device("meta"):
        model = BlocksLM(config, only_block) if config.n_blocks else LoopedLM(config)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device="cpu")
    if seed is not None:
        model.initialize(torch.Generator().manual_seed(key(seed, "weights")))
    return model.to(device)
