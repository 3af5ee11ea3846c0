"""The section on runs that were trained on images: accuracy by steps and by block, samples and their distance."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from recurrent_db.report.comparison import Comparison
from recurrent_db.report.figure import scientific
from recurrent_db.report.html import DASH, fixed, note, table, text
from recurrent_db.report.runs import Run, number


def images(comparison: Comparison) -> str:
    """The scores of each run of images; empty if there is none."""
    classifiers, generators = (
        [run for run in comparison.runs if run.config.model.network == network] for network in ("vit", "dit")
    )
    if not classifiers and not generators:
        return ""
    return (_accuracy(comparison, classifiers) if classifiers else "") + (
        _distances(comparison, generators) + _pictures(comparison, generators) if generators else ""
    )


def _cells(score: dict[str, Any], name: str, digits: int) -> str:
    """A value with its standard error."""
    value, error = number(score.get(name)), number(score.get(f"{name}_stderr"))
    return fixed(value, digits) + (f"<small>± {fixed(error, digits)}</small>" if error is not None else "")


def _table_of(result: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    found = result.get(key)
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _during_training(run: Run) -> dict[str, dict[str, Any]]:
    """Scores by steps in the last evaluation during training."""
    by_steps: dict[str, dict[str, Any]] = {}
    row: dict[str, Any] = next(
        (row for row in reversed(run.rows) if any(name.startswith("eval/accuracy_k") for name in row)), {}
    )
    for name, value in row.items():
        kind, _, steps = name.removeprefix("eval/").rpartition("_k")
        if kind in ("accuracy", "nll") and steps.isdecimal():
            by_steps.setdefault(steps, {})[kind] = value
    return by_steps


def _accuracy(comparison: Comparison, runs: Sequence[Run]) -> str:
    rows: list[list[str]] = []
    for run in runs:
        by_steps, by_block = _table_of(run.images, "by_steps"), _table_of(run.images, "by_block")
        facts = ", ".join(
            f"{run.images[key]} {what}" for key, what in (("split", "split"), ("images", "images"), ("draws", "draws"))
            if key in run.images
        )  # fmt: skip
        source = f"eval/images.json: {facts}"
        if not by_steps:
            by_steps, by_block, source = _during_training(run), {}, "the last evaluation during training"
        if by_steps:
            rows.append([f"{comparison.label(run)}<small>{text(source)}</small>"])
        for what, scores in (("steps: {}", by_steps), ("read-out of block {}", by_block)):
            for key, score in scores.items():
                flops = number(score.get("flops_per_image"))
                cost = scientific(flops) if flops is not None else DASH
                rows.append([text(what.format(key)), _cells(score, "accuracy", 4), _cells(score, "nll", 3), cost])
    if not rows:
        return note("Accuracy left out: no run has eval/images.json or evaluations in metrics.jsonl.")
    caption = (
        "Steps: number of steps of the walk; a network without blocks has one. Read-out of a block: what the block names in "
        "the walk where each block makes one step. ± is the standard error over images. FLOPs are those of one draw."
    )
    return table(["Walk", "Accuracy", "NLL<br>(nats/image)", "FLOPs/image"], rows, caption)


def _distances(comparison: Comparison, runs: Sequence[Run]) -> str:
    rows: list[list[str]] = []
    compared: set[tuple[Any, ...]] = set()
    for run in runs:
        result, distance, floor = run.images, run.images.get("distance"), run.images.get("floor")
        if not isinstance(distance, dict) or not isinstance(floor, dict):
            continue
        compared.add((str(distance.get("samples")), str(distance.get("real"))))
        flops = number(result.get("flops_per_image"))
        rows.append(
            [
                comparison.label(run),
                fixed(number(distance.get("frechet")), 4),
                fixed(number(floor.get("frechet")), 4),
                f"{fixed(number(distance.get('kid')), 5)}<small>± {fixed(number(distance.get('kid_std')), 5)}</small>",
                fixed(number(floor.get("kid")), 5),
                text(distance.get("samples", DASH)),
                f"{text(distance.get('real', DASH))}<small>{text(result.get('split', DASH))}</small>",
                f"{text(result.get('guidance', DASH))}",
                f"{text(result.get('sampler_steps', DASH))}<small>{text(result.get('sampler', DASH))}</small>",
                scientific(flops) if flops is not None else DASH,
                f"<code>{text(str(distance.get('extractor', DASH))[:12])}</code>",
            ]
        )
    if not rows:
        return note("Distances left out: no run has eval/images.json with samples scored under an extractor.")
    head = ["Run", "Fréchet<br>distance", "Floor", "KID", "Floor", "Samples", "Real<br>images", "Guidance", "Steps",
            "FLOPs/<br>sample", "Extractor"]  # fmt: skip
    warning = ""
    if len(compared) > 1:
        warning = (
            "<p><strong>Warning:</strong> the runs were scored with different numbers of images: their distances are not "
            "comparable.</p>"
        )
    caption = (
        "Distances between samples and real images, in the features of our own extractor, which its hash names. Lower is "
        "better. The floor is the distance of as many real training images. Published values use other features and are not "
        "comparable."
    )
    return warning + table(head, rows, caption)


def _pictures(comparison: Comparison, runs: Sequence[Run]) -> str:
    having = [run for run in runs if run.picture]
    if not having:
        return note("Pictures left out: no run has eval/images.png.")
    figures = []
    for run in having:
        names = run.images.get("classes")
        order = f" Rows: {', '.join(map(str, names))}." if isinstance(names, list) and len(names) <= 20 else ""
        data = b64encode(run.picture).decode()
        figures.append(
            f'<figure><figcaption>{comparison.label(run)}</figcaption><img alt="Samples of {text(run.name)}" '
            f'src="data:image/png;base64,{data}">{note(text(order)) if order else ""}</figure>'
        )
    return f'<div class="grid">{"".join(figures)}</div>' + note("Samples without selection, one row for each class.")
