"""Builds the network of a configuration.

It is a `looped.LoopedLM`, a `blocks_lm.BlocksLM` for a language model in blocks, or a network for images (`image_networks`).
"""

from __future__ import annotations

import torch
from torch import nn

from recurrent_db.config import Config, ModelConfig
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import key


def build_model(
    config: ModelConfig, seed: int | None, device: torch.device | str = "cpu", only_block: int = 0
) -> LoopedLM:
    """Build a model with Huginn's initialisation.

    Args:
        config: shape of the network, with ``vocab_size`` set.
        seed: seed of the initial weights; None leaves them uninitialised.
        device: device of the model. Weights are drawn on the CPU, so all devices start from the same values. On ``meta`` the
            model has no storage.
        only_block: for a model in blocks, the single block to build, from 1; 0 builds all. Its weights are the same as in
            the whole model.

    Raises:
        UserError: ``config.vocab_size`` is not set.
    """
    with torch.device("meta"):
        model = BlocksLM(config, only_block) if config.n_blocks else LoopedLM(config)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device="cpu")
    if seed is not None:
        model.initialize(torch.Generator().manual_seed(key(seed, "weights")))
    return model.to(device)


def build_network(config: Config, seed: int | None, device: torch.device | str = "cpu") -> nn.Module:
    """Build the network of a whole configuration, for text or images. Arguments and errors are those of `build_model` and
    `image_networks.build_image_network`."""
    if config.model.network == "language":
        return build_model(config.model, seed, device, config.blocks.only)
    return build_image_network(config, seed, device)
