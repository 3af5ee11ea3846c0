"""Check the metric of generated images: its floor, and whether known defects of real images raise it.

python benchmarks/paper/image_metric.py --data DIR --extractor FILE [--samples 5000]

The extractor is trained on DIR's training images if FILE does not exist. All distances are between the whole test split and
training images: unchanged (the floor), blurred, noisy, or without one class. Each must be above the floor, and blur and
noise must raise the distance with their strength. The class is the one whose absence raises the distance least. Writes
RESULTS/image-metric.json and RESULTS/image-metric.md; the exit status is 1 if a distance fails to rise.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.slices import ROOT
from recurrent_db.arguments import run_command
from recurrent_db.data import ImageData, image_batches, open_images
from recurrent_db.errors import UserError
from recurrent_db.evaluation.image_metrics import (
    LEAST_SAMPLES,
    Extractor,
    ImageScores,
    compare,
    floor,
    frechet_distance,
    load_extractor,
    save_extractor,
    train_extractor,
)
from recurrent_db.files import check_output, write_atomic
from recurrent_db.rng import key
from recurrent_db.schema import PositiveInt

BLUR = (0.5, 1.0, 2.0)
"""Standard deviations of the Gaussian blur, in pixels."""
NOISE = (0.05, 0.1, 0.2)
"""Standard deviations of the additive noise. Pixel values are in [-1, 1]."""


@dataclass
class Args:
    """Check the metric of generated images on real images with known defects."""

    data: Path
    """Folder made by train/prepare_images.py, with the splits train and test."""
    extractor: Path
    """File of the extractor. It is trained and saved there if it does not exist."""
    samples: PositiveInt = 5000
    """Number of training images."""
    threads: PositiveInt = 1
    """CPU threads."""
    results: Path = ROOT / "benchmarks/results"
    """Folder for the results."""


def blur(images_BCHW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with reflected borders, cut off at 3 sigma."""
    radius = min(int(np.ceil(3 * sigma)), min(images_BCHW.shape[2:]) - 1)
    weights = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    row = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images_BCHW, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, row, groups=3), row.transpose(2, 3), groups=3)


def add_noise(images_BCHW: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(key("metric noise"))
    return (images_BCHW + sigma * torch.randn(images_BCHW.shape, generator=generator)).clamp(-1, 1)


def without_class(extractor: Extractor, train: ImageData, test_ND: Tensor, samples: int) -> tuple[str, Tensor]:
    """The class whose absence raises the distance least, and features of ``samples`` images of the other classes."""
    train_ND = extractor.features_of(train)
    found: list[tuple[float, str, Tensor]] = []
    for label, name in enumerate(train.classes):
        others = np.flatnonzero(train.labels != label)
        if len(others) < samples:
            raise UserError(
                f"{train.where} has only {len(others)} images that are not {name}: lower --samples {samples}"
            )
        chosen_ND = train_ND[torch.from_numpy(others[np.arange(samples) * len(others) // samples])]
        found.append((frechet_distance(test_ND, chosen_ND), name, chosen_ND))
    _, name, chosen_ND = min(found, key=lambda entry: entry[0])
    return name, chosen_ND


def measure(extractor: Extractor, train: ImageData, test: ImageData, samples: int) -> dict[str, ImageScores]:
    """Scores by the name of the defect, the floor first."""
    test_ND = extractor.features_of(test)
    scores = {"none (floor)": floor(extractor, train, test_ND, samples)}
    images = torch.cat([batch.images_BCHW for batch in image_batches(train, 256, samples)])
    for kind, change, strengths in (("blur", blur, BLUR), ("noise", add_noise, NOISE)):
        for sigma in strengths:
            scores[f"{kind} {sigma:g}"] = compare(extractor, test_ND, change(images, sigma))
    name, chosen_ND = without_class(extractor, train, test_ND, samples)
    scores[f"without {name}"] = compare(extractor, test_ND, chosen_ND)
    return scores


def misses(scores: dict[str, ImageScores]) -> list[str]:
    """Each distance that does not rise as it should, in words."""
    names = list(scores)
    rising = ([names[0], *(n for n in names if n.startswith(kind))] for kind in ("blur ", "noise ", "without "))
    return [
        f"{measure} of {high!r} ({getattr(scores[high], measure):.4g}) is not above {low!r}"
        f" ({getattr(scores[low], measure):.4g})"
        for chain in rising
        for low, high in itertools.pairwise(chain)
        for measure in ("frechet", "kid")
        if not getattr(scores[high], measure) > getattr(scores[low], measure)
    ]


def table(extractor: Extractor, scores: dict[str, ImageScores]) -> str:
    """The scores as a Markdown table under a line about the extractor."""
    first = next(iter(scores.values()))
    accuracy = extractor.record.get("accuracy", math.nan)
    lines = [
        f"Fréchet distance and KID in the features of our own extractor {first.extractor[:12]}"
        f" (test accuracy {accuracy:.4f}): {first.samples:,} training images with a defect, against"
        f" {first.real:,} test images.\n",
        "| defect | Fréchet distance | KID | KID, std |\n| --- | --- | --- | --- |",
        *(f"| {name} | {s.frechet:.4f} | {s.kid:.5f} | {s.kid_std:.5f} |" for name, s in scores.items()),
    ]
    return "\n".join(lines)


def prepare_extractor(path: Path, train: ImageData, test: ImageData) -> Extractor:
    """Load the extractor, or train it and save it."""
    if path.exists():
        extractor = load_extractor(path)
        if extractor.record.get("data") != train.hash:
            raise UserError(f"{path} was trained on other data than {train.directory}: choose another --extractor")
        return extractor
    check_output(path)
    started = time.monotonic()
    extractor = train_extractor(train, progress=lambda line: print(line, file=sys.stderr))
    extractor.record |= {"seconds": round(time.monotonic() - started), "accuracy": extractor.accuracy(test)}
    save_extractor(extractor, path)
    return extractor


def main(args: Args) -> int:
    torch.set_num_threads(args.threads)
    train, test = (open_images(args.data, split, verify=True) for split in ("train", "test"))
    check_output(args.results / "image-metric.json")
    if not LEAST_SAMPLES <= args.samples <= len(train):
        raise UserError(
            f"--samples must be from {LEAST_SAMPLES} to the {len(train)} images of {train.where}, got {args.samples}"
        )
    extractor = prepare_extractor(args.extractor, train, test)
    scores = measure(extractor, train, test, args.samples)
    text, failed = table(extractor, scores), misses(scores)
    result: dict[str, Any] = {
        "extractor": {"hash": extractor.hash, "classes": extractor.classes, **extractor.record},
        "scores": {name: asdict(score) for name, score in scores.items()}, "misses": failed,
    }  # fmt: skip
    write_atomic(args.results / "image-metric.json", json.dumps(result, indent=1))
    write_atomic(args.results / "image-metric.md", text + "\n")
    print(text)
    for line in failed:
        print(f"missed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(Args, main)
