"""The counters of a run, and the file ``state.json`` that stores them in a checkpoint."""

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
    """The counters of a run. They continue when the run is resumed."""

    step: int = 0
    """Optimizer steps, including skipped ones."""
    tokens: int = 0
    """Training tokens."""
    flops: FlopCount = field(default_factory=FlopCount)
    seconds: float = 0.0
    """Training time, without evaluation and checkpoints."""
    energy_joules: float = 0.0
    """Energy used by the GPU, if it has a meter."""
    skipped: int = 0
    """Skipped steps."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last step that was not skipped."""
    spikes: int = 0
    """Skipped steps with a finite loss."""
    visits: int = 1
    """Number of steps in a row for which a slot of the batch holds its sample (`data.loader.Slots`)."""
    visits_start: int = 0
    """Step from which slots hold their samples for ``visits`` steps."""
    rollbacks: int = 0
    """Returns to an earlier checkpoint. Their number is part of the seed of the data order."""
    flops_abandoned: float = 0.0
    """FLOPs of steps that a return to a checkpoint discarded; not part of ``flops``."""
    loss_mean: float = 0.0
    """Running mean of the loss, in nats; see `training.guard.LossGuard`."""
    loss_variance: float = 0.0
    """Running variance of the loss."""
    loss_count: int = 0
    """Steps in ``loss_mean`` and ``loss_variance``."""
    loss_lowest: float = 0.0
    """Lowest running mean of the loss at a log point, in nats."""

    def spent(self, budget: BudgetConfig) -> float:
        """Share of ``budget`` that is spent; 1 or more means all of it."""
        return budget_progress(budget, self.flops.total, self.tokens, self.step, self.seconds)

    def count(self, cost: Cost, update: float, tokens: int) -> None:
        """Add one step.

        Args:
            cost: FLOPs per token.
            update: FLOPs of the optimizer's update.
            tokens: tokens of the step.
        """
        self.tokens += tokens
        self.flops.add(cost, update, tokens)

    def row(self) -> dict[str, float]:
        """The counters that are also in ``metrics.jsonl``, by column."""
        return {"step": self.step, "tokens": self.tokens, **self.flops.row(), "seconds": self.seconds}


def write_state(path: Path, state: TrainState, objective_state: dict[str, Any], ema_updates: int) -> None:
    """Write ``state.json``: the counters, the objective's state, and the number of EMA updates."""
    values = {"counters": asdict(state), "objective": objective_state, "ema_updates": ema_updates}
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_state(path: Path) -> tuple[TrainState, dict[str, Any], int]:
    """Read the file of `write_state`.

    Returns:
        The counters, the objective's state, and the number of EMA updates.

    Raises:
        UserError: the content is invalid.
    """
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
        raise UserError(f"{path} is not a valid state.json: {error}") from None
    return state, objective, updates
