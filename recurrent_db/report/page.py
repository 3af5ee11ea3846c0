"""The sections of a report, in reading order, and the HTML around them.

Everything that comes from a run (names, configuration, samples, task names) passes through `text`, the only way into
the page. A section whose files are missing keeps its heading and says so.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from recurrent_db.report import blocks, machine
from recurrent_db.report.cost import energy
from recurrent_db.report.data import SMOOTHING, Run, number
from recurrent_db.report.figure import drawing, scientific, short
from recurrent_db.report.html import DASH, count, duration, fixed, joules, memory, note, panels, table, text
from recurrent_db.report.plots import Plots
from recurrent_db.report.reach import Reached, choose_levels, reached_at_constant_rate, reached_at_end
from recurrent_db.report.style import CSS


class Page:
    """Builds the sections. Runs keep their order and their look in all of them."""

    def __init__(self, runs: Sequence[Run], baselines: dict[str, float], plots: Plots) -> None:
        self.runs, self.baselines, self.plots = runs, baselines, plots
        self.swatches = plots.swatches()

    def run_label(self, run: Run) -> str:
        return f'<span class="run">{self._swatch(self.runs.index(run))}<span>{text(run.name)}</span></span>'

    def _swatch(self, index: int) -> str:
        return f'<svg class="swatch" viewBox="0 0 38 14" aria-hidden="true"><use href="#look-{index}"/></svg>'

    def legend(self, only: Sequence[Run] | None = None) -> str:
        """Which line is whose; repeated above every group of plots so that nobody has to scroll back."""
        shown = self.runs if only is None else only
        items = (f"<li>{self._swatch(i)}{text(run.name)}</li>" for i, run in enumerate(self.runs) if run in shown)
        return f'<ul class="legend">{"".join(items)}</ul>'

    def definitions(self) -> str:
        """The runs' lines and markers, drawn once and referred to from every legend."""
        symbols = []
        for index, svg in enumerate(self.swatches):
            inner = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
            symbols.append(f'<symbol id="look-{index}" viewBox="0 0 38 14">{inner}</symbol>')
        return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true">{"".join(symbols)}</svg>'

    # -----------------------------------------------------------------------------------------------------------------
    # Sections

    def summary(self) -> str:
        best = {run.name: min(run.depth, key=lambda point: point.nll) for run in self.runs if run.depth}
        lowest = min((point.nll for point in best.values()), default=None)
        energies = [energy(run) for run in self.runs]
        metered = any(energies)
        rows = []
        for run, used in zip(self.runs, energies, strict=True):
            counts, point = run.parameters(), best.get(run.name)
            parameters = count(counts["total"]) if counts else DASH
            if counts and counts["noise_conditioning"]:
                parameters += f"<small>+ {count(counts['noise_conditioning'])} cond.</small>"
            nll = fixed(point.nll if point else None)
            if point and point.nll == lowest and len(self.runs) > 1:
                nll = f"<strong>{nll}</strong>"
            if point and point.stderr is not None:
                nll += f"<small>± {point.stderr:.3f}</small>"
            bits = fixed(point.bits_per_byte if point else None)
            if point is None and (bound := run.last("eval/elbo")) is not None:
                nll = f"≤ {fixed(bound)}<small>± {fixed(run.last('eval/elbo_stderr'))}</small>"
                bits = f"≤ {fixed(run.last('eval/bits_per_character'))}<small>per character</small>"
            flops, skipped = run.last("flops"), run.last("skipped")
            steps = count(run.last("step")) + (f"<small>{skipped:,.0f} skipped</small>" if skipped else "")
            status = "" if run.complete else f"<small>{self._status(run)}</small>"
            rows.append(
                [
                    self.run_label(run) + status,
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
        for name, nll_value in sorted(self.baselines.items(), key=lambda item: item[1]):
            rows.append([text(name), "baseline", *[DASH] * 4, fixed(nll_value), *[DASH] * (5 if metered else 4)])
        head = ["Run", "Objective", "Parameters", "Training<br>tokens", "Steps", "Training<br>FLOPs",
                "Held-out NLL<br>(nats/token)", "at K", "Bits/<br>byte", "Training<br>time", "Peak<br>memory"]  # fmt: skip
        if metered:
            head.append("Energy<br>(per token)")
        how = (
            "<p>Lower held-out NLL (negative log-likelihood) and fewer bits per byte are better; "
            "<code>next_token</code> is the flat model that one would train otherwise, so a recurrent objective is "
            "worth its cost only where it beats that control at equal FLOPs.</p>"
        )
        caption = "NLL is the lowest over the K that were scored, ± its standard error over sequences. "
        if any(run.last("eval/elbo") is not None for run in self.runs):
            caption += "≤: masked diffusion's bound. "
        caption += "“cond.”: further parameters for the noise conditioning."
        if metered:
            caption += " Energy is that of the whole GPU while training, and per token trained."
        if sources := self._sources():
            caption += f" Scores are from {sources}."
        warnings = "".join(f"<p><strong>Take care:</strong> {text(w)}</p>" for w in self._comparability())
        damaged = [f"{run.name}: {n}" for run in self.runs for n in run.notes]
        return how + warnings + table(head, rows, caption) + "".join(note(text(line)) for line in damaged)

    def _sources(self) -> str:
        """Where the runs' NLL by K comes from; runs are named only where they differ."""
        names: dict[str, list[str]] = {}
        for run in self.runs:
            if run.depth_source:
                names.setdefault(run.depth_source, []).append(run.name)
        if len(names) == 1:
            return text(next(iter(names)))
        return "; ".join(f"{text(', '.join(having))}: {text(source)}" for source, having in names.items())

    def _status(self, run: Run) -> str:
        if run.progress is None:
            return "no metrics" if not run.rows else "no budget given"
        return f"incomplete: {run.progress:.0%} of the budget"

    def _comparability(self) -> list[str]:
        """What makes the runs' numbers not comparable, in sentences."""
        result = []

        def differ(values: Iterable[object]) -> bool:
            return len(set(values)) > 1

        if differ(run.config.model.vocab_size for run in self.runs):
            result.append("the runs have different vocabularies: compare bits per byte, not nats per token.")
        if differ(run.config.data.val_path or run.config.data.path for run in self.runs):
            result.append("the runs name different data: their losses compare only if the held-out text is the same.")
        if differ(run.config.data.sequence_length for run in self.runs):
            result.append("the runs were scored with different context lengths, and longer contexts score lower.")
        if differ(run.depth_tokens for run in self.runs if run.depth):
            result.append("the runs were not scored on the same amount of held-out text.")
        return result

    def loss(self) -> str:
        drawn = [p for x in ("flops", "tokens", "seconds") if (p := self.plots.loss_against(x))]
        if not drawn:
            return note("Left out: no run has metrics.jsonl with losses.")
        sentences = [
            f"Lines: training loss, smoothed ({SMOOTHING}).",
            "Markers: held-out NLL at the best K, open during training and filled at the end of a complete run, where "
            "the learning rate has been annealed; an annealed loss is lower, so compare filled with filled.",
        ]
        mixed = [run.name for run in self.runs if run.training_curve == "loss_sigma_max"]
        if mixed:
            sentences.append(
                f"The training loss of {text(', '.join(mixed))} mixes noise levels, most of which show part of the "
                "answer, and compares with nothing here; the line is its loss at sigma_max, where the model is a "
                "next-token predictor."
            )
        empty = [run.name for run in self.runs if len(run.series("flops", run.training_curve)[0]) < 2 and run.rows]
        if empty:
            sentences.append(f"No training line for {text(', '.join(empty))}: no step logged such a loss.")
        return note(" ".join(sentences)) + self.legend() + panels(drawn, "grid small")

    def depth(self) -> str:
        if not any(run.depth for run in self.runs):
            return note("Left out: no run has eval/depth_curve.json or evaluations in metrics.jsonl.")
        sentence = (
            "The same weights, scored with more core iterations. Bars are one standard error over sequences, where it "
            "is known. On the right the bars are left out: all K are scored on the same text, which makes their "
            "difference far more certain than either of them. A curve that stays at zero earns nothing from its loops."
        )
        ks = {point.k for run in self.runs for point in run.depth}
        drawn = [self.plots.nll_by_k(self.baselines), self.plots.gain_by_k() if len(ks) > 1 else None]
        return note(sentence) + self.legend() + panels(drawn) + note(f"Source: {self._sources()}.")

    def state(self) -> str:
        drawn = self.plots.state_by_iteration()
        if drawn is None:
            return note("Left out: no run has eval/depth_curve.json with state_rms_by_iteration.")
        having = [run for run in self.runs if run.state_rms]
        sentence = (
            "Size of the state after each core pass, in a run of the largest K that was scored: root mean square over "
            "components, positions and a few held-out sequences. A line that levels off has settled in size; one that "
            "keeps growing or shrinking has not."
        )
        walks = [run.name for run in having if run.state_is == "estimate"]
        if walks:
            sentence += (
                f" For a denoiser ({text(', '.join(walks))}) it is its estimate of the clean target, in the target's "
                "units, at each noise level from sigma_max down."
            )
        return note(sentence) + self.legend(having) + panels([drawn], "wide")

    def inference(self) -> str:
        drawn = self.plots.nll_by_inference_flops() if any(run.depth for run in self.runs) else None
        if drawn is None:
            return note("Left out: no run has scores with FLOPs per token.")
        sentence = (
            "What a better prediction costs at inference: each point is one K, the lowest K on the left. Forward "
            "FLOPs of scoring one token once; a mixture of M noise draws costs M times that."
        )
        return note(sentence) + self.legend() + panels([drawn], "wide")

    def sigma(self) -> str:
        drawn = self.plots.loss_by_sigma()
        if drawn is None:
            return note("Left out: no run has eval/denoiser_report.json with nll_by_sigma.")
        sentence = (
            "Held-out loss of a denoiser by noise level. On the left the answer shows through and the loss is low for "
            "any model; only the right end, sigma_max, is a next-token loss."
        )
        stars = [f"{text(run.name)} {run.sigma_star:.3g}" for run in self.runs if run.sigma_star]
        if stars:
            sentence += (
                " Vertical lines: sigma*, below which the nearest embedding row is the answer more often than not ("
                + ", ".join(stars) + ")."
            )  # fmt: skip
        legend = self.legend([run for run in self.runs if run.loss_by_sigma])
        return note(sentence) + legend + panels([drawn], "wide")

    def reach(self) -> str:
        levels = choose_levels(self.runs)
        if not levels:
            return note("Left out: no run has evaluations at a constant learning rate or at the end of its budget.")

        def cell(reached: Reached | None) -> str:
            if reached is None:
                return "<small>not reached</small>"
            return ("≤ " if reached.at_most else "") + scientific(reached.flops)

        def group(phase: str) -> list[Run]:
            return [run for run in self.runs if any(e.phase == phase for e in run.evaluations)]

        rows: list[list[str]] = []
        if constant := group("constant"):
            rows.append(["At the constant (peak) learning rate: interpolated between evaluations"])
            for run in constant:
                rows.append(
                    [self.run_label(run), *(cell(reached_at_constant_rate(run.evaluations, v)) for v in levels)]
                )
        if ended := group("end"):
            rows.append(["At the annealed end of a complete run: reached at or below its FLOPs"])
            for run in ended:
                cells = [cell(reached_at_end(run.evaluations, level)) for level in levels]
                rows.append([self.run_label(run), *cells])
        caption = (
            "Held-out NLL at the best K. The two groups are different kinds of numbers and must not be compared with "
            "each other: annealing the learning rate lowers the loss by itself. At the constant rate, NLL is "
            "interpolated linearly in log FLOPs between neighbouring evaluations and never extrapolated; “≤” there "
            "says that the first evaluation was already below the level. The end of a run counts as one point. "
            "Evaluations during warm-up, during a decay or at the end of an incomplete run are not used."
        )
        unused = [run.name for run in self.runs if run not in constant and run not in ended]
        if unused:
            caption += f" Without any usable evaluation: {text(', '.join(unused))}."
        head = ["Training FLOPs to reach NLL", *(f"{level:g}<small>nats/token</small>" for level in levels)]
        return table(head, rows, caption)

    def lm_eval(self) -> str:
        columns = [(run, k) for run in self.runs for k in run.lm_eval]
        if not columns:
            return note("Left out: no run has eval/lm_eval.json.")
        found: dict[tuple[str, str], None] = {}
        for run, k in columns:
            for task, metrics in run.lm_eval[k].items():
                for metric in metrics if isinstance(metrics, dict) else ():
                    if number(metrics[metric]) is not None and "_stderr" not in metric and metric != "sample_len":
                        found[(task, metric)] = None
        rows = []
        for task, metric in found:
            cells = []
            for run, k in columns:
                metrics = run.lm_eval[k].get(task)
                metrics = metrics if isinstance(metrics, dict) else {}
                value = number(metrics.get(metric))
                name, _, variant = metric.partition(",")
                error = number(metrics.get(f"{name}_stderr,{variant}" if variant else f"{name}_stderr"))
                shown = DASH if value is None else f"{value:.3f}" if abs(value) < 100 else scientific(value)
                cells.append(shown + (f"<small>± {error:.3f}</small>" if error is not None else ""))
            plain = metric.removesuffix(",none")
            rows.append([f"{text(task)}<small>{text(plain)}</small>", *cells])
        head = [
            "Task",
            *(f"{self.run_label(run)}<small>{f'K = {text(k)}' if k else 'K not given'}</small>" for run, k in columns),
        ]
        caption = "± is lm-eval's standard error. Accuracies are shares; chance depends on the task."
        return table(head, rows, caption)

    def samples(self) -> str:
        having = [run for run in self.runs if run.samples]
        if not having:
            return note("Left out: no run has eval/samples.json.")
        prompts = dict.fromkeys(str(sample.get("prompt", "")) for run in having for sample in run.samples)
        rows = []
        for prompt in prompts:
            cells = []
            for run in having:
                parts = []
                for sample in run.samples:
                    if str(sample.get("prompt", "")) == prompt:
                        names = {"k": "K", "temperature": "temperature", "seed": "seed"}
                        facts = ", ".join(f"{name} {sample[key]}" for key, name in names.items() if key in sample)
                        generated = text(sample.get("text", ""))
                        parts.append(f"<small>{text(facts)}</small><pre>{generated}</pre>")
                cells.append("".join(parts) or DASH)
            rows.append([f"<pre>{text(prompt)}</pre>", *cells])
        caption = (
            "As generated, nothing picked or shortened here. A sample says little; the likelihoods above say more."
        )
        return table(["Prompt", *(self.run_label(run) for run in having)], rows, caption, "samples")

    def made(self) -> str:
        result = []
        for run in self.runs:
            command = run.environment.get("command")
            if isinstance(command, list):
                command = shlex.join(str(word) for word in command)
            commit = run.environment.get("git_commit")
            facts = [
                ("Directory", run.path),
                ("Command", command or "not recorded"),
                ("Git commit", commit or "not recorded"),
                ("Seed", run.config.seed),
                ("Device", run.environment.get("device_name") or run.environment.get("device") or "not recorded"),
            ]
            listing = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in facts)
            blocks = ""
            for name, value in (("Configuration", run.raw_config), ("Environment", run.environment)):
                if value:
                    listed = text(json.dumps(value, indent=1, ensure_ascii=False))
                    blocks += f"<details><summary>{name}</summary><pre>{listed}</pre></details>"
            result.append(f"<h3>{self.run_label(run)}</h3><dl>{listing}</dl>{blocks}")
        return "".join(result)


SECTIONS = (
    ("summary", "Summary", Page.summary),
    ("loss", "Loss during training", Page.loss),
    ("depth", "NLL by number of iterations K", Page.depth),
    ("state", "State norm by iteration", Page.state),
    ("inference", "NLL against inference compute", Page.inference),
    ("sigma", "Loss by noise level", Page.sigma),
    ("flops", "Where the FLOPs go", machine.flops),
    ("memory", "Memory", machine.memory_held),
    ("blocks", "Blocks that train alone", blocks.blocks),
    ("machine", "Throughput and optimisation", machine.machine),
    ("reach", "FLOPs to reach a loss", Page.reach),
    ("lm-eval", "Benchmarks (lm-eval)", Page.lm_eval),
    ("samples", "Samples", Page.samples),
    ("made", "How this was made", Page.made),
)


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may do for the page: no script runs and nothing is fetched, even if something were to slip into it."""


def build_page(runs: Sequence[Run], baselines: dict[str, float], png_dir: Path | None = None) -> str:
    """The whole page as HTML: one file, no script, nothing fetched. PNGs of the plots go to ``png_dir`` where given."""
    with drawing():
        page = Page(runs, baselines, Plots(runs, png_dir))
        built = ((key, title, build(page)) for key, title, build in SECTIONS)
        sections = [section for section in built if section[2]]
        definitions = page.definitions()
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
