"""FLOPs to reach a held-out NLL.

Annealing the learning rate lowers the loss at once, so a point in the middle of a decay lies below the curve of the
constant rate and above that of complete runs; mixing the two flatters whoever decays first. Two kinds of numbers are
kept apart here and everything else is left out:

- constant rate: between evaluations at the peak learning rate, NLL is interpolated linearly in log FLOPs;
- annealed end: the end of a complete run says that a level was reached with at most its FLOPs, and no more than that.
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
    """The level was already passed at the first point that counts, so fewer FLOPs may do."""


def reached_at_constant_rate(points: Sequence[Evaluation], level: float) -> Reached | None:
    """FLOPs at which the best K's NLL first comes down to ``level`` at the peak learning rate; None if it does not."""
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
    """The FLOPs of a complete, annealed run whose end is at or below ``level``; None otherwise."""
    end = next((p for p in points if p.phase == "end" and p.best_nll <= level), None)
    return Reached(end.flops, at_most=True) if end else None


def choose_levels(runs: Sequence[Run], wanted: int = 5) -> list[float]:
    """About ``wanted`` round NLL levels, from high to low, within what the points that count reached."""
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
    # A single value: the next round number above it, which it reached.
    return best or [round(math.ceil(low * 20 - 1e-9) / 20, 6)]
