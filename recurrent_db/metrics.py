"""Where a run's numbers go: ``metrics.jsonl`` always, Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from recurrent_db.config import Config, to_dict
from recurrent_db.files import write_atomic


def plain(value: Any) -> Any:
    """A JSON value: tensors become numbers, pairs (sum, weight) their quotient, non-finite numbers null."""
    if isinstance(value, Tensor):
        numbers = value.tolist()
        value = numbers if isinstance(numbers, float | int) else (numbers[0] / numbers[1] if numbers[1] else None)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the rows after ``last_step``, and a last line that was cut short."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                rows.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    write_atomic(path, "".join(rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that is still being written is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricLog:
    """One row for each optimizer step. Rows may hold device tensors; they are read when flushed, not before."""

    def __init__(self, run_dir: Path, config: Config, start_step: int) -> None:
        truncate_metrics(run_dir / "metrics.jsonl", start_step)
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.rows: list[dict[str, Any]] = []
        self.wandb = self._start_wandb(run_dir, config) if config.run.wandb != "off" else None

    def _start_wandb(self, run_dir: Path, config: Config) -> Any:
        """A wandb run, or None with a warning: logging must never stop training."""
        try:
            import wandb

            return wandb.init(
                project=config.run.wandb_project,
                mode="online" if config.run.wandb == "online" else "offline",
                dir=str(run_dir),
                name=run_dir.resolve().name,
                id=self._wandb_id(run_dir),
                resume="allow",
                config=to_dict(config),
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            print(f"warning: no wandb ({reason}); metrics.jsonl has everything", file=sys.stderr)
            return None

    @staticmethod
    def _wandb_id(run_dir: Path) -> str:
        """The run's identity there: made once and kept with the run, so that a resumed run goes on under it."""
        path = run_dir / "wandb_id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(8))
        return path.read_text()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def flush(self) -> dict[str, Any] | None:
        """Write the rows collected so far to disk. Returns the last one."""
        last = None
        for row in self.rows:
            last = {name: plain(value) for name, value in row.items()}
            self.file.write(json.dumps(last) + "\n")
            if self.wandb is not None:
                try:
                    self.wandb.log({k: v for k, v in last.items() if v is not None}, step=last["step"])
                except Exception as error:
                    print(f"warning: wandb stopped logging ({error})", file=sys.stderr)
                    self.wandb = None
        self.rows.clear()
        self.file.flush()
        os.fsync(self.file.fileno())
        return last

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
