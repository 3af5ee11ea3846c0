"""The figures of a report. A run keeps its colour, dash pattern and marker in all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from recurrent_db.flops import Cost
from recurrent_db.report.data import Array, Run, smooth, thin
from recurrent_db.report.svg import INK, MUTED, PAPER, SERIES, STYLE, inline_svg

DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.6)), (0, (7, 2, 1.5, 2)), (0, (7, 2, 1.5, 2, 1.5, 2)))
MARKERS = "osD^vPX<>phd"
PARTS = ("prelude", "adapter", "core", "conditioning", "coda", "head", "bridge")
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

SIZE, THIRD, SMALL = (410, 275), (350, 300), (340, 215)
"""Width and height of a panel in the units of its view box, which are near CSS pixels on the page."""

TRAINING_X = {
    "flops": "training compute (FLOPs)",
    "tokens": "training data (tokens)",
    "seconds": "training time (seconds, without evaluation)",
}
COLUMN_LABELS = {
    "tokens_per_s": ("Throughput", "tokens per second", 1.0),
    "mfu": ("Utilisation (MFU)", "share of peak FLOPs/s (%)", 100.0),
    "peak_memory_bytes": ("Peak memory", "memory (GiB)", 2.0**-30),
    "lr": ("Learning rate", "learning rate (per step)", 1.0),
    "grad_norm": ("Gradient norm, before clipping", "L2 norm (nats/weight)", 1.0),
    "state_rms": ("Size of the final state", "RMS (units of the state)", 1.0),
    "depth": ("Depth of the training step", "K (core iterations)", 1.0),
    "loss_sigma_max": ("Training loss at sigma_max", "loss (nats/token)", 1.0),
}
"""Title, axis label with unit, and factor of the columns of metrics.jsonl that get a panel of their own."""

EXACT_COLUMNS = frozenset({"lr", "peak_memory_bytes"})
"""Columns that are drawn as logged; the others are smoothed."""


@dataclass
class Panel:
    """A drawn figure with its heading."""

    title: str
    svg: str


def scientific(value: float, digits: int = 2) -> str:
    """1234567.0 -> ``1.23 × 10⁶``; small numbers stay plain."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits + 1}g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def tick(value: float, _position: object = None) -> str:
    """Label of an axis tick: plain where that is short, a power of ten where it is one."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    mantissa = mantissa.removesuffix(".0")
    return power if mantissa == "1" else f"{mantissa}×{power}"


def linear_tick(value: float, position: object = None) -> str:
    """Label of a tick of a linear axis, where 10,000 stands beside 7,500."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else tick(value, position)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, or 1-2-5 or 1-3 steps, or evenly spaced where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**e for e in range(first, last + 1) if low <= 10.0**e <= high]
    if len(decades) >= 3:
        return decades[:: math.ceil(len(decades) / 6)]
    for digits in ((1, 2, 5), (1, 3)):
        fine = [d * 10.0**e for e in range(first, last + 1) for d in digits if low <= d * 10.0**e <= high]
        if 3 <= len(fine) <= 6:
            return fine
    return [t for t in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]


def short(name: str, most: int = 22) -> str:
    """A name that fits beside an axis: its end tells runs apart more often than its start."""
    return name if len(name) <= most else "…" + name[-most + 1 :]


@contextmanager
def drawing() -> Iterator[None]:
    """The settings that figures are made and saved under."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


class Plots:
    """Draws the panels of a report; a key names each panel in the page and among the PNG files."""

    def __init__(self, runs: Sequence[Run], png_dir: Path | None = None) -> None:
        self.runs = runs
        self.png_dir = png_dir
        self.looks: list[dict[str, Any]] = [
            {
                "color": SERIES[i % len(SERIES)],
                "linestyle": DASHES[i % len(DASHES)],
                "marker": MARKERS[i % len(MARKERS)],
                # Curves that coincide stay visible: later ones are thinner and lie on top.
                "linewidth": 2.4 - i / max(len(runs) - 1, 1),
                "markersize": 7.0 - 2 * i / max(len(runs) - 1, 1),
            }
            for i in range(len(runs))
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Frame

    def _axes(self, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
        layout = ConstrainedLayoutEngine(w_pad=4 / 72, h_pad=4 / 72)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout=layout)
        return figure, figure.subplots()

    def _finish(self, figure: Figure, key: str, title: str, handles: list[Any] | None = None) -> Panel:
        """The panel's SVG; its PNG, where wanted, has a title, a white ground and its own legend."""
        axes = figure.axes[0]
        label = f"{title}: {axes.get_ylabel() or 'runs'} against {axes.get_xlabel()}"
        panel = Panel(title, inline_svg(figure, key, label))
        if self.png_dir is not None:
            self.png_dir.mkdir(parents=True, exist_ok=True)
            handles = handles or [
                Line2D([], [], label=short(run.name, 40), **look)
                for run, look in zip(self.runs, self.looks, strict=True)
            ]
            axes.set_title(title)
            width, height = figure.get_size_inches()
            lines = math.ceil(len(handles) / 2)
            figure.set_size_inches(max(width, SIZE[0] / 72), height + 0.3 + 0.25 * lines)
            figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=10)
            path = self.png_dir / f"{key}.png"
            figure.savefig(path, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
        return panel

    def _log(self, axis: Any, low: float, high: float, pad: float = 1.05) -> None:
        axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low / pad, high * pad)})
        axis.set_major_locator(FixedLocator(log_ticks(low / pad, high * pad)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(tick))

    def _linear(self, axis: Any) -> None:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(linear_tick))

    def _k_axis(self, axes: Axes) -> None:
        ks = sorted({point.k for run in self.runs for point in run.depth})
        ticks = ks if len(ks) <= 8 else [2**i for i in range(ks[-1].bit_length()) if 2**i >= ks[0]]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.set_xlim(ks[0] / 1.2, ks[-1] * 1.2)
        axes.set_xlabel("K (core iterations at inference)")

    def swatches(self) -> list[str]:
        """For each run a small SVG of its line and marker, for legends."""
        result = []
        for index, look in enumerate(self.looks):
            figure = Figure(figsize=(38 / 72, 14 / 72))
            axes = figure.add_axes((0, 0, 1, 1))
            axes.axis("off")
            axes.set(xlim=(0, 1), ylim=(-1, 1))
            axes.plot([0.02, 0.98], [0, 0], **{**look, "marker": "", "linewidth": 1.8})
            axes.plot([0.5], [0], **{**look, "linestyle": "", "markersize": 6.5})
            result.append(inline_svg(figure, f"swatch-{index}", self.runs[index].name))
        return result

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def loss_against(self, x: str) -> Panel | None:
        """Smoothed training loss and held-out points at the best K against a column of metrics.jsonl, log axes."""
        curves: list[tuple[dict[str, Any], Array, Array]] = []
        points: list[tuple[dict[str, Any], float, float, bool]] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            at, loss = run.series(x, run.training_curve)
            loss = smooth(loss)[at > 0]
            at = at[at > 0]
            if len(at) > 1:
                keep = thin(at, log=True)
                curves.append((look, at[keep], loss[keep]))
            for point in run.evaluations:
                points.append((look, getattr(point, x), point.best_nll, point.phase == "end"))
        points = [point for point in points if point[1] > 0]
        if not curves and not points:
            return None
        figure, axes = self._axes(THIRD)
        for look, at, loss in curves:
            axes.plot(at, loss, alpha=0.75, **{**look, "marker": ""})
        for look, where, nll, end in points:
            face = look["color"] if end else PAPER
            axes.plot([where], [nll], markeredgewidth=1.5, markerfacecolor=face, zorder=3, **{**look, "linestyle": ""})
        xs = [v for _, at, _ in curves for v in (at[0], at[-1])] + [point[1] for point in points]
        ys = [v for _, _, loss in curves for v in (loss.min(), loss.max())] + [point[2] for point in points]
        high = max(xs)
        # The first steps of a long run would take half of a logarithmic axis.
        self._log(axes.xaxis, max(min(xs), high / 3e3), high, pad=1.1)
        if min(ys) > 0:
            self._log(axes.yaxis, min(ys), max(ys))
        axes.set(xlabel=TRAINING_X[x], ylabel="loss (nats/token)")
        return self._finish(figure, f"loss-{x}", f"Loss against {x if x != 'flops' else 'FLOPs'}")

    def column(self, name: str) -> Panel | None:
        """A column of metrics.jsonl over the optimizer steps."""
        title, label, factor = COLUMN_LABELS.get(name, (name, f"{short(name)} (as logged)", 1.0))
        figure, axes = self._axes(SMALL)
        values: list[float] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            steps, y = run.series("step", name)
            if not len(y):
                continue
            y = (y if name in EXACT_COLUMNS else smooth(y)) * factor
            keep = thin(steps, 200)
            last = len(keep) - 1
            axes.plot(steps[keep], y[keep], markevery=[last], **look)
            values += y[keep].tolist()
        if not values:
            return None
        low, high = min(values), max(values)
        self._linear(axes.xaxis)
        if low > 0 and high / low > 30 and name != "lr":
            self._log(axes.yaxis, low, high)
        else:
            self._linear(axes.yaxis)
            if low >= 0:
                axes.set_ylim(0, high * 1.08 or 1.0)
        axes.set(xlabel="optimizer steps (count)", ylabel=label)
        return self._finish(figure, f"column-{''.join(c if c.isalnum() else '-' for c in name)}", title)

    # -----------------------------------------------------------------------------------------------------------------
    # Depth and noise

    def nll_by_k(self, baselines: dict[str, float]) -> Panel:
        """Held-out NLL by K with standard errors, and the baselines as horizontal lines."""
        figure, axes = self._axes()
        for run, look in zip(self.runs, self.looks, strict=True):
            errors = [point.stderr or 0.0 for point in run.depth]
            axes.errorbar(
                [p.k for p in run.depth], [p.nll for p in run.depth], yerr=errors if any(errors) else None,
                capsize=3, elinewidth=1, **look,
            )  # fmt: skip
        for index, (name, nll) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
            axes.axhline(nll, color=MUTED, lw=1, linestyle=(0, (1, 2)))
            left = index % 2 == 0
            axes.annotate(
                f"{short(name)} {nll:.2f}", (0.01 if left else 0.99, nll), xycoords=("axes fraction", "data"),
                xytext=(0, 2), textcoords="offset points", ha="left" if left else "right", va="bottom", color=MUTED,
                gid=f"halo-{index}",
            )  # fmt: skip
        axes.margins(y=0.1)
        self._k_axis(axes)
        self._linear(axes.yaxis)
        axes.set_ylabel("held-out NLL (nats/token)")
        return self._finish(figure, "nll-by-k", "NLL by K")

    def gain_by_k(self) -> Panel:
        """What depth earns: NLL minus the same run's NLL at its smallest K."""
        figure, axes = self._axes()
        for run, look in zip(self.runs, self.looks, strict=True):
            gains = [point.nll - run.depth[0].nll for point in run.depth]
            axes.plot([point.k for point in run.depth], gains, **look)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.margins(y=0.1)
        self._k_axis(axes)
        self._linear(axes.yaxis)
        axes.set_ylabel("NLL − NLL at the smallest K (nats/token)")
        return self._finish(figure, "gain-by-k", "What depth earns")

    def nll_by_inference_flops(self) -> Panel | None:
        """Held-out NLL against the forward FLOPs per token that each K costs."""
        figure, axes = self._axes()
        every: list[float] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            points = [(p.flops_per_token, p.nll) for p in run.depth if p.flops_per_token]
            points.sort()
            every += [flops for flops, _ in points]
            axes.plot([f for f, _ in points], [nll for _, nll in points], **look)
        if not every:
            return None
        axes.margins(y=0.1)
        self._log(axes.xaxis, min(every), max(every), pad=1.2)
        self._linear(axes.yaxis)
        axes.set(xlabel="inference compute (FLOPs/token, one draw)", ylabel="held-out NLL (nats/token)")
        return self._finish(figure, "nll-by-inference-flops", "NLL against inference compute")

    def loss_by_sigma(self) -> Panel | None:
        """Held-out loss by noise level, for the runs that have it."""
        figure, axes = self._axes()
        sigmas: list[float] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            if run.loss_by_sigma:
                at, nll = zip(*run.loss_by_sigma, strict=True)
                sigmas += at
                axes.plot(at, nll, **look)
                if run.sigma_star and min(at) < run.sigma_star < max(at):
                    axes.axvline(run.sigma_star, alpha=0.6, **{**look, "marker": "", "linewidth": 1})
        if not sigmas:
            return None
        axes.margins(y=0.1)
        self._log(axes.xaxis, min(sigmas), max(sigmas), pad=1.15)
        self._linear(axes.yaxis)
        axes.set(xlabel="noise level sigma (standard deviation per component)", ylabel="held-out loss (nats/token)")
        return self._finish(figure, "loss-by-sigma", "Loss by noise level")

    # -----------------------------------------------------------------------------------------------------------------
    # FLOPs

    def flop_split(self, costs: Sequence[dict[str, Cost] | None]) -> Panel:
        """Stacked bars of FLOPs per training token by part: forward plain, backward hatched."""
        shown = [(run, cost) for run, cost in zip(self.runs, costs, strict=True) if cost]
        figure, axes = self._axes((SIZE[0], 66 + 28 * len(shown)))
        widest = max(sum(c.total for c in cost.values()) for _, cost in shown)
        for row, (_, cost) in enumerate(shown):
            left = 0.0
            for backward in (False, True):
                for index, part in enumerate(PARTS):
                    width = cost[part].backward if backward else cost[part].forward
                    if not width:
                        continue
                    axes.barh(row, width, left=left, height=0.62, color=SERIES[index], alpha=0.45, lw=0)
                    axes.barh(
                        row, width, left=left, height=0.62, fill=False, edgecolor=SERIES[index], lw=1,
                        hatch="////" if backward else None,
                    )  # fmt: skip
                    if width / widest > 0.022 * len(part) + 0.02:
                        axes.text(
                            left + width / 2, row, part, ha="center", va="center", fontsize=10,
                            gid=f"halo-{row}-{index}-{backward:d}",
                        )  # fmt: skip
                    left += width
        axes.set_yticks(range(len(shown)), [short(run.name) for run, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, widest * 1.02)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.set_xlabel("training compute (FLOPs/token)")
        used = [part for part in PARTS if any(cost[part].total for _, cost in shown)]
        handles: list[Any] = [Patch(facecolor=SERIES[PARTS.index(p)], alpha=0.6, label=p) for p in used]
        handles.append(Patch(facecolor="none", edgecolor=INK, label="forward"))
        handles.append(Patch(facecolor="none", edgecolor=INK, hatch="////", label="backward"))
        return self._finish(figure, "flop-split", "FLOPs per training token by part", handles)
