"""`Comparison`: the runs of a report with their plots, labels and legends, the input of every section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurrent_db.report.html import text
from recurrent_db.report.line_plots import LinePlots
from recurrent_db.report.runs import Run


class Comparison:
    """Runs, baselines (NLL in nats per token, by name), plots and labels.

    A run keeps its position, colour and marker in all sections. ``png_dir`` is a folder for the plots as PNG, or None.
    """

    def __init__(self, runs: Sequence[Run], baselines: dict[str, float], png_dir: Path | None = None) -> None:
        self.runs, self.baselines, self.plots = runs, baselines, LinePlots(runs, png_dir)
        self._swatches = self.plots.swatches()

    def label(self, run: Run) -> str:
        """A run's name with its line and marker, as HTML."""
        return f'<span class="run">{self._swatch(self.runs.index(run))}<span>{text(run.name)}</span></span>'

    def legend(self, only: Sequence[Run] | None = None) -> str:
        """The legend of ``only`` these runs, or of all. It is repeated above every group of plots."""
        shown = self.runs if only is None else only
        items = (f"<li>{self._swatch(i)}{text(run.name)}</li>" for i, run in enumerate(self.runs) if run in shown)
        return f'<ul class="legend">{"".join(items)}</ul>'

    def _swatch(self, index: int) -> str:
        return f'<svg class="swatch" viewBox="0 0 38 14" aria-hidden="true"><use href="#look-{index}"/></svg>'

    def definitions(self) -> str:
        """SVG symbols of the runs' lines and markers. They are drawn once; labels and legends refer to them."""
        symbols = []
        for index, svg in enumerate(self._swatches):
            inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
            symbols.append(f'<symbol id="look-{index}" viewBox="0 0 38 14">{inner}</symbol>')
        return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true">{"".join(symbols)}</svg>'

    def score_sources(self) -> str:
        """The sources of the runs' NLL by K. Names the runs only if their sources differ."""
        names: dict[str, list[str]] = {}
        for run in self.runs:
            if run.depth_source:
                names.setdefault(run.depth_source, []).append(run.name)
        if len(names) == 1:
            return text(next(iter(names)))
        return "; ".join(f"{text(', '.join(having))}: {text(source)}" for source, having in names.items())
