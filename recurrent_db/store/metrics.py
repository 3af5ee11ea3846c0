"""Logs a run's metrics to ``metrics.jsonl`` and, if requested, to Weights & Biases."""

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
"""Seconds that a finished run waits for wandb's uploads. The rest stays on disk for `wandb sync`."""


def plain(value: Any) -> Any:
    """Convert a metric to a JSON value.

    A 0-dimensional tensor becomes a number, a tensor (sum, weight) its quotient, and a number that is not finite None.
    """
    if isinstance(value, Tensor):
        numbers = value.tolist()
        value = numbers if isinstance(numbers, float | int) else (numbers[0] / numbers[1] if numbers[1] else None)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_metrics(path: Path, last_step: int) -> None:
    """Remove the rows after ``last_step``, and an incomplete last line, from a ``metrics.jsonl``."""
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
    """The rows of a ``metrics.jsonl``. An incomplete last line is left out."""
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
    """Sum the increments of counters over the steps whose rows have ``column``.

    Args:
        rows: all rows of a run. Their counters are cumulative.
        names: the counters to sum.
        start: the counters before the first row; None means 0.

    Returns:
        The sums by counter. None for a counter that a row lacks, and for all if there are no rows.
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
    """Sends the rows of ``metrics.jsonl`` to Weights & Biases, under the same names and without null values.

    If wandb fails, one warning is printed and logging to wandb ends, but the run continues. A resumed run keeps its id. At
    each start, earlier ``rows`` that wandb lacks are sent first. Online these are the rows after the server's last step.
    Offline all rows are sent, because the file of a killed run lacks its end. The newest folder (RUN/wandb/latest-run) is
    then complete, so sync that one.
    """

    def __init__(self, run_dir: Path, config: Config, rows: Iterable[dict[str, Any]]) -> None:
        self.run: Any = None
        with self._failures_are_warnings():
            import wandb

            # wandb.login returns False without a key. wandb.init would ask for one and wait.
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
        except BaseException as error:  # wandb also raises SystemExit and KeyboardInterrupt; signals never raise here
            reason = " ".join(hide_secrets(f"{type(error).__name__}: {error}").split())[:200]
            print(f"warning: logging to wandb ended ({reason}); metrics.jsonl has everything", file=sys.stderr)
            self.run = None
            with suppress(BaseException):  # without a teardown wandb tries and fails again when the process exits
                import wandb

                wandb.teardown(1)

    @staticmethod
    def _id(run_dir: Path) -> str:
        """The run's id at wandb: drawn once and kept in the run directory."""
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
    """Measures training time and energy per step on a device that runs asynchronously.

    The host knows the time only after it has waited for the device (`settle`). The time and energy since the previous wait
    are divided among the steps in proportion to their FLOPs. Evaluation and checkpoints are not counted.

    Args:
        peak: FLOPs per second of all devices at 100 percent utilisation; None leaves MFU and HFU out.
        meter: energy meter of the device.
    """

    def __init__(self, peak: float | None, meter: EnergyMeter) -> None:
        self.peak, self.meter, self.started = peak, meter, 0.0
        self.open: list[tuple[dict[str, Any], int, Cost]] = []

    def start(self) -> None:
        """Call this at the start of a step."""
        if not self.open:
            self.meter.joules()
            self.started = time.perf_counter()

    def add(self, row: dict[str, Any], tokens: int, cost: Cost) -> None:
        """Call this after a step was launched.

        Args:
            row: the step's row, which `settle` completes.
            tokens: tokens of the step.
            cost: FLOPs per token.
        """
        self.open.append((row, tokens, cost))

    def settle(self, state: TrainState) -> None:
        """Call this after the host has waited for the device. Adds time and energy to the open rows and to ``state``."""
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
    """Writes one row per optimizer step to ``metrics.jsonl``. Tensors in a row are read from the device at the flush.

    Only the first process has a `MetricLog`. The others have a `NoLog`.
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
        """Write the rows since the last call to disk, and return the last of them; None if there are none."""
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
        """Remove the rows after ``step``, because the run repeats these steps."""
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
    """A `MetricLog` that writes nothing."""

    def add(self, row: dict[str, Any]) -> None:
        pass

    def flush(self) -> dict[str, Any] | None:
        return None

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass
