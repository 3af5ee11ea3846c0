"""The sections on benchmarks, samples, and how the runs were made."""

from __future__ import annotations

import json
import shlex

from recurrent_db.report.comparison import Comparison
from recurrent_db.report.figure import scientific
from recurrent_db.report.html import DASH, note, table, text
from recurrent_db.report.runs import number


def lm_eval(comparison: Comparison) -> str:
    """lm-eval's scores by task, run and K."""
    columns = [(run, k) for run in comparison.runs for k in run.lm_eval]
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
        *(f"{comparison.label(run)}<small>{f'K = {text(k)}' if k else 'K not given'}</small>" for run, k in columns),
    ]
    caption = "± is lm-eval's standard error. Accuracies are shares of 1. Chance depends on the task."
    return table(head, rows, caption)


def samples(comparison: Comparison) -> str:
    """Generated texts, one row for each prompt."""
    having = [run for run in comparison.runs if run.samples]
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
    caption = "Texts as generated, without selection or cuts. Single samples say less than the likelihoods above."
    return table(["Prompt", *(comparison.label(run) for run in having)], rows, caption, "samples")


def provenance(comparison: Comparison) -> str:
    """Command, commit, configuration and environment of each run."""
    result = []
    for run in comparison.runs:
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
        result.append(f"<h3>{comparison.label(run)}</h3><dl>{listing}</dl>{blocks}")
    return "".join(result)
