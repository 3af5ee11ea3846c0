"""Decodes labelled images into a data directory of image shards."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from recurrent_db.data.corpus import hash_share
from recurrent_db.data.image_shards import SHARD_IMAGES, ImageWriter
from recurrent_db.data.image_sources import ImageOptions, RawImage, decode, read_images
from recurrent_db.data.readers import ReadReport
from recurrent_db.errors import UserError
from recurrent_db.files import expand_user


@dataclass
class PreparedImages:
    """Result of `prepare_images`."""

    out: str
    images: dict[str, int]
    """Number of images of each split."""
    size: tuple[int, int]
    """Height and width, in pixels."""
    classes: tuple[str, ...]
    seconds: float
    note: str | None
    """One line about files that were left out, classes without images, and test images that are training images too; None
    if there is nothing to say."""
    manifest: dict[str, Any]

    def summary(self) -> str:
        """One line with the counts."""
        counts = ", ".join(f"{count:,} {split}" for split, count in self.images.items())
        return (
            f"{self.out}: {sum(self.images.values()):,} images ({counts}) of {self.size[0]} x {self.size[1]} pixels, "
            f"{len(self.classes)} classes, {self.seconds:.1f} s"
        )


@dataclass
class _Common:
    """What all images have in common: their size, and the names of their classes."""

    first: str = ""
    size: tuple[int, int] = (0, 0)
    names: tuple[str, ...] | None = None
    labels: set[int] = field(default_factory=set)
    """Labels of the training images."""
    digests: set[bytes] = field(default_factory=set)
    """SHA-256 of the training images."""
    repeated: int = 0
    """Number of test images that are training images too."""
    classes: tuple[str, ...] = field(init=False)

    def check_image(self, image: RawImage, pixels: np.ndarray) -> None:
        height, width, _ = pixels.shape
        if not self.first:
            self.first, self.size, self.names = image.where, (height, width), image.classes
        if (height, width) != self.size:
            expected = f"{self.size[0]} x {self.size[1]}"
            raise UserError(
                f"{image.where}: {height} x {width} pixels (height x width), but the first image has {expected} "
                f"({self.first}): resize the images first"
            )
        if image.classes != self.names:
            raise UserError(f"{image.where}: {_difference(self.names, image.classes)} ({self.first})")

    def fix_classes(self) -> None:
        """Name the classes by their numbers if no source names them."""
        self.classes = self.names or tuple(map(str, range(max(self.labels, default=-1) + 1)))

    def note(self) -> str | None:
        """One line about classes without training images and repeated test images; None if there are none."""
        parts = []
        if empty := len(self.classes) - len(self.labels):
            parts.append(f"{empty} of {len(self.classes)} classes have no training image")
        if self.repeated:
            parts.append(
                f"{self.repeated} test image(s) are among the training sources too, so scores on them are too good"
            )
        return "; ".join(parts) or None


def _difference(first: tuple[str, ...] | None, other: tuple[str, ...] | None) -> str:
    if first is None or other is None:
        return f"this source {'has no' if other is None else 'has'} class names, unlike the first"
    if len(first) != len(other):
        return f"this source has {len(other)} classes, but the first has {len(first)}"
    number = next(number for number, pair in enumerate(zip(first, other, strict=True)) if pair[0] != pair[1])
    return f"class {number} is {other[number][:200]!r}, but in the first source {first[number][:200]!r}"


def prepare_images(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    test_sources: Sequence[str] = (),
    holdout: float = 0.05,
    options: ImageOptions | None = None,
    shard_images: int = SHARD_IMAGES,
    overwrite: bool = False,
    progress: bool = False,
) -> PreparedImages:
    """Decode ``sources`` into the data directory ``out``.

    Args:
        sources: training images: parquet files, folders with a folder per class, or ``hf:NAME[:CONFIG[:SPLIT]]``. All
            must have the same classes and sizes.
        test_sources: images of the split "test", written as ``sources``.
        holdout: share of ``sources`` (0 to 1) that becomes the split "validation". A hash of the pixels chooses, so that
            copies of an image stay together.
        options: how images are found in tables, and which are accepted; None uses the defaults.
        shard_images: most images per shard.
        overwrite: replace an existing data directory once the new one is complete.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: an argument is wrong, an input cannot be read, there is no image, or ``out`` cannot be written. ``out``
            is then unchanged.
    """
    if not sources or not all((*sources, *test_sources)):
        raise UserError("no source is given, or one is empty")
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be at least 0 and below 1, not {holdout}")
    if shard_images < 1:
        raise UserError("the number of images per shard must be at least 1")
    started = time.perf_counter()
    options, report, common = options or ImageOptions(), ReadReport(), _Common()
    with (
        ImageWriter(out, shard_images, overwrite) as writer,
        tqdm(desc="decoding", unit=" images", disable=None if progress else True) as bar,
    ):
        for image, pixels in _decoded(sources, options, report, common):
            raw = pixels.tobytes()
            digest = hashlib.sha256(raw)
            held = holdout > 0 and hash_share(digest.hexdigest()) < holdout
            writer.add("validation" if held else "train", raw, image.label)
            common.labels.add(image.label)
            common.digests.add(digest.digest())
            bar.update()
        common.fix_classes()
        for image, pixels in _decoded(test_sources, options, report, common):
            if image.label >= len(common.classes):
                raise UserError(f"{image.where}: label {image.label}, but training has {len(common.classes)} classes")
            raw = pixels.tobytes()
            writer.add("test", raw, image.label)
            common.repeated += hashlib.sha256(raw).digest() in common.digests
            bar.update()
        images = {split: count for split, count in writer.images.items() if count}
        if missing := [split for split in ("train", *["validation"] * (holdout > 0)) if split not in images]:
            raise UserError(f"no image of {', '.join(sources)} is left for {missing[0]} at --holdout {holdout}")
        settings = {"sources": list(sources), "test_sources": list(test_sources), "holdout": holdout}
        manifest = writer.commit(common.size, common.classes, {**settings, "skipped_files": dict(report.skipped)})
    seconds = time.perf_counter() - started
    note = "; ".join(filter(None, (report.note(), common.note()))) or None
    return PreparedImages(str(out), images, common.size, common.classes, seconds, note, manifest)


def _decoded(
    sources: Sequence[str], options: ImageOptions, report: ReadReport, common: _Common
) -> Iterator[tuple[RawImage, np.ndarray]]:
    """The images of several sources with their pixels, checked against each other. Each source must have an image."""
    for source in sources:
        empty = True
        for image in read_images(expand_user(source), options, report):
            empty = False
            pixels = decode(image, options.convert)
            common.check_image(image, pixels)
            yield image, pixels
        if empty:
            raise UserError(f"{source}: no image in it")
