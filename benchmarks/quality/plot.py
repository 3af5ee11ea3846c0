"""The figure of `quality/compare.py`: held-out NLL of every arm at one budget, by K and during training. With several
budgets, a third panel shows the final NLL at each budget."""

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
"""Upper limit of the NLL axis, as a multiple of the best arm's NLL. Lines of worse arms leave the plot."""


def _by_k(axes: Axes, seeds: Sequence[Result], key: str, look: dict[str, object], label: str | None) -> list[float]:
    """Draw one line per seed and return the plotted values."""
    values: list[float] = []
    for number, seed in enumerate(seeds):
        ks = [int(k) for k in seed[key]]
        axes.plot(ks, [seed[key][str(k)] for k in ks], label=None if number else label, **look)  # type: ignore[arg-type]
        values += list(seed[key].values())
    return values


def _along(axes: Axes, seeds: Sequence[Result], look: dict[str, object], label: str) -> list[float]:
    """Draw the NLL at the best K of each evaluation against FLOPs, and return the NLLs."""
    values: list[float] = []
    for number, seed in enumerate(seeds):
        points = [(point["flops"], min(point["nll"].values())) for point in seed["evaluations"]]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=None if number else label, **look)  # type: ignore[arg-type]
            values += y
    return values


def ends(axes: Axes, budgets: Sequence[dict[int, Result]], look: dict[str, object]) -> list[tuple[float, float]]:
    """Draw the final NLL at the best K against FLOPs, one line per seed. ``budgets`` holds the results by seed for each
    budget. Returns the points (FLOPs, nats per token)."""
    points = []
    for seed in sorted({seed for runs in budgets for seed in runs}):
        line = sorted((runs[seed]["flops"], _best(runs[seed])) for runs in budgets if seed in runs)
        axes.plot(*zip(*line, strict=True), **look)  # type: ignore[arg-type]
        points += line
    return points


def _best(run: Result) -> float:
    """NLL at the best K, by the likelihood of draws or, if it was computed, by the bound."""
    return min(*run["nll_by_k"].values(), *(run.get("bound_by_k") or {}).values(), math.inf)


def plot(results: Iterable[Result], arms: Sequence[str], budgets: Sequence[float], path: Path) -> bool:
    """Plot each arm at its best learning rate, one line per seed, to an .svg, .png or .pdf file.

    For walks, a solid line is the likelihood of draws and a dotted line the bound (`recurrent_db.denoise.bound`). The first
    two panels show the budget with the most arms, and the largest of these. Failed runs are left out. Returns False,
    without a file, if no other runs exist.
    """
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
        right.set(xlabel="training FLOPs", title="during training, at the best K")
        Frame([]).log_axis(right.xaxis, min(spent), max(spent), 1.1)
        for axes in more:
            lowest = min(nll for _, nll in points)
            axes.set(xlabel="training FLOPs", title="complete runs, at the best K", ylabel="held-out nats per token")
            axes.set(ylim=(lowest - 0.05, least * ABOVE))
            Frame([]).log_axis(axes.xaxis, min(flops for flops, _ in points), max(flops for flops, _ in points), 1.1)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True
