"""The result tables of eval/sweep.py: average tasks into groups, compare rows with baselines, print and plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recurrent_db.evaluation.accuracy import Accuracy, Difference, Floats
from recurrent_db.report.figure import Frame, drawing
from recurrent_db.report.svg import MUTED, PAPER, SERIES

CLEAR = 3.0
"""A difference counts as clear if its z is above this."""


BASELINES = ("chance", "unigram", "untrained")
"""Names of the baselines, in the order of the tables. The run's own rows follow, by K."""


@dataclass
class Row:
    """One model's result on one task or group."""

    task: str
    metric: str
    model: str
    k: int | None
    items: int
    accuracy: Accuracy
    flops: float | None = None
    """Forward FLOPs of all items."""
    seconds: float | None = None
    credits: Floats | None = None
    """Credit for each item, (N,). Only tasks have it; groups do not."""
    against: str | None = None
    """The baseline that ``difference`` is measured against."""
    difference: Difference | None = None

    @property
    def baseline(self) -> int:
        """Index in `BASELINES`; ``len(BASELINES)`` for a row of the run."""
        return BASELINES.index(self.model) if self.model in BASELINES else len(BASELINES)

    @property
    def z(self) -> float | None:
        return self.difference.z if self.difference else None

    @property
    def above(self) -> bool | None:
        """Whether the row is clearly better than its baseline; None without a comparison."""
        return None if self.z is None else self.z > CLEAR

    @property
    def flops_per_item(self) -> float | None:
        return self.flops / self.items if self.flops is not None else None

    def to_json(self) -> dict[str, Any]:
        low, high = self.accuracy.interval
        numbers = {
            "accuracy": self.accuracy.mean, "stderr": self.accuracy.stderr, "low": low, "high": high,
            "flops_per_item": self.flops_per_item, "seconds": self.seconds, "z": self.z,
        }  # fmt: skip
        return {
            **{name: getattr(self, name) for name in ("task", "metric", "model", "k", "items", "against", "above")},
            **{name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()},
        }


@dataclass
class Table:
    """The rows of one metric, for a task or a group."""

    task: str
    metric: str
    rows: list[Row]
    members: list[Table] = field(default_factory=list)
    """For a group: the tables of its tasks."""

    @property
    def bar(self) -> Row:
        """The better of the unigram and the untrained model."""
        return max((row for row in self.rows if row.baseline in (1, 2)), key=lambda row: row.accuracy.mean)

    @property
    def by_k(self) -> list[Row]:
        """The run's own rows, in the order of K."""
        return [row for row in self.rows if row.difference is not None]


def compare(table: Table) -> Table:
    """Compare the run's rows of a task's table with the better baseline. Changes ``table`` and returns it."""
    bar = table.bar
    for row in table.rows:
        if row.baseline == len(BASELINES) and row.credits is not None and bar.credits is not None:
            row.against, row.difference = bar.model, Difference.of(row.credits, bar.credits)
    return table


def group_table(name: str, members: list[Table]) -> Table:
    """Average the tasks of a group with equal weights. The baseline is the one that is better on the group."""
    rows = []
    for parts in zip(*(table.rows for table in members), strict=True):
        first, accuracy = parts[0], Accuracy.average([row.accuracy for row in parts])
        flops, seconds = (
            sum(costs) if None not in (costs := [getattr(row, cost) for row in parts]) else None
            for cost in ("flops", "seconds")
        )
        items = sum(row.items for row in parts)
        rows.append(Row(name, first.metric, first.model, first.k, items, accuracy, flops, seconds))
    table = Table(name, members[0].metric, rows, members)
    bar = rows.index(table.bar)
    for index, row in enumerate(rows):
        if row.baseline == len(BASELINES):
            pairs = [(member.rows[index].credits, member.rows[bar].credits) for member in members]
            each = [Difference.of(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
            row.against, row.difference = table.bar.model, Difference.average(each)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _z(row: Row) -> str:
    return f"{row.z:+.1f}" if row.z is not None else ""


def text(table: Table) -> str:
    """A table as printed. A group's table has one more line for each of its tasks."""
    first = table.rows[0]
    lines = [
        f"{table.task}: {table.metric} on {first.items:,} items"
        + (f" of {len(table.members)} tasks" if table.members else ""),
        f"{'model':<20} {'K':>3} {'acc':>6} {'stderr':>7} {'95% interval':>15} {'FLOPs/item':>11} {'seconds':>8} "
        f"{'z':>6} against",
    ]
    for row in table.rows:
        low, high = row.accuracy.interval
        known = row.model != "chance"
        lines.append(
            f"{row.model[-20:]:<20} {row.k or '':>3} {row.accuracy.mean:>6.3f} "
            f"{f'{row.accuracy.stderr:.4f}' if known else '':>7} {f'{low:.3f} to {high:.3f}' if known else '':>15} "
            f"{f'{row.flops_per_item:.3e}' if row.flops_per_item is not None else '':>11} "
            f"{f'{row.seconds:.1f}' if row.seconds is not None else '':>8} {_z(row):>6} {row.against or ''}".rstrip()
        )
    if table.members:
        wide = max(len(member.task) for member in table.members)
        heads = [row.model if row.difference is None else f"K={row.k} (z)" for row in table.rows]
        lines += ["", " ".join([f"{'task':<{wide}}", *(f"{head:>13}" for head in heads)])]
        for member in table.members:
            cells = (f"{row.accuracy.mean:.3f}" + (f" ({_z(row)})" if _z(row) else "") for row in member.rows)
            lines.append(" ".join([f"{member.task:<{wide}}", *(f"{cell:>13}" for cell in cells)]))
        for index, row in enumerate(table.rows):
            if row.difference is not None:
                above = sum(bool(member.rows[index].above) for member in table.members)
                lines.append(
                    f"K={row.k}: above the better of the unigram and the untrained model, z > {CLEAR:g}, "
                    f"on {above} of {len(table.members)}"
                )
    return "\n".join(lines)


def plot(tables: Sequence[Table], path: Path) -> None:
    """Plot accuracy against FLOPs per item, one panel per table, each point labelled with its K."""
    with drawing():
        columns = min(3, len(tables))
        lines = math.ceil(len(tables) / columns)
        figure = Figure(figsize=(5.2 * columns, 3.9 * lines), layout="constrained", facecolor=PAPER)
        panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
        for spare in panels[len(tables) :]:
            spare.axis("off")
        for axes, table in zip(panels, tables, strict=False):
            rows = table.by_k
            x = [row.flops_per_item or math.nan for row in rows]
            means = np.array([row.accuracy.mean for row in rows])
            ends = np.array([row.accuracy.interval for row in rows]).T
            bars = np.abs(ends - means)
            axes.errorbar(x, means, yerr=bars, color=SERIES[0], marker="o", capsize=3, label=rows[0].model)
            for row, place in zip(rows, zip(x, means, strict=True), strict=True):
                axes.annotate(f"K={row.k}", place, (4, 5), textcoords="offset points", fontsize=9, color=MUTED)
            others = [row for row in table.rows if row.difference is None]
            for row, style, colour in zip(others, (":", "-.", "--"), (MUTED, SERIES[1], SERIES[2]), strict=False):
                axes.axhline(row.accuracy.mean, linestyle=style, color=colour, label=row.model)
            axes.set(xlabel="inference FLOPs per item", ylabel=table.metric, title=table.task)
            Frame([]).log_axis(axes.xaxis, min(x), max(x), 1.3)
            axes.legend(fontsize=9)
        figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix == ".svg" else None)
