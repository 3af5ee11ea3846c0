"""Short runs of several processes, for tests that compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import many
import torch
from helpers import MICRO

from recurrent_db.commands.train import arguments
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.training import trainer


def words(data: Path, run: Path, *more: object) -> list[str]:
    return [*MICRO, "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def train(data: Path, run: Path, *more: object, world: int = 1, restarts: int = 0) -> Path:
    """A run of ``world`` processes; of one in this process."""
    if world > 1:
        many.run(run.parent / f"{run.name}-logs", world, many.train, words(data, run, *more), restarts=restarts)
        return run
    assert trainer.train(*arguments(words(data, run, *more))) == 0
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[float]:
    """Losses, norms and held-out scores, in order."""
    names = ("loss", "grad_norm", "eval/nll_k1", "eval/nll_k2", "loss_cross_entropy", "state_rms")
    return [row[name] for row in rows(run) for name in names if name in row]


def largest_difference(run: Path, other: Path) -> float:
    """Between two runs' losses, relative."""
    pairs = zip(rows(run), rows(other), strict=True)
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)


def everything(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    checkpoint = Checkpoint(find_checkpoint(run, fall_back=False))
    parts = {"weights": checkpoint.weights(), "average": checkpoint.weights(True), "optimizer": checkpoint.optimizer()}
    return {f"{kind}/{name}": tensor for kind, tensors in parts.items() for name, tensor in tensors.items()}


def assert_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
