"""The page: its sections in reading order, and the HTML around them.

All values from a run (names, configuration, samples, task names) are escaped by `html.text`. A section whose files are
missing keeps its heading and says which file is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.report.comparison import Comparison
from recurrent_db.report.figure import drawing, short
from recurrent_db.report.html import text
from recurrent_db.report.runs import Run, merge_baselines, read_runs
from recurrent_db.report.sections import blocks, flops_and_memory, images, inference, results, summary, training
from recurrent_db.report.style import CSS

SECTIONS = (
    ("summary", "Summary", summary.summary),
    ("images", "Images", images.images),
    ("loss", "Loss during training", training.loss),
    ("depth", "NLL by number of iterations K", inference.nll_by_k),
    ("state", "State norm by iteration", inference.state_by_iteration),
    ("inference", "NLL against inference compute", inference.nll_by_flops),
    ("sigma", "Loss by noise level", inference.loss_by_sigma),
    ("flops", "FLOPs by part of the model", flops_and_memory.flops),
    ("memory", "Memory", flops_and_memory.memory_held),
    ("blocks", "Blocks trained separately", blocks.blocks),
    ("throughput", "Throughput and optimisation", training.throughput),
    ("flops-to-loss", "FLOPs to reach a loss", training.flops_to_loss),
    ("lm-eval", "Benchmarks (lm-eval)", results.lm_eval),
    ("samples", "Samples", results.samples),
    ("provenance", "Commands, configurations and environments", results.provenance),
)
"""Anchor, title and function of each section. A section whose function returns an empty string is left out."""

TEXT_SECTIONS = frozenset({"depth", "state", "inference", "sigma", "flops-to-loss", "lm-eval", "samples"})
"""Sections on language models only. They are left out if all runs are of images."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: the browser runs no script and loads nothing, whatever text the runs contain."""


def build_page(runs: Sequence[Run], baselines: dict[str, float], png_dir: Path | None = None) -> str:
    """The whole page as HTML, without scripts or external files. Also writes the plots as PNG to ``png_dir`` if given."""
    with drawing():
        comparison = Comparison(runs, baselines, png_dir)
        of_images = all(run.of_images for run in runs)
        wanted = [section for section in SECTIONS if not of_images or section[0] not in TEXT_SECTIONS]
        built = ((key, title, build(comparison)) for key, title, build in wanted)
        sections = [section for section in built if section[2]]
        definitions = comparison.definitions()
    names = ", ".join(short(run.name, 40) for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    nav = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n{html}\n</section>'
        for key, title, html in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(names)} – training report</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
{definitions}
<header>
<h1>Training report</h1>
<p class="note">{len(runs)} {"run" if len(runs) == 1 else "runs"}: {text(names)}.</p>
<nav aria-label="Sections">{nav}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def write_report(
    runs: list[Path], output: Path, baselines: dict[str, float] | None = None, png_dir: Path | None = None
) -> None:
    """Write the report of ``runs`` to ``output``. The same runs give the same bytes.

    Args:
        runs: run directories.
        output: HTML file.
        baselines: NLL of reference models by name, in nats per token. They take precedence over ``baselines.json``.
        png_dir: folder for the plots as PNG files; None writes none.

    Raises:
        UserError: no run is given, or a directory is not a run (it has no readable ``config.json``).
    """
    if not runs:
        raise UserError("no run directory is given")
    check_output(output)
    page = build_page(read_runs(runs), merge_baselines(runs, baselines), png_dir)
    write_atomic(output, page)
