"""Shared parts of all figures: each run's line style, axes with ticks, output as SVG and PNG."""

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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from recurrent_db.report.runs import Run
from recurrent_db.report.svg import PAPER, SERIES, STYLE, inline_svg

DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.6)), (0, (7, 2, 1.5, 2)), (0, (7, 2, 1.5, 2, 1.5, 2)))
MARKERS = "osD^vPX<>phd"
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

SIZE, THIRD, SMALL = (370, 255), (350, 300), (340, 215)
"""Width and height of a panel in view box units, which are close to CSS pixels on the page."""


@dataclass
class Panel:
    """A drawn figure with its title."""

    title: str
    svg: str


def scientific(value: float, digits: int = 2) -> str:
    """Format a number: 1234567.0 -> ``1.23 × 10⁶``. Numbers from 0.01 to 9999 have no power of ten."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits + 1}g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def tick(value: float, _position: object = None) -> str:
    """Label of an axis tick: a plain number if it is short, else with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    mantissa = mantissa.removesuffix(".0")
    return power if mantissa == "1" else f"{mantissa}×{power}"


def linear_tick(value: float, position: object = None) -> str:
    """Label of a tick on a linear axis. Thousands have a comma, so that 7,500 and 10,000 match."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else tick(value, position)


def memory_unit(most: float) -> tuple[str, float]:
    """A unit that suits ``most`` bytes, and the factor from bytes to that unit."""
    return ("GiB", 2.0**-30) if most >= 2**30 else ("MiB", 2.0**-20)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, 1-2-5 or 1-3 steps, or evenly spaced ticks for a short range."""
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
    """Shorten a name to ``most`` characters. Keeps its end, because run names differ more often there."""
    return name if len(name) <= most else "…" + name[-most + 1 :]


@contextmanager
def drawing() -> Iterator[None]:
    """Context with the matplotlib settings for making and saving figures."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


class Frame:
    """Draws figures in which each run keeps its style. A figure's key is its id in the page and the PNG's file name."""

    def __init__(self, runs: Sequence[Run], png_dir: Path | None = None) -> None:
        self.runs = runs
        self.png_dir = png_dir
        self.looks: list[dict[str, Any]] = [
            {
                "color": SERIES[i % len(SERIES)],
                "linestyle": DASHES[i % len(DASHES)],
                "marker": MARKERS[i % len(MARKERS)],
                # Later lines are thinner and on top, so that curves that coincide stay visible.
                "linewidth": 2.4 - i / max(len(runs) - 1, 1),
                "markersize": 7.0 - 2 * i / max(len(runs) - 1, 1),
            }
            for i in range(len(runs))
        ]

    def axes(self, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
        """A new figure of ``size`` view box units with one pair of axes."""
        layout = ConstrainedLayoutEngine(w_pad=4 / 72, h_pad=4 / 72)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout=layout)
        return figure, figure.subplots()

    def finish(self, figure: Figure, key: str, title: str, handles: list[Any] | None = None) -> Panel:
        """Turn the figure into a panel. If PNGs are wanted, save one with a title, a white background and a legend."""
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

    def log_axis(self, axis: Any, low: float, high: float, pad: float = 1.05) -> None:
        """Make an axis logarithmic, from ``low / pad`` to ``high * pad``."""
        axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low / pad, high * pad)})
        axis.set_major_locator(FixedLocator(log_ticks(low / pad, high * pad)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(tick))

    def linear_axis(self, axis: Any) -> None:
        """Give a linear axis about five round ticks."""
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(linear_tick))

    def swatches(self) -> list[str]:
        """One small SVG per run with its line and marker, for legends."""
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
