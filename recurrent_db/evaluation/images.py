"""Scores of networks for images: accuracy and likelihood of a classifier, and samples of a generator.

    run = load_image_run("runs/vit")
    scores = classify_images(run, open_images("data/images", "test"), steps=(1, 3))
    print(scores.summary(scores.by_steps[3]))

A network in blocks names the class by a walk. Its scores are by number of steps, whose probabilities are averaged, and by
block: the read-out of each block along the walk in which every block makes one step. `image_metrics` measures the distance
of samples from real images.

Shapes: N images, C classes, H and W pixels, D features.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_db.accounting.image_flops import forward_flops
from recurrent_db.data import ImageData, image_batches
from recurrent_db.data.image_loader import from_pixels, to_pixels
from recurrent_db.denoise.convert import JOIN, DiffusionBlocks
from recurrent_db.denoise.partition import Partition
from recurrent_db.denoise.sampler import EVALUATIONS, STEPS, STOCHASTIC
from recurrent_db.errors import UserError
from recurrent_db.evaluation.image_metrics import Extractor, ImageScores, compare
from recurrent_db.model.vit import ViT
from recurrent_db.objectives.denoise_class import mean_probability, walk_log_probabilities
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.loading import ImageRun

SAMPLERS = tuple(sorted(STEPS.keys() - STOCHASTIC))
"""Names of the samplers of images."""
GRID_COLUMNS = 8
MOST_GRID_PIXELS = 4096
"""Largest height of a grid."""

Progress = Callable[[int], object]
"""Called with the number of images that were finished since the last call."""


def check_fits(run: ImageRun, data: ImageData) -> None:
    """Raise `UserError` if the images have other classes or another size than those the run was trained on."""
    ours = run.images
    if tuple(data.classes) != ours.classes:
        pairs = zip(data.classes, ours.classes, strict=False)
        counts = f"{len(data.classes)} and {len(ours.classes)}"
        which = next((f"{found[:200]!r} and {known[:200]!r}" for found, known in pairs if found != known), counts)
        raise UserError(f"{data.where} has other classes than {run.path} was trained on ({which})")
    if tuple(data.size) != tuple(ours.size):
        sizes = [f"{height} x {width}" for height, width in (data.size, ours.size)]
        raise UserError(f"{data.where} has images of {sizes[0]} pixels, but {run.path} was trained on {sizes[1]}")


def _check_whole(run: ImageRun, network: DiffusionBlocks) -> None:
    held, count = network.held(), run.config.model.n_blocks
    if len(held) < count:
        raise UserError(f"{run.path} has only block {held[0]} of {count}: {JOIN}")


# ---------------------------------------------------------------------------------------------------------------
# Classifiers


@dataclass(frozen=True)
class ClassScore:
    """Mean scores over images, with their standard errors."""

    accuracy: float
    """Share of the images whose most likely class is right."""
    accuracy_stderr: float
    nll: float
    """Negative log-likelihood of the class, in nats per image."""
    nll_stderr: float


@dataclass(frozen=True)
class ClassScores:
    """A classifier's predictions for every image of a split, in the order of the split. All tensors are on the CPU."""

    labels_N: Tensor
    """The right classes, int64."""
    by_steps: dict[int, Tensor]
    """Log probabilities (N, C), fp32, by number of steps of the walk: the mean over its steps. A network without blocks has
    1 only."""
    by_block: dict[int, Tensor]
    """Log probabilities (N, C), fp32, read out by each block in a walk where every block makes one step. Empty for a network
    without blocks."""
    flops: dict[int, float]
    """Forward FLOPs per image by number of steps, for one draw."""

    def correct(self, steps: int) -> Tensor:
        """Whether the most likely class is right, bool (N,)."""
        return self.by_steps[steps].argmax(-1) == self.labels_N

    def summary(self, log_probs_NC: Tensor) -> ClassScore:
        """The scores of one entry of `by_steps` or `by_block`."""
        right_N = (log_probs_NC.argmax(-1) == self.labels_N).double()
        nll_N = -log_probs_NC.double().gather(1, self.labels_N[:, None])[:, 0]
        means = [(float(x.mean()), float(x.std(correction=0)) / math.sqrt(len(x))) for x in (right_N, nll_N)]
        return ClassScore(*means[0], *means[1])


def default_steps(run: ImageRun) -> tuple[int, ...]:
    """Numbers of steps worth scoring: 1, one for each block, and two for each block, if the run has all blocks."""
    count = run.config.model.n_blocks
    whole = isinstance(run.network, DiffusionBlocks) and len(run.network.held()) == count
    return tuple(sorted({1, count, 2 * count})) if whole else (1,)


@torch.no_grad()
def classify_images(
    run: ImageRun,
    data: ImageData,
    steps: Sequence[int] = (),
    draws: int = 0,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> ClassScores:
    """Predict the class of every image of a split.

    A run of block 1 alone can be scored in one step.

    Args:
        run: a run of `classify` or `denoise_class`.
        steps: numbers of steps of the walk; empty takes `default_steps`.
        draws: walks from noise whose probabilities are averaged; 0 makes one walk from zero. The noise depends on the seed
            and the image's number only.

    Raises:
        UserError: the run generates images, the data's classes or size differ from the run's, or a walk needs a block that
            the run lacks.
    """
    network, model = run.network, run.config.model
    if model.network != "vit":
        raise UserError(f"{run.path} is a {run.config.objective.name} run, which generates images and names no classes")
    check_fits(run, data)
    wanted = sorted(set(steps)) or list(default_steps(run))
    if isinstance(network, ViT) and wanted != [1]:
        raise UserError(f"{run.path} is a {run.config.objective.name} run, which has no walk: it is scored in 1 step")
    if isinstance(network, DiffusionBlocks) and (wanted != [1] or network.held()[0] != 1):
        _check_whole(run, network)
    whole = isinstance(network, DiffusionBlocks) and len(network.held()) == model.n_blocks
    walks = {*wanted, model.n_blocks} if whole else wanted
    device = next(network.parameters()).device
    found: dict[int, list[list[Tensor]]] = {count: [] for count in walks}
    labels = []
    for batch in image_batches(data, batch_size):
        labels.append(batch.labels_B)
        batch = batch.to(device)
        for count, parts in found.items():
            if isinstance(network, ViT):
                parts.append([network(batch.images_BCHW).float().log_softmax(-1).cpu()])
            else:
                read = walk_log_probabilities(network, batch, count, draws, seed)
                parts.append([log_probs_BC.cpu() for log_probs_BC in read])
        if progress is not None:
            progress(len(batch))
    joined = {count: [torch.cat(read) for read in zip(*parts, strict=True)] for count, parts in found.items()}
    each = joined[model.n_blocks if whole else 1] if isinstance(network, DiffusionBlocks) else []
    return ClassScores(
        torch.cat(labels), {count: mean_probability(joined[count]) for count in wanted}, dict(enumerate(each, 1)),
        {count: walk_flops(run, count) for count in wanted},
    )  # fmt: skip


def average(*scores: ClassScores) -> ClassScores:
    """The mean of several runs' probabilities for the same images. Its FLOPs are the sum of theirs.

    It holds the numbers of steps and the blocks that all of them have.

    Raises:
        UserError: nothing is given, or the scores are of different images.
    """
    if not scores:
        raise UserError("there are no scores to average")
    first = scores[0]
    if any(not torch.equal(other.labels_N, first.labels_N) for other in scores):
        raise UserError("scores of different images cannot be averaged")

    def mean(tables: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
        common = [name for name in tables[0] if all(name in table for table in tables)]
        stacked = {name: torch.stack([table[name] for table in tables]) for name in common}
        return {name: stack.logsumexp(0) - math.log(len(tables)) for name, stack in stacked.items()}

    by_steps = mean([one.by_steps for one in scores])
    flops = {count: sum(one.flops[count] for one in scores) for count in by_steps}
    return ClassScores(first.labels_N, by_steps, mean([one.by_block for one in scores]), flops)


# ---------------------------------------------------------------------------------------------------------------
# Samples


def check_samples(run: ImageRun, guidance: float = 1.0, sampler: str = "euler") -> DiffusionBlocks:
    """Check that a run can sample images in this way. Returns its network.

    Raises:
        UserError: the run classifies images, lacks a block, was trained without label dropout and ``guidance`` is not 1, or
            the sampler is unknown.
    """
    network = run.network
    if run.config.model.network != "dit" or not isinstance(network, DiffusionBlocks):
        raise UserError(f"{run.path} is a {run.config.objective.name} run, which names classes and generates no images")
    _check_whole(run, network)
    if not math.isfinite(guidance):
        raise UserError(f"the guidance must be a finite number, not {guidance}")
    if guidance != 1 and not network.label_dropout:
        raise UserError(
            f"{run.path} was trained without label dropout, which guidance needs: set the guidance to 1, or train with"
            " objective.denoise_image.label_dropout above 0"
        )
    if sampler not in SAMPLERS:
        raise UserError(f"there is no sampler {sampler!r} of images: choose from {', '.join(SAMPLERS)}")
    return network


def sampling_levels(network: DiffusionBlocks, steps: int) -> list[float]:
    """The noise levels at which images are sampled: the upper ends of intervals of equal probability.

    They do not depend on how the blocks divide the levels, so networks with other ranges are sampled at the same levels.
    """
    return Partition.cut(network.density, network.partition.n_blocks).levels(steps)


@torch.no_grad()
def sample_images(
    run: ImageRun,
    count: int,
    guidance: float = 1.0,
    steps: int = 50,
    sampler: str = "euler",
    seed: int = 0,
    batch_size: int = 100,
    progress: Progress | None = None,
) -> np.ndarray:
    """Generate images: uint8, shape (N, H, W, 3). Sample i has class i mod C.

    The noise of sample i depends on the seed and i only. So ``count`` and ``batch_size`` change no sample, except by
    rounding.

    Args:
        run: a run of `denoise_image`.
        guidance: strength of classifier-free guidance; 1 means none.
        steps: steps of the walk.
        sampler: one of `SAMPLERS`.

    Raises:
        UserError: see `check_samples`.
    """
    network = check_samples(run, guidance, sampler)
    (height, width), classes = run.images.size, len(run.images.classes)
    rng, device = Rng(seed, EVALUATION_STEP), next(network.parameters()).device
    samples = np.empty((count, height, width, 3), np.uint8)
    for start in range(0, count, batch_size):
        index_B = torch.arange(start, min(count, start + batch_size))
        eps = rng.normal(index_B, (3, height, width), "sample", device)
        label_B = (index_B % classes).to(device)
        images = network.walk(
            eps, sampler=sampler, label=label_B, guidance=guidance, levels=sampling_levels(network, steps)
        )
        samples[start : start + len(index_B)] = to_pixels(images)
        if progress is not None:
            progress(len(index_B))
    return samples


def score_samples(extractor: Extractor, real_ND: Tensor, samples_NHWC: np.ndarray) -> ImageScores:
    """Distances of samples from real images.

    Args:
        real_ND: the features of the real images, from `Extractor.features_of`.
        samples_NHWC: uint8, as from `sample_images`.

    Raises:
        UserError: see `image_metrics.compare`.
    """
    parts = [samples_NHWC[start : start + 256] for start in range(0, len(samples_NHWC), 256)]
    return compare(extractor, real_ND, torch.cat([extractor.features(from_pixels(part)) for part in parts]))


def load_pillow() -> Any:
    """The module PIL.Image. Raises `UserError` if pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"a picture needs pillow ({error}): pip install 'recurrent-db[vision]'") from None
    return Image


def draw_grid(samples_NHWC: np.ndarray, classes: int) -> bytes:
    """A picture of the first samples of each class as PNG: a row for each class, in their order.

    Small images are enlarged. Rows that would make the picture too high are left out.

    Raises:
        UserError: pillow is not installed.
    """
    pillow = load_pillow()
    _, height, width, _ = samples_NHWC.shape
    scale, gap = max(1, 64 // max(height, width)), 2
    down, across = scale * height + gap, scale * width + gap
    rows = max(1, min(classes, MOST_GRID_PIXELS // down))
    grid = np.full((rows * down + gap, GRID_COLUMNS * across + gap, 3), 255, np.uint8)
    for row in range(rows):
        for column, sample in enumerate(samples_NHWC[row::classes][:GRID_COLUMNS]):
            top, left = gap + row * down, gap + column * across
            large = sample.repeat(scale, axis=0).repeat(scale, axis=1)
            grid[top : top + scale * height, left : left + scale * width] = large
    buffer = io.BytesIO()
    pillow.fromarray(grid).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# FLOPs


def walk_flops(run: ImageRun, steps: int, sampler: str = "euler", guidance: float = 1.0) -> float:
    """Forward FLOPs of a walk for one image, or of a network without blocks.

    Each evaluation costs what the block of its noise level costs. Guidance doubles them.
    """
    model, network = run.config.model, run.network
    if isinstance(network, ViT):
        return forward_flops(model)
    partition = network.partition
    levels = sampling_levels(network, steps) if model.network == "dit" else partition.levels(steps)
    evaluated = [*levels, *(levels[1:] if EVALUATIONS[sampler] == 2 else [])]
    once = sum(forward_flops(model, model.block_layers[partition.block_of(sigma) - 1]) for sigma in evaluated)
    return once * (1 if guidance == 1 else 2)
