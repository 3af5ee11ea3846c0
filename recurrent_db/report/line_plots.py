"""Figures with lines. A run keeps its colour, dash pattern and marker in all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from recurrent_db.report.curves import Array, smooth, thin
from recurrent_db.report.figure import SMALL, THIRD, Frame, Panel, linear_tick, memory_unit, short, tick
from recurrent_db.report.svg import MUTED, PAPER

TRAINING_X = {
    "flops": "training compute (FLOPs)",
    "tokens": "training data (tokens)",
    "seconds": "training time (seconds, without evaluation)",
}
COLUMN_LABELS = {
    "tokens_per_s": ("Throughput", "tokens per second", 1.0),
    "mfu": ("Utilisation by the model (MFU)", "share of peak FLOPs/s (%)", 100.0),
    "hfu": ("Utilisation with recomputation (HFU)", "share of peak FLOPs/s (%)", 100.0),
    "lr": ("Learning rate", "learning rate (per step)", 1.0),
    "grad_norm": ("Gradient norm, before clipping", "L2 norm (nats/weight)", 1.0),
    "state_rms": ("Size of the final state", "RMS (units of the state)", 1.0),
    "depth": ("Depth of the training step", "K (core iterations)", 1.0),
    "loss_sigma_max": ("Training loss at sigma_max", "loss (nats/token)", 1.0),
}
"""Title, axis label with unit, and factor of columns of metrics.jsonl. Other columns are labelled with their names."""

EXACT_COLUMNS = frozenset({"lr", "peak_memory_bytes"})
"""Columns that are drawn as logged. All others are smoothed."""


class LinePlots(Frame):
    """Draws the line plots of a report."""

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def loss_against(self, x: str) -> Panel | None:
        """Smoothed training loss, and held-out NLL at the best K, against a column of metrics.jsonl. Both axes are log."""
        curves: list[tuple[dict[str, Any], Array, Array]] = []
        points: list[tuple[dict[str, Any], float, float, bool]] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            at, loss = run.series(x, run.training_curve)
            loss = smooth(loss)[at > 0]
            at = at[at > 0]
            if len(at) > 1:
                keep = thin(at, log=True)
                curves.append((look, at[keep], loss[keep]))
            for point in run.evaluations:
                points.append((look, getattr(point, x), point.best_nll, point.phase == "end"))
        points = [point for point in points if point[1] > 0]
        if not curves and not points:
            return None
        figure, axes = self.axes(THIRD)
        for look, at, loss in curves:
            axes.plot(at, loss, alpha=0.75, **{**look, "marker": ""})
        for look, where, nll, end in points:
            face = look["color"] if end else PAPER
            axes.plot([where], [nll], markeredgewidth=1.5, markerfacecolor=face, zorder=3, **{**look, "linestyle": ""})
        xs = [v for _, at, _ in curves for v in (at[0], at[-1])] + [point[1] for point in points]
        ys = [v for _, _, loss in curves for v in (loss.min(), loss.max())] + [point[2] for point in points]
        high = max(xs)
        # Without a limit, the first steps of a long run would take half of a logarithmic axis.
        self.log_axis(axes.xaxis, max(min(xs), high / 3e3), high, pad=1.1)
        if min(ys) > 0:
            self.log_axis(axes.yaxis, min(ys), max(ys))
        units = {run.loss_unit for run in self.runs}
        axes.set(xlabel=TRAINING_X[x], ylabel=f"loss ({units.pop() if len(units) == 1 else 'own units'})")
        return self.finish(figure, f"loss-{x}", f"Loss against {x if x != 'flops' else 'FLOPs'}")

    def column(self, name: str) -> Panel | None:
        """A column of metrics.jsonl against the optimizer step."""
        title, label, factor = COLUMN_LABELS.get(name, (name, f"{short(name)} (as logged)", 1.0))
        if name == "peak_memory_bytes":
            unit, factor = memory_unit(max((run.most(name) or 0.0 for run in self.runs), default=0.0))
            title, label = "Peak memory", f"memory ({unit})"
        figure, axes = self.axes(SMALL)
        values: list[float] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            steps, y = run.series("step", name)
            if not len(y):
                continue
            y = (y if name in EXACT_COLUMNS else smooth(y)) * factor
            keep = thin(steps, 200)
            last = len(keep) - 1
            axes.plot(steps[keep], y[keep], markevery=[last], **look)
            values += y[keep].tolist()
        if not values:
            return None
        low, high = min(values), max(values)
        self.linear_axis(axes.xaxis)
        if low > 0 and high / low > 30 and name != "lr":
            self.log_axis(axes.yaxis, low, high)
        else:
            self.linear_axis(axes.yaxis)
            if low >= 0:
                axes.set_ylim(0, high * 1.08 or 1.0)
        axes.set(xlabel="optimizer steps (count)", ylabel=label)
        return self.finish(figure, f"column-{''.join(c if c.isalnum() else '-' for c in name)}", title)

    def _k_axis(self, axes: Axes) -> None:
        ks = sorted({point.k for run in self.runs for point in run.depth})
        ticks = ks if len(ks) <= 8 else [2**i for i in range(ks[-1].bit_length()) if 2**i >= ks[0]]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.set_xlim(ks[0] / 1.2, ks[-1] * 1.2)
        axes.set_xlabel("K (core iterations at inference)")

    # -----------------------------------------------------------------------------------------------------------------
    # Depth and noise

    def nll_by_k(self, baselines: dict[str, float]) -> Panel:
        """Held-out NLL by K with standard errors, and the baselines as horizontal lines."""
        figure, axes = self.axes()
        for run, look in zip(self.runs, self.looks, strict=True):
            errors = [point.stderr or 0.0 for point in run.depth]
            axes.errorbar(
                [p.k for p in run.depth], [p.nll for p in run.depth], yerr=errors if any(errors) else None,
                capsize=3, elinewidth=1, **look,
            )  # fmt: skip
        for index, (name, nll) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
            axes.axhline(nll, color=MUTED, lw=1, linestyle=(0, (1, 2)))
            left = index % 2 == 0
            axes.annotate(
                f"{short(name)} {nll:.2f}", (0.01 if left else 0.99, nll), xycoords=("axes fraction", "data"),
                xytext=(0, 2), textcoords="offset points", ha="left" if left else "right", va="bottom", color=MUTED,
                gid=f"halo-{index}",
            )  # fmt: skip
        axes.margins(y=0.1)
        self._k_axis(axes)
        self.linear_axis(axes.yaxis)
        axes.set_ylabel("held-out NLL (nats/token)")
        return self.finish(figure, "nll-by-k", "NLL by K")

    def gain_by_k(self) -> Panel:
        """NLL at each K minus the same run's NLL at its smallest K."""
        figure, axes = self.axes()
        for run, look in zip(self.runs, self.looks, strict=True):
            gains = [point.nll - run.depth[0].nll for point in run.depth]
            axes.plot([point.k for point in run.depth], gains, **look)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.margins(y=0.1)
        self._k_axis(axes)
        self.linear_axis(axes.yaxis)
        axes.set_ylabel("ΔNLL to the smallest K (nats/token)")
        return self.finish(figure, "gain-by-k", "Change of NLL with K")

    def nll_by_inference_flops(self) -> Panel | None:
        """Held-out NLL against the forward FLOPs per token at each K."""
        figure, axes = self.axes()
        every: list[float] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            points = [(p.flops_per_token, p.nll) for p in run.depth if p.flops_per_token]
            points.sort()
            every += [flops for flops, _ in points]
            axes.plot([f for f, _ in points], [nll for _, nll in points], **look)
        if not every:
            return None
        axes.margins(y=0.1)
        self.log_axis(axes.xaxis, min(every), max(every), pad=1.2)
        self.linear_axis(axes.yaxis)
        axes.set(xlabel="inference compute (FLOPs/token, one draw)", ylabel="held-out NLL (nats/token)")
        return self.finish(figure, "nll-by-inference-flops", "NLL against inference compute")

    def state_by_iteration(self) -> Panel | None:
        """Size of the state (for a denoiser, of its estimate) after each core pass, for runs that measured it."""
        shown = [(run, look) for run, look in zip(self.runs, self.looks, strict=True) if run.state_rms]
        if not shown:
            return None
        figure, axes = self.axes()
        for run, look in shown:
            at, rms = zip(*run.state_rms, strict=True)
            marked = sorted({round(i) for i in np.linspace(0, len(at) - 1, min(len(at), 12))})
            axes.plot(at, rms, markevery=marked, **look)
        values = [rms for run, _ in shown for _, rms in run.state_rms]
        low, high, last = min(values), max(values), max(run.state_rms[-1][0] for run, _ in shown)
        round_ones = MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10]).tick_values(0, last)
        axes.xaxis.set_major_locator(FixedLocator([1, *(t for t in round_ones if 1 < t <= last)]))
        axes.xaxis.set_major_formatter(FuncFormatter(linear_tick))
        axes.set_xlim(1 - 0.03 * last, 1.03 * last + 0.2)
        if low > 0 and high / low > 30:
            self.log_axis(axes.yaxis, low, high, pad=1.15)
        else:
            self.linear_axis(axes.yaxis)
            axes.set_ylim(0, high * 1.08 or 1.0)
        kinds = {run.state_is for run, _ in shown}
        units = "own units" if len(kinds) > 1 else "target's units" if "estimate" in kinds else "state's units"
        axes.set(xlabel="iteration (core passes so far)", ylabel=f"RMS per component ({units})")
        return self.finish(figure, "state-by-iteration", "State norm by iteration")

    def loss_by_sigma(self) -> Panel | None:
        """Held-out loss by noise level, for runs that measured it."""
        figure, axes = self.axes()
        sigmas: list[float] = []
        for run, look in zip(self.runs, self.looks, strict=True):
            if run.loss_by_sigma:
                at, nll = zip(*run.loss_by_sigma, strict=True)
                sigmas += at
                axes.plot(at, nll, **look)
                if run.sigma_star and min(at) < run.sigma_star < max(at):
                    axes.axvline(run.sigma_star, alpha=0.6, **{**look, "marker": "", "linewidth": 1})
        if not sigmas:
            return None
        axes.margins(y=0.1)
        self.log_axis(axes.xaxis, min(sigmas), max(sigmas), pad=1.15)
        self.linear_axis(axes.yaxis)
        axes.set(xlabel="noise level sigma (standard deviation per component)", ylabel="held-out loss (nats/token)")
        return self.finish(figure, "loss-by-sigma", "Loss by noise level")
