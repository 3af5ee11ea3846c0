"""`recurrent-db report RUN... -o report.html`: one self-contained page that compares training runs.

data.py    a run directory -> `Run`: metrics, evaluations with their learning-rate phase, optional results
reach.py   FLOPs to reach a held-out NLL, without mixing annealed and unannealed losses
cost.py    what a run cost: FLOPs per token by part, bytes by holder, energy
svg.py     a matplotlib figure -> an inline SVG that follows the page's colours
figure.py  the frame of the figures: a run's look, axes, ticks, legends
plots.py   the figures with lines
bars.py    the figures with stacked bars
blocks.py  the section on blocks that train alone
machine.py the sections on FLOPs, memory and throughput
page.py    the other sections, their order and the HTML around them
style.py   the page's style sheet
"""

from __future__ import annotations

from pathlib import Path

from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic


def write_report(
    runs: list[Path], output: Path, baselines: dict[str, float] | None = None, png_dir: Path | None = None
) -> None:
    """Write the report of ``runs`` to ``output``. The same runs give the same bytes.

    Args:
        baselines: reference models by name, in nats per token; they win over a ``baselines.json`` beside a run.
        png_dir: folder for the plots as PNG files; None writes none.

    Raises:
        UserError: no run is given, or a directory is no run (it has no readable ``config.json``).
    """
    from recurrent_db.report.data import merge_baselines, read_runs  # matplotlib loads slowly, and only here
    from recurrent_db.report.page import build_page

    if not runs:
        raise UserError("no run directory is given")
    check_output(output)
    loaded = read_runs(runs)
    page = build_page(loaded, merge_baselines(runs, baselines), png_dir)
    write_atomic(output, page)
