"""The sections on inference: NLL by K, size of the state, NLL against compute, loss by noise level."""

from __future__ import annotations

from recurrent_db.report.comparison import Comparison
from recurrent_db.report.html import note, panels, text


def nll_by_k(comparison: Comparison) -> str:
    """Held-out NLL by K, and its change from the smallest K."""
    if not any(run.depth for run in comparison.runs):
        return note("Left out: no run has eval/depth_curve.json or evaluations in metrics.jsonl.")
    sentence = (
        "The same weights, scored with different numbers of core iterations. Error bars are one standard error over "
        "sequences, if known. The right plot has none: all K are scored on the same text, so their difference is far "
        "more certain than each value. A curve that stays at zero gains nothing from more iterations."
    )
    ks = {point.k for run in comparison.runs for point in run.depth}
    drawn = [comparison.plots.nll_by_k(comparison.baselines), comparison.plots.gain_by_k() if len(ks) > 1 else None]
    having = [run for run in comparison.runs if run.depth]
    return note(sentence) + comparison.legend(having) + panels(drawn) + note(f"Source: {comparison.score_sources()}.")


def state_by_iteration(comparison: Comparison) -> str:
    """Size of the state after each core pass."""
    drawn = comparison.plots.state_by_iteration()
    if drawn is None:
        return note("Left out: no run has eval/depth_curve.json with state_rms_by_iteration.")
    having = [run for run in comparison.runs if run.state_rms]
    sentence = (
        "Size of the state after each core pass, in a run of the largest K that was scored: root mean square over "
        "components, positions and a few held-out sequences. A flat line means that the size has settled; a rising or "
        "falling line means that it has not."
    )
    walks = [run.name for run in having if run.state_is == "estimate"]
    if walks:
        sentence += (
            f" For a denoiser ({text(', '.join(walks))}) it is the size of the estimate of the clean target, in the "
            "target's units, at each noise level from sigma_max down."
        )
    return note(sentence) + comparison.legend(having) + panels([drawn], "wide")


def nll_by_flops(comparison: Comparison) -> str:
    """Held-out NLL against inference FLOPs per token."""
    drawn = comparison.plots.nll_by_inference_flops() if any(run.depth for run in comparison.runs) else None
    if drawn is None:
        return note("Left out: no run has scores with FLOPs per token.")
    sentence = (
        "The cost of a better prediction at inference. Each point is one K, the lowest K on the left. The FLOPs are the "
        "forward FLOPs to score one token with one draw; averaging M noise draws costs M times as much."
    )
    having = [run for run in comparison.runs if run.depth]
    return note(sentence) + comparison.legend(having) + panels([drawn], "wide")


def loss_by_sigma(comparison: Comparison) -> str:
    """A denoiser's held-out loss by noise level."""
    drawn = comparison.plots.loss_by_sigma()
    if drawn is None:
        return note("Left out: no run has eval/denoiser_report.json with nll_by_sigma.")
    sentence = (
        "Held-out loss of a denoiser by noise level. At low noise, on the left, the answer is visible and any model has "
        "a low loss. Only the right end, sigma_max, is a next-token loss."
    )
    stars = [f"{text(run.name)} {run.sigma_star:.3g}" for run in comparison.runs if run.sigma_star]
    if stars:
        sentence += (
            " Vertical lines: sigma*. Below it the nearest embedding is usually the answer ("
            + ", ".join(stars) + ")."
        )  # fmt: skip
    legend = comparison.legend([run for run in comparison.runs if run.loss_by_sigma])
    return note(sentence) + legend + panels([drawn], "wide")
