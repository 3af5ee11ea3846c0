"""The format of a data directory of images, and how it is written and read.

A data directory of images holds

- ``manifest.json``: format version, size of the images, class names, and the shards of each split with their counts and
  SHA-256 checksums;
- ``SPLIT-NNNNN.pixels.bin``: decoded images, raw uint8 of shape (N, H, W, 3), in red, green, blue;
- ``SPLIT-NNNNN.labels.bin``: their classes, raw little-endian int32 of shape (N,).

The splits are "train", "validation" and "test". `directory` says how a directory is built and checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_db.data.directory import (
    MANIFEST,
    NewDirectory,
    check_digest,
    check_size,
    is_count,
    path_inside,
    read_format,
)
from recurrent_db.data.shards import FileArray
from recurrent_db.errors import UserError
from recurrent_db.files import is_altered

FORMAT = "recurrent_db.images"
FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
SHARD_IMAGES = 1 << 14
"""Most images per shard."""
MOST_PIXELS = 1 << 22
"""Most pixels of an image, such as 2048 x 2048."""
MOST_CLASSES = 1 << 16

_LABEL = np.dtype("<i4")


# ---------------------------------------------------------------------------------------------------------------
# Writing


@dataclass
class _Split:
    """The shards of one split. The last one may be open."""

    folder: Path
    name: str
    shard_images: int

    def __post_init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.labels: list[int] = []
        self.images = 0

    def add(self, pixels: bytes, label: int) -> None:
        if not self.labels:
            self.stem = f"{self.name}-{len(self.shards):05d}"
            self.file = (self.folder / f"{self.stem}.pixels.bin").open("wb")
            self.digest = hashlib.sha256()
        self.file.write(pixels)
        self.digest.update(pixels)
        self.labels.append(label)
        self.images += 1
        if len(self.labels) == self.shard_images:
            self.close_shard()

    def close_shard(self) -> None:
        if not self.labels:
            return
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        raw = np.array(self.labels, _LABEL).tobytes()
        (self.folder / f"{self.stem}.labels.bin").write_bytes(raw)
        self.shards.append(
            {
                "images": len(self.labels),
                "file": f"{self.stem}.pixels.bin",
                "sha256": self.digest.hexdigest(),
                "labels_file": f"{self.stem}.labels.bin",
                "labels_sha256": hashlib.sha256(raw).hexdigest(),
            }
        )
        self.labels = []


class ImageWriter:
    """Builds a data directory of images as a context manager, as `directory.NewDirectory` says.

    Args:
        out, overwrite: as in `directory.NewDirectory`.
        shard_images: most images per shard.
    """

    def __init__(self, out: str | os.PathLike[str], shard_images: int = SHARD_IMAGES, overwrite: bool = False) -> None:
        self._directory = NewDirectory(out, overwrite)
        self._splits = {split: _Split(self._directory.folder, split, shard_images) for split in SPLITS}

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        for split in self._splits.values():
            if split.labels:
                with contextlib.suppress(OSError):  # on a full disk the flush fails again
                    split.file.close()
        self._directory.__exit__(*failure)

    def add(self, split: str, pixels: bytes, label: int) -> None:
        """Append one image, (H, W, 3) uint8 as bytes, to "train", "validation" or "test"."""
        self._splits[split].add(pixels, label)

    @property
    def images(self) -> dict[str, int]:
        """Number of images of each split."""
        return {name: split.images for name, split in self._splits.items()}

    def commit(self, size: Sequence[int], classes: Sequence[str], reading: Mapping[str, Any]) -> dict[str, Any]:
        """Finish the shards, write the manifest, rename the directory to ``out``, and return the manifest.

        Args:
            size: height and width of every image, in pixels.
            classes: the names of the classes, in the order of the labels.
            reading: options and counts of reading, recorded in the manifest. No program reads them.

        Raises:
            UserError: ``out`` was created in the meantime.
        """
        for split in self._splits.values():
            split.close_shard()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "size": list(size),
            "classes": list(classes),
            "splits": {name: split.shards for name, split in self._splits.items() if split.shards},
            "reading": dict(reading),
        }
        self._directory.commit(manifest)
        return manifest


# ---------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class ImageData:
    """One split of a data directory of images. The pixels need not fit in memory."""

    arrays: Sequence[np.ndarray | FileArray]
    """Pixels of each shard, uint8, 1-dimensional."""
    labels: np.ndarray
    """Class of each image, int64, shape (N,)."""
    size: tuple[int, int]
    """Height and width of every image, in pixels."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    hash: str = ""
    """SHA-256 of the sizes, the class names and the checksums of all shards: it names the data."""
    directory: Path | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        self.image_bytes = 3 * self.size[0] * self.size[1]
        self.starts = np.cumsum([0, *(len(array) // self.image_bytes for array in self.arrays)])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def where(self) -> str:
        """The name of this data in error messages."""
        return f"{self.directory or 'data'} ({self.split})"

    @classmethod
    def from_arrays(cls, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> ImageData:
        """Data in memory, for tests and experiments.

        Args:
            images: uint8, shape (N, H, W, 3).
            labels: integers, shape (N,).
        """
        _, height, width, _ = images.shape
        return cls([images.reshape(-1)], labels.astype(np.int64), (height, width), tuple(classes))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images ``indices`` (n,) of the split: uint8, shape (n, H, W, 3).

        Raises:
            IndexError: an index is outside the split.
            UserError: a shard was truncated after it was opened, or cannot be read.
        """
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"an image is outside {self.where}, which has {len(self)}")
        images = np.empty((len(indices), self.image_bytes), np.uint8)
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        for image, shard, index in zip(images, shards.tolist(), indices.tolist(), strict=True):
            begin = (index - int(self.starts[shard])) * self.image_bytes
            image[:] = self.arrays[shard][begin : begin + self.image_bytes]
        return images.reshape(-1, *self.size, 3)


def read_image_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the manifest of a data directory of images.

    Raises:
        UserError: the manifest is missing, unreadable, or not of this format and version.
    """
    manifest = read_format(directory, FORMAT, FORMAT_VERSION, "images", "train/prepare_images.py")
    if problem := _problem(manifest):
        raise UserError(f"{Path(directory) / MANIFEST}: damaged: {problem}")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the keys and types of a manifest; None if they are right."""
    size, splits = manifest.get("size"), manifest.get("splits")
    if not isinstance(size, list) or len(size) != 2 or not all(is_count(side) and side for side in size):
        return "the size is not a height and a width"
    if size[0] * size[1] > MOST_PIXELS:
        return f"images of {size[0]} x {size[1]} pixels, but at most {MOST_PIXELS} are possible"
    if problem := problem_of_classes(manifest.get("classes")):
        return problem
    if not isinstance(splits, dict) or not all(isinstance(shards, list) for shards in splits.values()):
        return "no splits"
    for split, shards in splits.items():
        for shard in shards:
            texts = ("file", "sha256", "labels_file", "labels_sha256")
            if not isinstance(shard, dict) or not all(isinstance(shard.get(key), str) for key in texts):
                return f"a shard of {split[:200]!r} lacks its files and checksums"
            if not is_count(shard.get("images")):
                return f"a shard of {split[:200]!r} lacks its number of images"
    return None


def problem_of_classes(names: Any) -> str | None:
    """What is wrong with a list of class names; None if nothing is."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        return "the class names are not a list of texts"
    if len(names) > MOST_CLASSES:
        return f"{len(names)} classes, but at most {MOST_CLASSES} are possible"
    if unprintable := [name for name in names if not name.isprintable()]:
        return f"class name {unprintable[0][:200]!a} has unprintable characters"
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        return f"two classes are named {repeated[0][:200]!r}"
    return None


def open_images(directory: str | os.PathLike[str], split: str, verify: bool = False) -> ImageData:
    """Open one split of a data directory of images. Pixels are read from disk as they are needed.

    Args:
        split: "train", "validation" or "test".
        verify: check the SHA-256 of the pixels too. Sizes and labels are always checked.

    Raises:
        UserError: the manifest or a file is missing or damaged, a file name points outside the directory, or there is no
            such split.
    """
    directory = Path(directory)
    manifest = read_image_manifest(directory)
    shards = [shard for shard in manifest["splits"].get(split, []) if shard["images"]]
    if not shards:
        there = [name for name, entries in manifest["splits"].items() if entries]
        raise UserError(f"{directory}: no {split!r} split (it has: {', '.join(there) or 'none'})")
    height, width = manifest["size"]
    arrays, labels = [], []
    for shard in shards:
        path, labels_path = path_inside(directory, shard["file"]), path_inside(directory, shard["labels_file"])
        try:
            count = shard["images"] * height * width * 3
            check_size(path, count)
            check_size(labels_path, shard["images"] * _LABEL.itemsize)
            check_digest(labels_path, shard["labels_sha256"])
            if verify:
                check_digest(path, shard["sha256"])
            labels.append(np.fromfile(labels_path, _LABEL, shard["images"]).astype(np.int64))
            arrays.append(FileArray(path, np.dtype(np.uint8), count))
        except OSError as error:
            raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
        if labels[-1].min() < 0 or labels[-1].max() >= len(manifest["classes"]):
            raise UserError(f"{labels_path}: damaged: a label is outside the {len(manifest['classes'])} classes")
    if verify and is_altered(directory / MANIFEST):
        raise UserError(f"{directory / MANIFEST}: damaged: its checksum is wrong; prepare the data again")
    named = json.dumps([manifest["size"], manifest["classes"], manifest["splits"]]).encode()
    return ImageData(
        arrays, np.concatenate(labels), (height, width), tuple(manifest["classes"]),
        hashlib.sha256(named).hexdigest(), directory, split,
    )  # fmt: skip
