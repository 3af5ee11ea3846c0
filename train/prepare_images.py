"""Decode labelled images into a data directory for training.

python train/prepare_images.py --source train.parquet --test-source test.parquet --out DIR
python train/prepare_images.py --source FOLDER-BY-CLASS --out DIR
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from recurrent_db.arguments import one_line, run_command
from recurrent_db.data.image_sources import ImageOptions
from recurrent_db.data.prepare_images import prepare_images
from recurrent_db.errors import UserError


@dataclass
class Args:
    """Decode labelled images into a data directory for training."""

    source: list[str]
    """Training images: parquet files, folders with a folder per class, or hf:NAME[:CONFIG[:SPLIT]]."""
    out: Path
    """Data directory to create."""
    test_source: tuple[str, ...] = ()
    """Images of the test split, written as in --source. By default there is no test split."""
    holdout: float = 0.05
    """Share of the training images held out for validation (0 to 1). A hash of the pixels chooses them."""
    convert: bool = False
    """Convert greyscale and palette images to RGB instead of refusing them."""
    image_key: str = "image"
    """Column of the images in parquet and hub data sets."""
    label_key: str = "label"
    """Column of the labels."""
    overwrite: bool = False
    """Replace an existing data directory once the new one is complete."""


def main(args: Args) -> None:
    for option in ("--source", "--test-source"):
        if sum(word == option or word.startswith(f"{option}=") for word in sys.argv) > 1:
            raise UserError(f"{option} is given twice: list all sources after one {option}")
    done = prepare_images(
        args.source,
        args.out,
        test_sources=args.test_source,
        holdout=args.holdout,
        options=ImageOptions(args.image_key, args.label_key, args.convert),
        overwrite=args.overwrite,
        progress=True,
    )
    if done.note:
        print(f"note: {one_line(done.note)}", file=sys.stderr)
    print(done.summary())


if __name__ == "__main__":
    run_command(Args, main)
