"""The learning rate as a function of the share of the budget spent."""

from __future__ import annotations

import math

from recurrent_db.config import BudgetConfig, ScheduleConfig

DECAY = 0.3
"""Length of the final decay of ``wsd``, as a share of the budget."""


def learning_rate_scale(schedule: ScheduleConfig, progress: float) -> float:
    """The learning rate divided by its peak, at the share ``progress`` of the budget in [0, 1]."""
    if progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cosine":
        done = (progress - schedule.warmup) / max(1 - schedule.warmup, 1e-12)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    left = max(1 - progress, 0.0)
    if left >= DECAY:
        return 1.0
    return left / DECAY


def middle_of_step(before: float, half_way: float) -> float:
    """The share of the budget at which a step takes its learning rate, so that the last step does not have rate 0.

    Args:
        before: share spent before the step, below 1.
        half_way: share spent after half of the step. It is above 1 for a last step that mostly exceeds the budget; the
            middle of the part within the budget counts then.
    """
    return min(half_way, (before + 1) / 2)


def budget_progress(budget: BudgetConfig, flops: float, tokens: float, steps: float, seconds: float) -> float:
    """Share of the budget spent: the largest over all limits that are set; 0 without limits. Training stops at 1."""
    spent = {"flops": flops, "tokens": tokens, "steps": steps, "seconds": seconds}
    return max((spent[name] / limit for name in spent if (limit := getattr(budget, name)) is not None), default=0.0)
