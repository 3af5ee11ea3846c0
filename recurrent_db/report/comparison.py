"""The runs that a report compares, as its sections get them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurrent_db.report.html import text
from recurrent_db.report.line_plots import LinePlots
from recurrent_db.report.runs import Run


class Comparison:
    """Runs, baselines (nats per token by name), plots, and the labels that tell runs apart.

    A run keeps its place, its colour and its marker in all sections. PNGs of the plots go to ``png_dir`` if it is given.
    """

    def __init__(self, runs: Sequence[Run], baselines: dict[str, float], png_dir: Path | None = None) -> None:
        self.runs, self.baselines, self.plots = runs, baselines, LinePlots(runs, png_dir)
        self._swatches = self.plots.swatches()

    def label(self, run: Run) -> str:
        """A run's name beside its line and marker."""
        return f'<span class="run">{self._swatch(self.runs.index(run))}<span>{text(run.name)}</span></span>'

    def legend(self, only: Sequence[Run] | None = None) -> str:
        """Which line is whose. It stands above every group of plots, so that nobody has to scroll back."""
        shown = self.runs if only is None else only
        items = (f"<li>{self._swatch(i)}{text(run.name)}</li>" for i, run in enumerate(self.runs) if run in shown)
        return f'<ul class="legend">{"".join(items)}</ul>'

    def _swatch(self, index: int) -> str:
        return f'<svg class="swatch" viewBox="0 0 38 14" aria-hidden="true"><use href="#look-{index}"/></svg>'

    def definitions(self) -> str:
        """The runs' lines and markers. The page draws them once; labels and legends refer to them."""
        symbols = []
        for index, svg in enumerate(self._swatches):
            inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
            symbols.append(f'<symbol id="look-{index}" viewBox="0 0 38 14">{inner}</symbol>')
        return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true">{"".join(symbols)}</svg>'

    def score_sources(self) -> str:
        """Which file the runs' NLL by K comes from; runs are named only where they differ."""
        names: dict[str, list[str]] = {}
        for run in self.runs:
            if run.depth_source:
                names.setdefault(run.depth_source, []).append(run.name)
        if len(names) == 1:
            return text(next(iter(names)))
        return "; ".join(f"{text(', '.join(having))}: {text(source)}" for source, having in names.items())
