"""FLOPs to reach a held-out NLL.

Annealing the learning rate lowers the loss at once. A point during the decay therefore lies below the curve at the constant
rate, and above the results of complete runs. Mixing them would favour the run that decays first, so two kinds of numbers
are kept apart:

- constant rate: between evaluations at the peak learning rate, NLL is interpolated linearly in log FLOPs;
- annealed end: a complete run shows that a level can be reached with its FLOPs or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_db.report.runs import Evaluation, Run


@dataclass(frozen=True)
class Reached:
    """FLOPs at which a level was reached."""

    flops: float
    at_most: bool
    """The first usable point was already at or below the level, so fewer FLOPs may be enough."""


def reached_at_constant_rate(points: Sequence[Evaluation], level: float) -> Reached | None:
    """FLOPs at which the best K's NLL first falls to ``level`` at the peak learning rate; None if it never does."""
    before: Evaluation | None = None
    for point in points:
        if point.phase != "constant":
            continue
        if point.best_nll <= level:
            if before is None or before.stretch != point.stretch or before.flops >= point.flops:
                return Reached(point.flops, at_most=True)
            share = (before.best_nll - level) / (before.best_nll - point.best_nll)
            low, high = math.log(before.flops), math.log(point.flops)
            return Reached(math.exp(low + share * (high - low)), at_most=False)
        before = point
    return None


def reached_at_end(points: Sequence[Evaluation], level: float) -> Reached | None:
    """FLOPs of a complete, annealed run whose final NLL is at or below ``level``; None otherwise."""
    end = next((p for p in points if p.phase == "end" and p.best_nll <= level), None)
    return Reached(end.flops, at_most=True) if end else None


def choose_levels(runs: Sequence[Run], wanted: int = 5) -> list[float]:
    """About ``wanted`` round NLL levels, from high to low, within the range of the usable points."""
    values = [p.best_nll for run in runs for p in run.evaluations if p.phase != "other"]
    if not values:
        return []
    low, high = min(values), max(values)
    best: list[float] = []
    for exponent in range(1, -3, -1):
        for digit in (5, 2.5, 2, 1):
            step = digit * 10.0**exponent
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            levels = [round(i * step, 6) for i in range(last, first - 1, -1)] if last - first < 50 else []
            if levels and abs(len(levels) - wanted) < abs(len(best) - wanted):
                best = levels
    # All points have one value: use the next round number above it.
    return best or [round(math.ceil(low * 20 - 1e-9) / 20, 6)]
