"""Networks and short runs on images, for the tests of them. The images are scikit-learn's digits, 8 x 8 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import many
import numpy as np
import pytest
import torch
from dist_runs import assert_equal, everything

from recurrent_db.config import Config, load_config
from recurrent_db.data import ImageBatch
from recurrent_db.data.image_shards import ImageWriter
from recurrent_db.training import trainer

OBJECTIVES = ("classify", "denoise_class", "denoise_image")
SHAPE = [
    "--model.d_model", "32", "--model.n_heads", "2", "--model.d_mlp", "64", "--model.patch_size", "2",
    "--model.d_condition", "16", "--model.n_prelude", "0", "--model.n_core", "3", "--model.n_coda", "0",
]  # fmt: skip
RUN = [
    "--blocks.shared", "all", "--blocks.gamma", "0.05", "--data.batch_size", "8", "--eval.tokens", "2176",
    "--eval.points", "2", "--run.device", "cpu", "--run.threads", "1",
]  # fmt: skip
NAMES = [f"digit {number}" for number in range(10)]


def kind(objective: str, n: int = 3) -> list[str]:
    """The options of an objective; of one in blocks, ``n`` of them."""
    return ["--objective.name", objective, *SHAPE, "--model.n_blocks", str(0 if objective == "classify" else n)]


def image_config(
    objective: str, *more: object, n: int = 3, size: tuple[int, int] = (8, 8), classes: int = 10
) -> Config:
    """A configuration as the trainer completes it from its data."""
    config = load_config(None, [*kind(objective, n), *map(str, more)])
    config.model.image_size, config.model.n_classes = list(size), classes
    return config


def image_batch(n: int = 4, size: tuple[int, int] = (8, 8), classes: int = 10, start: int = 0) -> ImageBatch:
    """Random images at the run's positions from ``start`` on."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(n, 3, *size, generator=generator) * 2 - 1
    return ImageBatch(images, torch.randint(classes, (n,), generator=generator), torch.arange(start, start + n))


def write_images(
    folder: Path, pixels: np.ndarray, labels: np.ndarray, names: list[str], held: str = "validation"
) -> Path:
    """A data directory of images (N, H, W, 3) uint8. Every sixth image is held out."""
    with ImageWriter(folder) as writer:
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            writer.add("train" if number % 6 else held, image.tobytes(), label)
        writer.commit(pixels.shape[1:3], names, {})
    return folder


def digits(folder: Path, names: list[str] = NAMES, count: int = 1797, zoom: int = 1) -> Path:
    """A data directory of digits, ``zoom`` times as large."""
    found = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    grey = (found.images[:count] * 15).astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)
    return write_images(folder, grey[..., None].repeat(3, axis=3), found.target[:count], names)


def words(data: Path, run: Path, objective: str, *more: object, n: int = 3) -> list[str]:
    return [*kind(objective, n), *RUN, "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def train(data: Path, run: Path, objective: str, *more: object, n: int = 3, resume: str = "", world: int = 1) -> Path:
    """A run of ``world`` processes; of one in this process."""
    if world > 1:
        many.run(run.parent / f"{run.name}-logs", world, many.train, words(data, run, objective, *more, n=n))
    else:
        assert trainer.train(load_config(None, words(data, run, objective, *more, n=n)), resume) == 0
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TIMES = ("seconds", "tokens_per_s", "mfu", "hfu", "peak_flops", "peak_memory_bytes", "optimizer_share")


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, averages, optimizer state and metrics of two runs are equal bit for bit, but for times."""
    assert_equal(everything(run), everything(other))
    ours, theirs = (
        [
            {k: v for k, v in row.items() if k not in TIMES and not k.startswith("memory/activations")}
            for row in rows(one)
        ]
        for one in (run, other)
    )
    assert ours == theirs
