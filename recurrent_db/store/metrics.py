"""Logging of a run: ``metrics.jsonl`` always, Weights & Biases on request."""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from recurrent_db.accounting.flops import Cost
from recurrent_db.accounting.hardware import EnergyMeter, hide_secrets
from recurrent_db.config import Config
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.schema import to_dict
from recurrent_db.store.train_state import TrainState

FINISH_TIMEOUT = 300.0
"""Seconds that a run waits at its end for wandb's uploads. What is not uploaded by then is on disk, for `wandb sync`."""


def plain(value: Any) -> Any:
    """A JSON value: a tensor becomes a number, a pair (sum, weight) its quotient, a number that is not finite null."""
    if isinstance(value, Tensor):
        numbers = value.tolist()
        value = numbers if isinstance(numbers, float | int) else (numbers[0] / numbers[1] if numbers[1] else None)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the rows after ``last_step`` and an incomplete last line."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                rows.append(line + "\n")
        except (ValueError, RecursionError, KeyError, TypeError):
            break
    write_atomic(path, "".join(rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without an incomplete last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


def counted_where(
    rows: Sequence[dict[str, Any]], column: str, names: Iterable[str], start: dict[str, Any] | None = None
) -> dict[str, float | None]:
    """What the steps whose rows have ``column`` cost.

    Args:
        rows: all rows of a run, whose counters are cumulative.
        names: the counters to sum up.
        start: the counters before the first row; None is 0.

    Returns:
        By counter the sum of its increments. None if there are no rows, or one has no number for that counter.
    """
    sums: dict[str, float | None] = {}
    for name in names:
        given = [0 if start is None else start[name], *(row.get(name) for row in rows)]
        ends = [end for end in given if isinstance(end, int | float)]
        steps = zip(itertools.pairwise(ends), rows, strict=False)
        complete = rows and len(ends) == len(given)
        sums[name] = sum(after - before for (before, after), row in steps if column in row) if complete else None
    return sums


class WandbLog:
    """Sends the same rows under the same names to Weights & Biases, without null values.

    A failure there prints one warning and ends the logging to wandb; it never ends the run. A resumed run keeps its id.
    Each start first sends the ``rows`` so far that wandb lacks. Online these are the rows after the server's last step,
    which keeps its values. Offline they are all rows, because a killed run's file lacks its end: so the newest folder
    (RUN/wandb/latest-run) is complete, and is the one to sync.
    """

    def __init__(self, run_dir: Path, config: Config, rows: Iterable[dict[str, Any]]) -> None:
        self.run: Any = None
        with self._failures_are_warnings():
            import wandb

            # Without a key the answer is no; wandb.init would ask for one and wait.
            if config.run.wandb == "online" and not wandb.login(prompt=False):
                raise UserError("no API key; set WANDB_API_KEY or run `wandb login`")
            self.run = wandb.init(
                project="recurrent_db",
                mode="online" if config.run.wandb == "online" else "offline",
                dir=str(run_dir),
                name=run_dir.resolve().name,
                id=self._id(run_dir),
                resume="allow",
                config=to_dict(config),
                settings=wandb.Settings(finish_timeout=FINISH_TIMEOUT),
            )
            self.first = self.run.starting_step
        for row in rows:
            self.log(row)

    @contextmanager
    def _failures_are_warnings(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: signals never raise in the trainer
            reason = " ".join(hide_secrets(f"{type(error).__name__}: {error}").split())[:200]
            print(f"warning: no more wandb ({reason}); metrics.jsonl has everything", file=sys.stderr)
            self.run = None
            with suppress(BaseException):  # or it would try again, and complain again, when the process ends
                import wandb

                wandb.teardown(1)

    @staticmethod
    def _id(run_dir: Path) -> str:
        """The run's id at wandb: made once and kept with the run."""
        path = run_dir / "wandb_id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(8))
        return path.read_text()

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None and row["step"] >= self.first:
            with self._failures_are_warnings():
                self.run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        if self.run is not None:
            with self._failures_are_warnings():
                self.run.finish()


class StepClock:
    """Training time and energy by step, for a device that runs behind the host.

    The clock is right only after the host has waited for the device (`settle`). The time and energy since the last wait are
    divided among the steps in proportion to their FLOPs. What lies between a wait and the next step (evaluation,
    checkpoints) is not counted.
    """

    def __init__(self, peak: float | None, meter: EnergyMeter) -> None:
        self.peak, self.meter, self.started = peak, meter, 0.0
        self.open: list[tuple[dict[str, Any], int, Cost]] = []

    def start(self) -> None:
        """A step begins."""
        if not self.open:
            self.meter.joules()
            self.started = time.perf_counter()

    def add(self, row: dict[str, Any], tokens: int, cost: Cost) -> None:
        """A step has been launched; ``cost`` is per token."""
        self.open.append((row, tokens, cost))

    def settle(self, state: TrainState) -> None:
        """The device has caught up: write time and energy into the rows since the last call, and into ``state``."""
        if not self.open:
            return
        seconds, joules = time.perf_counter() - self.started, self.meter.joules()
        whole = sum(cost.hardware * tokens for _, tokens, cost in self.open)
        for row, tokens, cost in self.open:
            share = seconds * cost.hardware * tokens / whole
            state.seconds += share
            row["seconds"], row["tokens_per_s"] = state.seconds, tokens / share
            row["mfu"] = cost.total * tokens / share / self.peak if self.peak else None
            row["hfu"] = cost.hardware * tokens / share / self.peak if self.peak else None
            row["peak_flops"] = self.peak
            if joules is not None:
                state.energy_joules += joules * share / seconds
                row["energy_joules"] = state.energy_joules
        self.open.clear()


class MetricLog:
    """Writes one row for each optimizer step. Rows may hold device tensors, which are read only when flushed.

    Only the first process has one; the others have a `NoLog`.
    """

    def __init__(self, run_dir: Path, config: Config, start_step: int) -> None:
        self.path = path = run_dir / "metrics.jsonl"
        truncate_metrics(path, start_step)
        self.file = path.open("a", encoding="utf-8")
        self.rows: list[dict[str, Any]] = []
        self.wandb = WandbLog(run_dir, config, read_metrics(path)) if config.run.wandb != "off" else None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def flush(self) -> dict[str, Any] | None:
        """Write the rows since the last call to disk. Returns the last one."""
        written = [{name: plain(value) for name, value in row.items()} for row in self.rows]
        self.rows.clear()
        self.file.writelines(json.dumps(row) + "\n" for row in written)
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.wandb is not None:
            for row in written:
                self.wandb.log(row)
        return written[-1] if written else None

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``: those steps are repeated."""
        self.rows.clear()
        self.file.close()
        truncate_metrics(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.wandb is not None:
            self.wandb.close()


class NoLog:
    """The `MetricLog` of a process that writes nothing."""

    def add(self, row: dict[str, Any]) -> None:
        pass

    def flush(self) -> dict[str, Any] | None:
        return None

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass
