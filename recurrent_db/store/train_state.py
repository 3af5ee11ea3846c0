"""The counters of a run, and ``state.json``, which keeps them in a checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recurrent_db.accounting.flop_count import FlopCount
from recurrent_db.accounting.flops import Cost
from recurrent_db.config import BudgetConfig
from recurrent_db.errors import UserError
from recurrent_db.files import read_json
from recurrent_db.optim.schedule import budget_progress
from recurrent_db.schema import MOST_INTEGER


@dataclass
class TrainState:
    """The counters of a run. All of them are cumulative over resumptions."""

    step: int = 0
    tokens: int = 0
    flops: FlopCount = field(default_factory=FlopCount)
    seconds: float = 0.0
    energy_joules: float = 0.0
    """Energy that the GPU used, where it has a meter."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    """Skipped steps whose loss was finite."""
    rollbacks: int = 0
    """Returns to an earlier checkpoint; they choose the order of the data."""
    flops_abandoned: float = 0.0
    """Spent on steps that were taken back; not part of ``flops``."""
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_count: int = 0
    """Running mean and variance of the loss, and over how many steps; see `training.guard.LossGuard`."""
    loss_lowest: float = 0.0
    """Lowest running mean at a log point."""

    def spent(self, budget: BudgetConfig) -> float:
        """Share of a budget that these counters have used; 1 or more means that it is spent."""
        return budget_progress(budget, self.flops.total, self.tokens, self.step, self.seconds)

    def count(self, cost: Cost, update: float, tokens: int) -> None:
        """Add a step of ``tokens`` tokens: ``cost`` is per token, ``update`` the FLOPs of the optimizer's step."""
        self.tokens += tokens
        self.flops.add(cost, update, tokens)

    def row(self) -> dict[str, float]:
        """The counters that ``metrics.jsonl`` has too, by column."""
        return {"step": self.step, "tokens": self.tokens, **self.flops.row(), "seconds": self.seconds}


def write_state(path: Path, state: TrainState, objective_state: dict[str, Any], ema_updates: int) -> None:
    """Write ``state.json``: counters, the objective's state, and how often the weight average was updated."""
    values = {"counters": asdict(state), "objective": objective_state, "ema_updates": ema_updates}
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_state(path: Path) -> tuple[TrainState, dict[str, Any], int]:
    """Read what `write_state` wrote. Raises `UserError` for any other content."""
    try:
        values = read_json(path)
        counters, objective, updates = {**values["counters"]}, values["objective"], values["ema_updates"]
        state = TrainState(**{**counters, "flops": FlopCount(**counters.get("flops", {}))})
        defaults = {**vars(TrainState()), **FlopCount().row(), "ema_updates": 0}
        for name, value in {**vars(state), **state.flops.row(), "ema_updates": updates}.items():
            whole = isinstance(defaults[name], int)
            if type(value) is not int and (whole or type(value) is not float):
                raise ValueError(f"{name} is not a {'whole ' * whole}number")
            if not 0 <= value <= (MOST_INTEGER if type(value) is int else sys.float_info.max):
                raise ValueError(f"{name} is out of range")
        if not isinstance(objective, dict):
            raise ValueError("objective is not a table")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not what training saves: {error}") from None
    return state, objective, updates
