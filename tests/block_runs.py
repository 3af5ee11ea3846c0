"""Runs of blocks at a size of seconds, for the tests of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import BLOCKS, MICRO
from torch import Tensor

from recurrent_db.config import load_config
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.training import trainer


def options(data: Path, n: int, *more: object) -> list[str]:
    return [
        *MICRO, *BLOCKS, "--model.n_blocks", str(n), "--data.path", str(data), "--budget.steps", "6", "--eval.points", "1",
        *map(str, more),
    ]  # fmt: skip


def train(data: Path, run: Path, n: int, *more: object, resume: str = "") -> int:
    config = load_config(None, [*options(data, n, *more), "--run.dir", str(run)])
    return trainer.train(config, resume)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    return Checkpoint(find_checkpoint(run)).weights()


def train_frozen(data: Path, root: Path) -> list[Path]:
    """Two blocks over a frozen embedding, one after another in this process."""
    runs = [root / "one", root / "two"]
    for number, run in enumerate(runs, 1):
        assert train(data, run, 2, "--blocks.only", number, "--blocks.shared", "frozen") == 0
    return runs
