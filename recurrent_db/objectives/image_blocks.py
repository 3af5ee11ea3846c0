"""What `denoise_class` and `denoise_image` share: each step trains one block of a network for images, alone."""

from __future__ import annotations

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import ImageBatch
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective
from recurrent_db.objectives.block_choice import drawn_block, trains_shared
from recurrent_db.rng import EVALUATION_STEP, Rng

HELD_OUT_LEVELS = 4
"""Number of noise levels of each block at which held-out images are scored."""


class ImageBlocks(Objective):
    """Base class. A subclass defines `loss`, the loss of one block."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, model: DiffusionBlocks, block: int, batch: ImageBatch, rng: Rng) -> Tensor:
        """The loss of a block on a batch, 0-dimensional."""
        raise NotImplementedError

    def held_out_loss(self, model: DiffusionBlocks, block: int, batch: ImageBatch, sigma: float, rng: Rng) -> Tensor:
        """The loss of a block at one noise level, 0-dimensional, without gradient."""
        raise NotImplementedError

    def prepare(self, model: DiffusionBlocks) -> None:
        only = self.config.blocks.only
        if only and model.frame is not None and not self._trains_frame(only):
            model.frame.requires_grad_(False)

    def _trains_frame(self, block: int) -> bool:
        return trains_shared(self.config, block)

    def __call__(self, model: DiffusionBlocks, batch: ImageBatch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        block = drawn_block(self.config, rng)
        loss = self.loss(model, block, batch, rng)
        return loss, {f"loss_block_{block}": loss.detach()}

    def passes(self, rng: Rng, progress: float) -> Passes:
        block = drawn_block(self.config, rng)
        layers = self.config.model.block_layers[block - 1]
        return Passes(noise_levels=1, core_layers=layers, tables_grad=self._trains_frame(block))

    def describe(self, model: DiffusionBlocks) -> list[str]:
        shared, counts = self.config.blocks.shared, self.config.model.block_layers
        lines = []
        for block in model.held():
            low, high = model.partition.range_of(block)
            atom = f", {model.atom:.0%} of the draws at its upper end" if model.atom and block == 1 else ""
            lines.append(
                f"block {block} of {len(counts)}: {counts[block - 1]} layers, sigma in [{low:.3g}, {high:.3g}]{atom}"
            )
        who = {
            "owned": f"trained by block {self.config.blocks.owner}",
            "frozen": "frozen",
            "all": "a copy in each block",
        }
        return [*lines, f"patch embedding and read-out: {who[shared]}"]

    def level_losses(self, model: DiffusionBlocks, batch: ImageBatch, seed: int) -> dict[str, Tensor]:
        """Columns of metrics.jsonl: the loss of each block at levels spread over its range, and their mean.

        The target is noised from the answer, as in training, so these are no scores of the network as a whole.
        """
        row, rng = dict[str, Tensor](), Rng(seed, EVALUATION_STEP)
        for block in model.held():
            losses = []
            for sigma in model.partition.levels_inside(block, HELD_OUT_LEVELS):
                losses.append(self.held_out_loss(model, block, batch, sigma, rng))
                row[f"eval/loss_sigma_{sigma:.3g}"] = losses[-1]
            row[f"eval/loss_block_{block}"] = torch.stack(losses).mean()
        return row
