"""The figure of `quality/compare.py`: held-out likelihood by K, and along the training, of every arm at one budget; and,
where there are several budgets, at the end of the runs of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.quality.tables import Result, best_rate, by_rate
from recurrent_db.report.figure import DASHES, MARKERS, Frame, drawing, linear_tick
from recurrent_db.report.svg import PAPER, SERIES

ABOVE = 1.25
"""Likelihoods worse than so many times the best arm's are off the plot, which says so by a line that leaves it."""


def _by_k(axes: Axes, seeds: Sequence[Result], key: str, look: dict[str, object], label: str | None) -> list[float]:
    """One line a seed; their values."""
    values: list[float] = []
    for number, seed in enumerate(seeds):
        ks = [int(k) for k in seed[key]]
        axes.plot(ks, [seed[key][str(k)] for k in ks], label=None if number else label, **look)  # type: ignore[arg-type]
        values += list(seed[key].values())
    return values


def _along(axes: Axes, seeds: Sequence[Result], look: dict[str, object], label: str) -> list[float]:
    """Best K at each evaluation, against FLOPs; their values."""
    values: list[float] = []
    for number, seed in enumerate(seeds):
        points = [(point["flops"], min(point["nll"].values())) for point in seed["evaluations"]]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=None if number else label, **look)  # type: ignore[arg-type]
            values += y
    return values


def ends(axes: Axes, budgets: Sequence[dict[int, Result]], look: dict[str, object]) -> list[tuple[float, float]]:
    """Where complete runs of several budgets end at their best K: a line for each seed of ``budgets``, which are results by
    seed. Their points, (FLOPs, nats)."""
    points = []
    for seed in sorted({seed for runs in budgets for seed in runs}):
        line = sorted((runs[seed]["flops"], _best(runs[seed])) for runs in budgets if seed in runs)
        axes.plot(*zip(*line, strict=True), **look)  # type: ignore[arg-type]
        points += line
    return points


def _best(run: Result) -> float:
    """The NLL at the best K, by the mixture or, where it was made, by the bound on a walk."""
    return min(*run["nll_by_k"].values(), *(run.get("bound_by_k") or {}).values(), math.inf)


def plot(results: Iterable[Result], arms: Sequence[str], budgets: Sequence[float], path: Path) -> bool:
    """Each arm at its best rate, a line for each seed, to an .svg, .png or .pdf. The dotted line of a walk is the
    bound on its likelihood (`recurrent_db.denoise.bound`), the other the mixture over draws. By K and along the training the
    runs are those of the budget that has the most arms, of several the largest. Runs that failed are left out; False, and
    no file, where there are no others."""
    results = [result for result in results if "failed" not in result]
    budget = max(budgets, key=lambda at: (sum(best_rate(results, arm, at) is not None for arm in arms), at))
    with drawing():
        several = len(budgets) > 1
        figure = Figure(figsize=(15.4 if several else 11.4, 3.7), layout="constrained", facecolor=PAPER)
        left, right, *more = figure.subplots(1, 3 if several else 2)
        least, ks, spent, points = float("inf"), [1], [budget], []
        for number, arm in enumerate(arms):
            look = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5,
                    "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.5}  # fmt: skip
            for axes in more:
                at_best = [by_rate(results, arm, at)[rate] for at in budgets if (rate := best_rate(results, arm, at))]
                points += ends(axes, at_best, look)
            rate = best_rate(results, arm, budget)
            if rate is None:
                continue
            seeds = list(by_rate(results, arm, budget)[rate].values())
            least = min(least, *_by_k(left, seeds, "nll_by_k", look, arm))
            if all(seed.get("bound_by_k") for seed in seeds):
                _by_k(left, seeds, "bound_by_k", {**look, "linestyle": ":"}, f"{arm}, bound")
            least = min(least, *_along(right, seeds, {**look, "markersize": 3.5}, arm), math.inf)
            ks += [int(k) for seed in seeds for k in seed["nll_by_k"]]
            spent += [point["flops"] for seed in seeds for point in seed["evaluations"]]
        if not math.isfinite(least):
            return False
        for axes in (left, right):
            axes.set(ylabel="held-out nats per token", ylim=(least - 0.05, least * ABOVE))
        left.set(xlabel="K, iterations at inference", title=f"by K, after {budget:g} FLOPs", xscale="log")
        left.xaxis.set_major_locator(FixedLocator(sorted(set(ks))))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter(FuncFormatter(linear_tick))
        right.set(xlabel="training FLOPs", title="along the training, at the best K")
        Frame([]).log_axis(right.xaxis, min(spent), max(spent), 1.1)
        for axes in more:
            lowest = min(nll for _, nll in points)
            axes.set(xlabel="training FLOPs", title="complete runs, at the best K", ylabel="held-out nats per token")
            axes.set(ylim=(lowest - 0.05, least * ABOVE))
            Frame([]).log_axis(axes.xaxis, min(flops for flops, _ in points), max(flops for flops, _ in points), 1.1)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True
