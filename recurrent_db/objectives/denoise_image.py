"""`denoise_image`: a diffusion transformer in blocks (DiffusionBlocks, arXiv 2506.14202, section 5.2).

The target is the image itself, in [-1, 1]. A training step draws a block and a noise level of its range, and the block
estimates the image from the noised image and its class. The loss is EDM's weighted squared error (arXiv 2206.00364, eq. 8).
A share of the classes is hidden in training, so that sampling can be guided without a classifier (arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import ImageBatch
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.objectives.classify import mean_scores
from recurrent_db.objectives.image_blocks import ImageBlocks
from recurrent_db.rng import Rng


class DenoiseImage(ImageBlocks):
    """Train each block to estimate the image from the noised image and its class."""

    def loss(self, model: DiffusionBlocks, block: int, batch: ImageBatch, rng: Rng) -> Tensor:
        u_B, u_label_B = (rng.uniform(batch.sample_index_B, (), stream) for stream in ("sigma", "label"))
        eps = self._noise(batch, rng)
        return model.loss(block, batch.images_BCHW, u_B, eps, label=batch.labels_B, u_label_B=u_label_B)

    def _noise(self, batch: ImageBatch, rng: Rng) -> Tensor:
        images = batch.images_BCHW
        return rng.normal(batch.sample_index_B, tuple(images.shape[1:]), "noise", images.device)

    def held_out_loss(self, model: DiffusionBlocks, block: int, batch: ImageBatch, sigma: float, rng: Rng) -> Tensor:
        images, sigma_B = batch.images_BCHW, torch.full((len(batch),), sigma, dtype=torch.float64)
        estimate = model.denoise(block, images + sigma * self._noise(batch, rng), sigma_B, label=batch.labels_B)
        return model.precond.weight(torch.tensor(sigma)) * (estimate - images).square().mean()

    @torch.no_grad()
    def held_out(
        self, model: DiffusionBlocks, batches: Iterable[ImageBatch], vocabulary: ImageClasses, seed: int
    ) -> dict[str, float]:
        """The loss of each block, and their mean if the network holds all blocks."""
        row = mean_scores((len(batch), self.level_losses(model, batch, seed)) for batch in batches)
        if len(model.held()) == self.config.model.n_blocks:
            row["eval/loss"] = sum(row[f"eval/loss_block_{block}"] for block in model.held()) / len(model.held())
        return row


def build(config: Config) -> DenoiseImage:
    return DenoiseImage(config)
