"""`classify`: a vision transformer names the class of an image, trained end to end. The control of `denoise_class`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import ImageBatch
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.model.passes import Passes
from recurrent_db.model.vit import ViT
from recurrent_db.objectives.base import Metrics, Objective
from recurrent_db.rng import Rng


class Classify(Objective):
    """Cross-entropy of the class, in nats per image."""

    flat = True

    def __call__(self, model: ViT, batch: ImageBatch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        logits_BC = model(batch.images_BCHW)
        return F.cross_entropy(logits_BC.float(), batch.labels_B), {"accuracy": accuracy(logits_BC, batch.labels_B)}

    def passes(self, rng: Rng, progress: float) -> Passes:
        return Passes()

    @torch.no_grad()
    def held_out(
        self, model: ViT, batches: Iterable[ImageBatch], vocabulary: ImageClasses, seed: int
    ) -> dict[str, float]:
        """Accuracy, and negative log-likelihood in nats per image."""

        def row(batch: ImageBatch) -> dict[str, Tensor]:
            logits_BC = model(batch.images_BCHW)
            return {
                "eval/accuracy_k1": accuracy(logits_BC, batch.labels_B),
                "eval/nll_k1": nll(logits_BC, batch.labels_B),
            }

        return mean_scores((len(batch), row(batch)) for batch in batches)


def accuracy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Share of the images whose most likely class is right, 0-dimensional fp32."""
    return (logits_BC.argmax(-1) == labels_B).float().mean()


def nll(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean negative log-likelihood of the classes in nats, 0-dimensional fp32, without gradient."""
    return F.cross_entropy(logits_BC.detach().float(), labels_B)


def mean_scores(rows: Iterable[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Means of each column over batches, weighted by the number of images.

    Args:
        rows: for each batch its number of images, and the mean of each column over them.
    """
    sums: dict[str, float] = {}
    count = 0
    for images, row in rows:
        count += images
        for name, value in row.items():
            sums[name] = sums.get(name, 0.0) + images * float(value)
    return {name: value / count for name, value in sums.items()}


def build(config: Config) -> Classify:
    return Classify()
