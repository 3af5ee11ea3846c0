"""`denoise_class`: a vision transformer in blocks (DiffusionBlocks, arXiv 2506.14202, section 5.1).

The target is the embedding of the image's class, of length 1. A training step draws a block and a noise level of its range,
and noises the target. The block sees the result beside the clean patches. Its loss is the cross-entropy of its read-out, in
nats per image.

Inference walks from sigma_max down to the last block. Each step reads out probabilities of the classes, whose mean embedding
is the estimate for the next step. The answer is the mean of the probabilities of all steps: each block sees the image and is
a classifier of its own, and their mean scores better than any of them (docs/notebook.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import ImageBatch
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.objectives.classify import accuracy, mean_scores, nll
from recurrent_db.objectives.image_blocks import ImageBlocks
from recurrent_db.rng import EVALUATION_STEP, Rng


@torch.no_grad()
def walk_log_probabilities(
    model: DiffusionBlocks, batch: ImageBatch, steps: int, draws: int, seed: int
) -> list[Tensor]:
    """Log probabilities of the classes (B, C), fp32, read out at each step of a walk in ``steps`` steps.

    Args:
        draws: walks from pure noise whose probabilities are averaged; their noise is keyed by the seed and the image. 0
            makes one walk from zero, the mean of the noise. It is deterministic and more accurate, because noise of the
            target's size hides from later blocks what earlier ones saw.
    """
    rng, images = Rng(seed, EVALUATION_STEP), batch.images_BCHW
    shape = (model.block(model.held()[0]).width,)
    starts = [rng.normal(batch.sample_index_B, shape, f"walk {draw}", images.device) for draw in range(draws)]
    starts = starts or [images.new_zeros(len(batch), *shape)]
    walks = [[logits.float().softmax(-1) for logits in model.read_outs(eps_BD, steps, images)] for eps_BD in starts]
    return [torch.stack(step).mean(0).clamp_min(1e-30).log() for step in zip(*walks, strict=True)]


def mean_probability(log_probabilities: list[Tensor]) -> Tensor:
    """The logarithm of the mean of several predictions' probabilities, such as those of a walk's steps: (B, C)."""
    return torch.stack(log_probabilities).logsumexp(0) - math.log(len(log_probabilities))


class DenoiseClass(ImageBlocks):
    """Train each block to name the class from the image and the noised class embedding."""

    def loss(self, model: DiffusionBlocks, block: int, batch: ImageBatch, rng: Rng) -> Tensor:
        u_B = rng.uniform(batch.sample_index_B, (), "sigma")
        return model.loss(block, batch.labels_B, u_B, self._noise(batch, rng), x=batch.images_BCHW)

    def _noise(self, batch: ImageBatch, rng: Rng) -> Tensor:
        return rng.normal(batch.sample_index_B, (self.config.model.d_model,), "noise", batch.images_BCHW.device)

    def held_out_loss(self, model: DiffusionBlocks, block: int, batch: ImageBatch, sigma: float, rng: Rng) -> Tensor:
        target_BD = model.targets(block, batch.labels_B)
        sigma_B = torch.full((len(batch),), sigma, dtype=torch.float64)
        logits_BC = model.logits(block, target_BD + sigma * self._noise(batch, rng), sigma_B, x=batch.images_BCHW)
        return nll(logits_BC, batch.labels_B)

    @torch.no_grad()
    def held_out(
        self, model: DiffusionBlocks, batches: Iterable[ImageBatch], vocabulary: ImageClasses, seed: int
    ) -> dict[str, float]:
        """Accuracy and negative log-likelihood by number of steps of a walk from zero, and the loss of each block.

        A run of one block has the latter only, and block 1 also its scores in one step."""
        return mean_scores((len(batch), self._row(model, batch, seed)) for batch in batches)

    def _row(self, model: DiffusionBlocks, batch: ImageBatch, seed: int) -> dict[str, Tensor]:
        row = self.level_losses(model, batch, seed)
        whole = len(model.held()) == self.config.model.n_blocks
        for k in self.config.eval.k if whole else [1] if 1 in model.held() else []:
            logits_BC = mean_probability(walk_log_probabilities(model, batch, k, 0, seed))
            row[f"eval/accuracy_k{k}"], row[f"eval/nll_k{k}"] = (
                accuracy(logits_BC, batch.labels_B),
                nll(logits_BC, batch.labels_B),
            )
        return row


def build(config: Config) -> DenoiseClass:
    return DenoiseClass(config)
