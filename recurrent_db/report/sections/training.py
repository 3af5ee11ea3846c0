"""The sections on training: loss, FLOPs to reach a loss, throughput."""

from __future__ import annotations

from recurrent_db.report.comparison import Comparison
from recurrent_db.report.curves import SMOOTHING
from recurrent_db.report.figure import scientific
from recurrent_db.report.flops_to_loss import Reached, choose_levels, reached_at_constant_rate, reached_at_end
from recurrent_db.report.html import note, panels, table, text
from recurrent_db.report.runs import Run

MAX_OWN_PANELS = 9
"""Largest number of an objective's own columns that are drawn."""


def loss(comparison: Comparison) -> str:
    """Training loss and held-out NLL against FLOPs, tokens and seconds."""
    drawn = [p for x in ("flops", "tokens", "seconds") if (p := comparison.plots.loss_against(x))]
    if not drawn:
        return note("Left out: no run has metrics.jsonl with losses.")
    sentences = [
        f"Lines: training loss, smoothed ({SMOOTHING}).",
        "Markers: held-out NLL at the best K. Open markers are evaluations during training; a filled marker is the end "
        "of a complete run, where the learning rate is annealed. Annealing lowers the loss, so compare filled markers "
        "only with filled ones.",
    ]
    mixed = [run.name for run in comparison.runs if run.training_curve == "loss_sigma_max"]
    if mixed:
        sentences.append(
            f"The logged training loss of {text(', '.join(mixed))} averages over noise levels, most of which show part of "
            "the answer, so it is not comparable. The line is the loss at sigma_max, where the model predicts the next "
            "token."
        )
    empty = [run.name for run in comparison.runs if len(run.series("flops", run.training_curve)[0]) < 2 and run.rows]
    if empty:
        sentences.append(f"No training line for {text(', '.join(empty))}: the loss was not logged.")
    return note(" ".join(sentences)) + comparison.legend() + panels(drawn, "grid small")


def flops_to_loss(comparison: Comparison) -> str:
    """Training FLOPs at which each run reached round levels of held-out NLL."""
    levels = choose_levels(comparison.runs)
    if not levels:
        return note("Left out: no run has evaluations at a constant learning rate or at the end of its budget.")

    def cell(reached: Reached | None) -> str:
        if reached is None:
            return "<small>not reached</small>"
        return ("≤ " if reached.at_most else "") + scientific(reached.flops)

    def group(phase: str) -> list[Run]:
        return [run for run in comparison.runs if any(e.phase == phase for e in run.evaluations)]

    rows: list[list[str]] = []
    if constant := group("constant"):
        rows.append(["At the constant (peak) learning rate, interpolated between evaluations"])
        for run in constant:
            rows.append([comparison.label(run), *(cell(reached_at_constant_rate(run.evaluations, v)) for v in levels)])
    if ended := group("end"):
        rows.append(["At the annealed end of a complete run, reached with its FLOPs or fewer"])
        for run in ended:
            cells = [cell(reached_at_end(run.evaluations, level)) for level in levels]
            rows.append([comparison.label(run), *cells])
    caption = (
        "Held-out NLL at the best K. Do not compare the two groups with each other, because annealing the learning rate "
        "lowers the loss by itself. At the constant rate, NLL is interpolated linearly in log FLOPs between neighbouring "
        "evaluations and never extrapolated; “≤” means that the first evaluation was already below the level. The end "
        "of a run counts as one point. Evaluations during warm-up or decay, or at the end of an incomplete run, are not "
        "used."
    )
    unused = [run.name for run in comparison.runs if run not in constant + ended and not run.of_images]
    if unused:
        caption += f" Without any usable evaluation: {text(', '.join(unused))}."
    head = ["Training FLOPs to reach NLL", *(f"{level:g}<small>nats/token</small>" for level in levels)]
    return table(head, rows, caption)


def throughput(comparison: Comparison) -> str:
    """Throughput and other columns that the runs logged at every step."""
    own = dict.fromkeys(name for run in comparison.runs for name in run.own_columns())
    own.pop("loss_sigma_max", None)  # drawn as the training loss
    columns = ["tokens_per_s", "mfu", "hfu", "peak_memory_bytes", "lr", "grad_norm", *list(own)[:MAX_OWN_PANELS]]
    drawn = [p for name in columns if (p := comparison.plots.column(name))]
    if not drawn:
        return note("Left out: no run has metrics.jsonl.")
    sentence = (
        f"Against the optimizer step; smoothed ({SMOOTHING}) except learning rate and memory. The marker is the last "
        "step. MFU is the model FLOPs as a share of the device's peak; HFU also counts recomputed FLOPs. On a CPU the "
        "peak is that of a measured matrix product."
    )
    left_out = list(own)[MAX_OWN_PANELS:]
    more = note(f"Also logged, not drawn: {text(', '.join(left_out))}.") if left_out else ""
    return note(sentence) + comparison.legend() + panels(drawn, "grid small") + more
