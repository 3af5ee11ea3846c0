"""Score runs that classify images, for benchmarks/paper/vision.py: the mean of their probabilities on the test split.

python benchmarks/paper/vision_score.py RUN [RUN...] --data DIR --json OUT

Beside accuracy and likelihood it writes for each image whether it was classified rightly, as bits in hexadecimal.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from recurrent_db.arguments import run_command
from recurrent_db.data import open_images
from recurrent_db.evaluation.images import average, classify_images
from recurrent_db.files import write_atomic
from recurrent_db.store.loading import load_image_run


@dataclass
class Args:
    """Score runs that classify images on the test split."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories. The probabilities of several runs are averaged."""
    data: Path
    """Folder made by train/prepare_images.py."""
    json: Path
    """Output file."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""


def main(args: Args) -> int:
    runs, test = [load_image_run(path, args.device) for path in args.runs], open_images(args.data, "test")
    scores = average(*(classify_images(run, test) for run in runs))
    read = {str(steps): log_probs for steps, log_probs in scores.by_steps.items()}
    read |= {f"block {block}": log_probs for block, log_probs in scores.by_block.items()}
    summaries = {column: scores.summary(log_probs) for column, log_probs in read.items()}
    right = {column: (log_probs.argmax(-1) == scores.labels_N).numpy() for column, log_probs in read.items()}
    result = {
        "images": len(test),
        "blocks": runs[0].config.model.n_blocks,
        "accuracy": {column: summary.accuracy for column, summary in summaries.items()},
        "nll": {column: summary.nll for column, summary in summaries.items()},
        "nll_stderr": {column: summary.nll_stderr for column, summary in summaries.items()},
        "flops_per_image": {str(steps): flops for steps, flops in scores.flops.items()},
        "correct": {column: np.packbits(bits).tobytes().hex() for column, bits in right.items()},
    }
    write_atomic(args.json, json.dumps(result))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
