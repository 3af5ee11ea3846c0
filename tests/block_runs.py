"""Runs of blocks at a size of seconds, for the tests of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from helpers import BLOCKS, MICRO, ROOT
from torch import Tensor

from recurrent_db.config import load_config
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.training import trainer

# What the processes of `blocks.sh` may not do. The files that one opens are kept, to see that no other's are among them.
WATCH = """
import atexit, os, sys
opened = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        raise SystemExit(f"a block spoke to somebody: {event}")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))
sys.addaudithook(watch)
def report():
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        opened.append("PROCESS GROUP")
    with open(os.path.join(os.environ["OPENED"], str(os.getpid())), "w") as file:
        file.write("\\n".join(opened))
atexit.register(report)
"""


def launch_watched(python: str, root: Path, n: int, given: list[str]) -> list[str]:
    """Run `blocks.sh` with these options into ``root``/runs; the files that each of its trainers opened, one text each."""
    for folder in ("site", "opened"):
        (root / folder).mkdir(parents=True)
    (root / "site" / "sitecustomize.py").write_text(WATCH)
    (root / "c.toml").write_text("")
    path = os.pathsep.join([str(root / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHON": python, "PYTHONPATH": path, "OPENED": str(root / "opened")}
    words = [ROOT / "train/launch/blocks.sh", root / "c.toml", root / "runs"]
    result = subprocess.run([*map(str, words), *given], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    logs = [path.read_text() for path in (root / "opened").iterdir()]
    trainers = [log for log in logs if "train/pretrain.py" in log]
    assert len(trainers) == n
    assert not any("PROCESS GROUP" in log for log in trainers)
    return trainers


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
