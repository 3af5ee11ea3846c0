"""Figures with stacked bars, one bar per run. Pieces have different hatches and colours, and their name if it fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from recurrent_db.accounting.flops import Cost
from recurrent_db.report.cost import HOLDERS
from recurrent_db.report.figure import SIZE, Frame, Panel, memory_unit, short, tick
from recurrent_db.report.runs import Run
from recurrent_db.report.svg import INK, SERIES, inline_svg

PARTS = ("embedding", "prelude", "adapter", "core", "conditioning", "coda", "head", "bridge")
"""Parts of the model that use FLOPs, in the order of a forward pass. A language model's embedding is a lookup."""
PART_COLORS = dict(zip(PARTS, (SERIES[0], *SERIES), strict=True))
"""An embedding of images has the prelude's colour: networks for images have no prelude."""

FLOP_HATCHES = {"forward": "", "backward": "////", "recomputed": "...."}
HOLDER_HATCHES = dict(zip(HOLDERS, ("", "////", "xxxx", "\\\\\\\\", "...."), strict=True))
HOLDER_NAMES = dict(
    zip(HOLDERS, ("parameters", "gradients", "optimizer", "weight average", "activations"), strict=True)
)

WORTH_DRAWING = 0.01
"""Smallest share of the model FLOPs at which recomputation is drawn. Fused attention always recomputes its scores."""


@dataclass(frozen=True)
class Piece:
    """One piece of a bar. ``width`` is in the axis's unit."""

    name: str
    width: float
    color: str
    hatch: str


def _face(color: str, hatch: str) -> list[dict[str, Any]]:
    """The layers of a piece: a pale background (not below dots, which it would hide), then outline and hatch."""
    ground = [] if hatch.startswith(".") else [{"color": color, "alpha": 0.45, "lw": 0}]
    return [*ground, {"fill": False, "edgecolor": color, "lw": 1, "hatch": hatch or None}]


def legend_box(key: str, color: str, hatch: str = "") -> str:
    """A legend box that looks like a piece of a bar. ``key`` must be unique in the page."""
    figure = Figure(figsize=(24 / 72, 14 / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, 24), ylim=(0, 14))
    for face in _face(color, hatch):
        axes.barh(7, 22, left=1, height=12, **face)
    return inline_svg(figure, key, "").replace("<svg ", '<svg class="box" ', 1)


def _stacks(axes: Axes, runs: Sequence[Run], stacks: Sequence[Iterable[Piece]], most: float) -> None:
    """Draw one bar per run on an axis from 0 to ``most``."""
    for row, pieces in enumerate(stacks):
        left = 0.0
        for index, piece in enumerate(pieces):
            if not piece.width:
                continue
            for face in _face(piece.color, piece.hatch):
                axes.barh(row, piece.width, left=left, height=0.62, **face)
            if piece.width / most > 0.022 * len(piece.name) + 0.02:
                axes.text(
                    left + piece.width / 2, row, piece.name, ha="center", va="center", fontsize=10,
                    gid=f"halo-{row}-{index}",
                )  # fmt: skip
            left += piece.width
    axes.set_yticks(range(len(runs)), [short(run.name, 18) for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_xlim(0, most)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))


def worth_drawing(cost: Mapping[str, Cost]) -> bool:
    """Whether a run recomputes enough to draw it."""
    return sum(c.recomputed for c in cost.values()) >= WORTH_DRAWING * sum(c.total for c in cost.values())


def flop_split(frame: Frame, shown: Sequence[tuple[Run, Mapping[str, Cost]]]) -> Panel:
    """FLOPs per training token by part: forward plain, backward hatched, recomputed dotted if there is enough of it."""
    kinds = ["forward", "backward"]
    if any(worth_drawing(cost) for _, cost in shown):
        kinds.append("recomputed")
    used = [part for part in PARTS if any(cost[part].total for _, cost in shown)]
    stacks = [
        [
            Piece(part, getattr(cost[part], kind), PART_COLORS[part], FLOP_HATCHES[kind])
            for kind in kinds
            for part in used
        ]
        for _, cost in shown
    ]
    figure, axes = frame.axes((SIZE[0], 66 + 28 * len(shown)))
    _stacks(axes, [run for run, _ in shown], stacks, 1.02 * max(sum(p.width for p in pieces) for pieces in stacks))
    axes.set_xlabel("training compute (FLOPs/token)")
    handles: list[Any] = [Patch(facecolor=PART_COLORS[p], alpha=0.6, label=p) for p in used]
    handles += [Patch(facecolor="none", edgecolor=INK, hatch=FLOP_HATCHES[k] or None, label=k) for k in kinds]
    return frame.finish(figure, "flop-split", "FLOPs per training token by part", handles)


def memory_split(frame: Frame, shown: Sequence[tuple[Run, Mapping[str, float], float | None]]) -> Panel:
    """Bytes by holder, with the measured peak as a diamond. A peak far beyond all bars is drawn as an arrow at the end of
    the axis, so that the bars stay readable."""
    widest = max(sum(split.values()) for _, split, _ in shown)
    peaks = [peak for _, _, peak in shown if peak]
    limit = max([widest, *(peak for peak in peaks if peak <= 2.5 * widest)]) or max([*peaks, 1.0])
    unit, factor = memory_unit(limit)
    # Leave room on the right for the numbers of the peaks.
    most = limit * factor * (1.28 if peaks else 1.02)
    stacks = [
        [
            Piece(HOLDER_NAMES[holder], split[holder] * factor, SERIES[index], HOLDER_HATCHES[holder])
            for index, holder in enumerate(HOLDERS)
        ]
        for _, split, _ in shown
    ]
    figure, axes = frame.axes((SIZE[0], 66 + 28 * len(shown)))
    _stacks(axes, [run for run, _, _ in shown], stacks, most)
    for row, (_, _, peak) in enumerate(shown):
        if not peak:
            continue
        beyond = peak > limit
        at = limit * factor * 1.05 if beyond else peak * factor
        axes.plot([at], [row], marker=">" if beyond else "D", color=INK, markersize=7, linestyle="", zorder=4)
        own_unit, own_factor = memory_unit(peak)
        axes.annotate(
            f"{peak * own_factor:.3g} {own_unit}", (at, row), xytext=(7, 0), textcoords="offset points", va="center",
            fontsize=10, gid=f"halo-peak-{row}",
        )  # fmt: skip
    axes.set_xlabel(f"memory ({unit})")
    handles: list[Any] = [
        Patch(facecolor="none", edgecolor=SERIES[i], hatch=HOLDER_HATCHES[h] or None, label=HOLDER_NAMES[h])
        for i, h in enumerate(HOLDERS)
    ]
    if peaks:
        handles += axes.plot([], [], marker="D", color=INK, linestyle="", label="measured peak")
    return frame.finish(figure, "memory-split", "Memory by holder", handles)
