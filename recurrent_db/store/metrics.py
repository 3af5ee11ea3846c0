"""Where a run's numbers go: ``metrics.jsonl`` always, Weights & Biases when asked."""

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
"""Seconds that the end of a run waits for wandb's uploads. What is left then is on disk, for `wandb sync`."""


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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                rows.append(line + "\n")
        except (ValueError, RecursionError, KeyError, TypeError):
            break
    write_atomic(path, "".join(rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that is still being written is left out."""
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
    """What the steps whose rows have ``column`` took: the growth of cumulative counters, summed. They begin at ``start``, by
    default at 0. None for a counter of which a row, or ``start``, has no number, and where there are no rows."""
    sums: dict[str, float | None] = {}
    for name in names:
        given = [0 if start is None else start.get(name), *(row.get(name) for row in rows)]
        ends = [end for end in given if isinstance(end, int | float)]
        steps = zip(itertools.pairwise(ends), rows, strict=False)
        known = rows and len(ends) == len(given)
        sums[name] = sum(after - before for (before, after), row in steps if column in row) if known else None
    return sums


class WandbLog:
    """The same rows under the same names at Weights & Biases; null values are left out.

    Whatever fails there costs one warning and the rest of the run's rows there, never the run itself. A resumed run goes
    on under its id. Each start sends first what wandb lacks of the ``rows`` so far: online those after the server's last
    step (a step that it has keeps its values); offline all of them, because a killed run's file lacks its end, so that
    the newest folder (RUN/wandb/latest-run) is whole by itself and is the one to sync.
    """

    def __init__(self, run_dir: Path, config: Config, rows: Iterable[dict[str, Any]]) -> None:
        self.run: Any = None
        with self._failures_are_warnings():
            import wandb

            # Without a key the answer is no; wandb.init would ask for one and wait.
            if config.run.wandb == "online" and not wandb.login(prompt=False):
                raise UserError("no API key; set WANDB_API_KEY or run `wandb login`")
            self.run = wandb.init(
                project=config.run.wandb_project,
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
        """The run's identity there: made once and kept with the run."""
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

    Only where the host has waited for the device (`settle`) is the clock right; what was used since it last did is shared
    out among the steps in between in proportion to their FLOPs. What lies between a settling and the next step
    (evaluation, checkpoints) is not counted.
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
        """The device has caught up: write the columns of time and energy of the rows since the last time, and both sums."""
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
    """One row for each optimizer step. Rows may hold device tensors; they are read when flushed, not before.

    It belongs to the run directory's first process; the others have a `NoLog`.
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
        """Write the rows collected so far to disk. Returns the last one."""
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
        """Drop the rows after ``step``: these steps are taken again."""
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
