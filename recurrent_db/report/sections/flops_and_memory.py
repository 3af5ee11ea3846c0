"""The sections on the cost of the runs: FLOPs and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recurrent_db.accounting.flops import Cost, total
from recurrent_db.report.comparison import Comparison
from recurrent_db.report.cost import HOLDERS, memory_by_holder, training_cost, update_flops_per_token
from recurrent_db.report.figure import scientific
from recurrent_db.report.html import DASH, memory, note, panels, table, text
from recurrent_db.report.runs import Run
from recurrent_db.report.stacked_bars import (
    FLOP_HATCHES,
    HOLDER_HATCHES,
    HOLDER_NAMES,
    PART_COLORS,
    PARTS,
    flop_split,
    legend_box,
    memory_split,
    worth_drawing,
)
from recurrent_db.report.svg import INK, SERIES

FLOP_COUNTS = {
    "Model FLOPs": "forward and backward; attention counts all pairs of positions. Budgets and MFU use this count.",
    "Attention": "share of attention's two products in the model FLOPs. The rest are products with weights.",
    "With the causal half": "model FLOPs if attention counts only the pairs that the causal mask allows.",
    "Recomputed": "forward work that the backward pass repeats: always fused attention's scores, and the core's "
    "iterations with activation checkpointing. The model FLOPs do not include it; HFU counts both.",
    "Optimizer": "clipping, optimizer and weight average, as logged. No other count includes it.",
    "Logged": "FLOPs / tokens of metrics.jsonl, to check the model FLOPs computed here.",
}
"""Columns of the second FLOP table, each with its explanation."""


def _legend(items: list[tuple[str, str]]) -> str:
    """An HTML legend from pairs (SVG, text)."""
    return f'<ul class="legend">{"".join(f"<li>{svg}{words}</li>" for svg, words in items)}</ul>'


def flops(comparison: Comparison) -> str:
    """FLOPs of a training token, by part and direction."""
    shown = [(run, training_cost(run)) for run in comparison.runs if run.sized]
    if not shown:
        return note("Left out: no run has a vocabulary or an image size.")
    drawn = any(worth_drawing(cost) for _, cost in shown)
    used = [part for part in PARTS if any(cost[part].total for _, cost in shown)]
    boxes = [(legend_box(f"part-{part}", PART_COLORS[part]), part) for part in used]
    looks = {"forward": "plain", "backward": "hatched", "recomputed": "dotted"}
    boxes += [
        (legend_box(f"kind-{kind}", INK, hatch), f"{looks[kind]}: {kind}")
        for kind, hatch in FLOP_HATCHES.items()
        if kind != "recomputed" or drawn
    ]
    sentence = (
        "Mean over the run's steps, computed from the shapes and from how often each step ran each part. Matrix products "
        "and attention are counted; a multiply-add counts as two. Iterations without gradient have no backward pass. A "
        "language model's embedding is a lookup and costs nothing. The parts of a bar are in the order of the legend."
    )
    if not drawn:
        sentence += " Recomputation is below 1% in every run and is not drawn."
    counts = "".join(f"<dt>{name}</dt><dd>{line}</dd>" for name, line in FLOP_COUNTS.items())
    return (
        note(sentence) + _legend(boxes) + panels([flop_split(comparison.plots, shown)], "wide")
        + _flop_counts(comparison, shown) + f'<dl class="note">{counts}</dl>' + _flops_by_part(comparison, shown, used)
    )  # fmt: skip


def _flops_by_part(comparison: Comparison, shown: Sequence[tuple[Run, Mapping[str, Cost]]], used: list[str]) -> str:
    """All numbers of the bars, in a list that is closed at first if there are more than three runs."""
    kinds = {"forward": "forward", "backward_input": "backward, inputs", "backward_weight": "backward, weights"}
    rows = []
    for run, cost in shown:
        whole = total(cost)
        rows.append([comparison.label(run)])
        for kind, name in {**kinds, "recomputed": "recomputed"}.items():
            cells = [scientific(v) if (v := getattr(cost[part], kind)) else DASH for part in used]
            rows.append([name, *cells, scientific(getattr(whole, kind))])
            if kind == "backward_weight":
                shares = [f"{v / whole.total:.1%}" if (v := cost[part].total) else DASH for part in used]
                rows.append(["share of the total", *shares, "100%"])
    inner = table(["FLOPs/token", *(part.capitalize() for part in used), "Total"], rows)
    caption = note("Backward: gradients of the inputs, and gradients of the weights. The total excludes recomputation.")
    opened = " open" if len(shown) <= 3 else ""
    return f"<details{opened}><summary>By part of the model</summary>{inner}{caption}</details>"


def _flop_counts(comparison: Comparison, shown: Sequence[tuple[Run, Mapping[str, Cost]]]) -> str:
    """The total FLOPs, counted in several ways."""
    rows = []
    for run, cost in shown:
        whole, update = total(cost), update_flops_per_token(run)
        logged, tokens = run.last("flops"), run.last("tokens")
        rows.append(
            [
                comparison.label(run),
                scientific(whole.total),
                f"{whole.attention / whole.total:.1%}",
                scientific(whole.causal),
                f"{scientific(whole.recomputed)}<small>+ {whole.recomputed / whole.total:.1%}</small>",
                scientific(update) if update is not None else DASH,
                scientific(logged / tokens) if logged and tokens else DASH,
            ]
        )
    return table(["FLOPs/token", *FLOP_COUNTS], rows)


def memory_held(comparison: Comparison) -> str:
    """Memory by holder, beside the measured peak."""
    shown = [(run, split, run.most("peak_memory_bytes")) for run in comparison.runs if (split := memory_by_holder(run))]
    if not shown:
        return note("Left out: no run has metrics.jsonl with memory by holder.")
    boxes = [
        (legend_box(f"holder-{holder}", SERIES[index], HOLDER_HATCHES[holder]), HOLDER_NAMES[holder])
        for index, holder in enumerate(HOLDERS)
    ]
    boxes.append(('<span aria-hidden="true">◆</span>', "measured peak"))
    sentence = (
        "Activations: the most memory that the forward pass of a micro-batch kept for its backward pass, over all steps. "
        "Gradients are as large as their parameters. The peak also includes temporary memory of single operations and, "
        "on a CPU, the whole process with its libraries. A peak far beyond the bars is an arrow (▶) at the end of the "
        "axis."
    )
    rows = []
    for run, split, peak in shown:
        cells = [memory(split[holder]) if split[holder] else DASH for holder in HOLDERS]
        rows.append([comparison.label(run), *cells, memory(sum(split.values())), memory(peak)])
    head = ["Run", *(HOLDER_NAMES[holder].capitalize() for holder in HOLDERS), "Sum", "Measured<br>peak"]
    missing = [run.name for run in comparison.runs if run not in [r for r, _, _ in shown]]
    caption = f"Not logged by {text(', '.join(missing))}." if missing else ""
    return (
        note(sentence)
        + _legend(boxes)
        + panels([memory_split(comparison.plots, shown)], "wide")
        + table(head, rows, caption)
    )
