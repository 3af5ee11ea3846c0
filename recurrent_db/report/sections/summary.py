"""The summary section: one row per run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recurrent_db.report.comparison import Comparison
from recurrent_db.report.cost import energy
from recurrent_db.report.figure import scientific
from recurrent_db.report.html import DASH, count, duration, fixed, joules, memory, note, table, text
from recurrent_db.report.runs import Run


def summary(comparison: Comparison) -> str:
    """One row for each run, the baselines below, and warnings where runs are not comparable."""
    best = {run.name: min(run.depth, key=lambda point: point.nll) for run in comparison.runs if run.depth}
    lowest = min((point.nll for point in best.values()), default=None)
    energies = [energy(run) for run in comparison.runs]
    metered = any(energies)
    rows = []
    for run, used in zip(comparison.runs, energies, strict=True):
        counts, point = run.parameters(), best.get(run.name)
        parameters = count(counts["total"]) if counts else DASH
        if counts and counts["noise_conditioning"]:
            parameters += f"<small>+ {count(counts['noise_conditioning'])} cond.</small>"
        nll = fixed(point.nll if point else None)
        if point and point.nll == lowest and len(comparison.runs) > 1:
            nll = f"<strong>{nll}</strong>"
        if point and point.stderr is not None:
            nll += f"<small>± {point.stderr:.3f}</small>"
        bits = fixed(point.bits_per_byte if point else None)
        if point is None and (bound := run.last("eval/elbo")) is not None:
            nll = f"≤ {fixed(bound)}<small>± {fixed(run.last('eval/elbo_stderr'))}</small>"
            bits = f"≤ {fixed(run.last('eval/bits_per_character'))}<small>per character</small>"
        flops, skipped = run.last("flops"), run.last("skipped")
        steps = count(run.last("step")) + (f"<small>{skipped:,.0f} skipped</small>" if skipped else "")
        status = "" if run.complete else f"<small>{_status(run)}</small>"
        rows.append(
            [
                comparison.label(run) + status,
                text(run.config.objective.name),
                parameters,
                count(run.last("tokens")),
                steps,
                scientific(flops) if flops is not None else DASH,
                nll,
                str(point.k) if point else DASH,
                bits,
                duration(run.last("seconds")),
                memory(run.most("peak_memory_bytes")),
            ]
        )
        if metered:
            per_token = f"<small>{joules(used.per_token)}</small>" if used else ""
            rows[-1].append(f"{joules(used.joules)}{per_token}" if used else DASH)
    for name, nll_value in sorted(comparison.baselines.items(), key=lambda item: item[1]):
        rows.append([text(name), "baseline", *[DASH] * 4, fixed(nll_value), *[DASH] * (5 if metered else 4)])
    head = ["Run", "Objective", "Parameters", "Training<br>tokens", "Steps", "Training<br>FLOPs",
            "Held-out NLL<br>(nats/token)", "at K", "Bits/<br>byte", "Training<br>time", "Peak<br>memory"]  # fmt: skip
    if metered:
        head.append("Energy<br>(per token)")
    how = (
        "<p>Lower held-out NLL (negative log-likelihood) and fewer bits per byte are better. "
        "<code>next_token</code> is the flat control: a looped objective is worth its cost only if it beats that control "
        "at equal FLOPs.</p>"
    )
    caption = "NLL is the lowest over all scored K, ± its standard error over sequences. "
    if any(run.last("eval/elbo") is not None for run in comparison.runs):
        caption += "≤: upper bound of masked diffusion. "
    caption += "“cond.”: additional parameters for the noise conditioning."
    if metered:
        caption += " Energy is of the whole GPU during training, in total and per trained token."
    if any(run.of_images for run in comparison.runs):
        caption += " A run of images counts positions as tokens: patches, and in a ViT also the token of the class."
    if sources := comparison.score_sources():
        caption += f" Scores are from {sources}."
    warnings = "".join(f"<p><strong>Warning:</strong> {text(w)}</p>" for w in _differences(comparison.runs))
    damaged = [f"{run.name}: {n}" for run in comparison.runs for n in run.notes]
    return how + warnings + table(head, rows, caption) + "".join(note(text(line)) for line in damaged)


def _status(run: Run) -> str:
    if run.progress is None:
        return "no metrics" if not run.rows else "no budget"
    return f"incomplete: {run.progress:.0%} of the budget"


def _differences(runs: Sequence[Run]) -> list[str]:
    """Sentences on why the runs' numbers are not comparable."""
    texts, pictures = [run for run in runs if not run.of_images], [run for run in runs if run.of_images]
    result = (
        ["some runs are of text and some of images: their losses are not comparable."] if texts and pictures else []
    )

    def differ(values: Iterable[object]) -> bool:
        return len(set(values)) > 1

    if differ(run.config.model.vocab_size for run in texts):
        result.append("the runs have different vocabularies: compare bits per byte, not nats per token.")
    if differ(run.config.data.val_path or run.config.data.path for run in texts):
        result.append(
            "the runs name different data: their losses are comparable only if the held-out text is the same."
        )
    if differ(run.config.data.val_path or run.config.data.path for run in pictures):
        result.append(
            "the runs name different images: their scores are comparable only if the held-out images are the same."
        )
    if differ(run.config.data.sequence_length for run in texts):
        result.append("the runs were scored with different context lengths; longer contexts give a lower NLL.")
    if differ(run.depth_tokens for run in runs if run.depth):
        result.append("the runs were scored on different amounts of held-out text.")
    return result
