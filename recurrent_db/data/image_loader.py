"""Batches of images. This file defines which image is sample p of a run, and how it is augmented.

Shapes: B images, C = 3 channels (red, green, blue), H and W pixels.

Sample p is a pure function of (seed, p):

    p -> epoch      p // N, where N is the number of images
      -> image      a keyed permutation of range(N) at p % N, with a new key every epoch
      -> flip, crop random numbers keyed by (seed, p)

As for text (`loader`), there is no state to save. A resumed run and a run on another number of processes see the same
batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from recurrent_db.data.image_shards import ImageData
from recurrent_db.data.loader import StepLoader, epoch_key, permute
from recurrent_db.errors import UserError
from recurrent_db.rng import Rng


@dataclass
class ImageBatch:
    """B images with their classes."""

    images_BCHW: torch.Tensor
    """float32 in [-1, 1]."""
    labels_B: torch.Tensor
    """int64: class of each image."""
    sample_index_B: torch.Tensor
    """int64: each image's position p in the run, which keys its random numbers. Stays on the CPU."""

    def __len__(self) -> int:
        return len(self.images_BCHW)

    def to(self, device: torch.device | str) -> ImageBatch:
        """The batch with images and labels on ``device``. ``sample_index_B`` stays on the CPU."""
        images, labels = (part.to(device, non_blocking=True) for part in (self.images_BCHW, self.labels_B))
        return ImageBatch(images, labels, self.sample_index_B)

    def pin(self) -> ImageBatch:
        """The batch with images and labels in pinned memory, from which `to` copies to a GPU without waiting."""
        return ImageBatch(self.images_BCHW.pin_memory(), self.labels_B.pin_memory(), self.sample_index_B)

    def slice(self, start: int, stop: int) -> ImageBatch:
        """Images ``start`` to ``stop`` (exclusive) of the batch, as views."""
        return ImageBatch(*(getattr(self, part.name)[start:stop] for part in fields(self)))


def from_pixels(pixels_BHWC: np.ndarray) -> torch.Tensor:
    """Map uint8 pixels (B, H, W, 3) to float32 in [-1, 1], shape (B, 3, H, W)."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_pixels(images_BCHW: torch.Tensor) -> np.ndarray:
    """The inverse of `from_pixels`: uint8 (B, H, W, 3). Values outside [-1, 1] are clamped, and all are rounded."""
    scaled = images_BCHW.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ImageLoader(StepLoader[ImageBatch]):
    """Batches of images of a run, addressed by optimizer step. It has no state to save.

    Args:
        data: the training split.
        batch_size: images per optimizer step, over all processes.
        seed: seed of the data order, the flips and the crops.
        flip: mirror each image from left to right with probability 1/2.
        crop_padding: pad each image with this many black pixels on every side, then cut a random part of the original
            size. 0 does not crop.

    Raises:
        UserError: ``batch_size`` is below 1, ``crop_padding`` is negative or longer than a side, or there is no image.
    """

    def __init__(
        self, data: ImageData, batch_size: int, seed: int = 0, flip: bool = False, crop_padding: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        if batch_size < 1:
            raise UserError("the batch size must be at least 1")
        if not 0 <= crop_padding <= min(data.size):
            raise UserError(f"crop_padding must be 0 to {min(data.size)}, the images' size, not {crop_padding}")
        if not len(data):
            raise UserError(f"{data.where} has no images")
        self.data, self.flip, self.crop_padding = data, flip, crop_padding

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions p (n,) in the run: the epoch, and the image in the split. Two int64 arrays of shape (n,)."""
        epoch, image = np.divmod(np.asarray(positions, dtype=np.int64), len(self.data))
        for e in np.unique(epoch):
            which = epoch == e
            image[which] = permute(image[which], len(self.data), epoch_key(self.seed, "images", int(e)))
        return epoch, image

    def gather(self, positions: np.ndarray) -> ImageBatch:
        """The images at ``positions`` (n,) of the run."""
        _, image = self.locate(positions)
        pixels = self._augment(self.data.read(image), positions)
        return ImageBatch(
            from_pixels(pixels),
            torch.from_numpy(self.data.labels[image]),
            torch.from_numpy(positions.astype(np.int64)),
        )

    def _augment(self, pixels_BHWC: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if not self.flip and not self.crop_padding:
            return pixels_BHWC
        # A position belongs to one step, so it alone is the key.
        rng, samples = Rng(self.seed, 0), positions.tolist()
        height, width = self.data.size
        rows_BH = np.tile(np.arange(height), (len(samples), 1))
        columns_BW = np.tile(np.arange(width), (len(samples), 1))
        if self.flip:
            flipped = rng.uniform(samples, (), "flip").numpy() < 0.5
            columns_BW[flipped] = columns_BW[flipped, ::-1]
        if p := self.crop_padding:
            shift = np.floor(rng.uniform(samples, (2,), "crop").numpy() * (2 * p + 1)).astype(np.int64)
            rows_BH += shift[:, :1]
            columns_BW += shift[:, 1:]
            pixels_BHWC = np.pad(pixels_BHWC, ((0, 0), (p, p), (p, p), (0, 0)))
        return pixels_BHWC[np.arange(len(samples))[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]

    def epochs(self, step: int) -> float:
        """Epochs after ``step`` optimizer steps: images drawn divided by the images of the split."""
        return step * self.batch_size / len(self.data)


def image_batches(
    data: ImageData, batch_size: int, max_images: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[ImageBatch]:
    """Batches of held-out images as they are, in the order of the split. The last batch may be smaller.

    Args:
        max_images: images to use at most. They are spread evenly over the split. None uses the whole split.
        rank, world: process ``rank`` gets every ``world``-th image, from image ``rank`` on. Processes may differ by one.

    ``sample_index_B`` is an image's number in the split, whatever ``max_images`` and ``world`` are.
    """
    count = len(data) if max_images is None else min(len(data), max(1, max_images))
    chosen = (np.arange(count, dtype=np.int64) * len(data) // count)[rank::world]
    for begin in range(0, len(chosen), batch_size):
        index = chosen[begin : begin + batch_size]
        yield ImageBatch(
            from_pixels(data.read(index)), torch.from_numpy(data.labels[index]), torch.from_numpy(index.copy())
        )
