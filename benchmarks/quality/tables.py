"""Turns the results of single runs into the comparison: best learning rate, differences with errors, FLOPs to reach a level.

A result is the JSON file of one complete run (see `compare.py`). An arm's learning rate is the one with the lowest NLL over
K for the first seed. All seeds with this rate count for the arm. The rate is chosen by the same number that is reported,
which favours all arms equally if their sweeps are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from recurrent_db.report.flops_to_loss import reached_at_constant_rate
from recurrent_db.report.runs import Evaluation

FLAT = "next_token"
"""The flat control. Arms whose name begins with it and a hyphen are flat too."""

Result = dict[str, Any]


COLLAPSED = 0.1
"""Nats per token. A run has collapsed if its NLL is not this far below the entropy of the held-out token frequencies."""


def is_flat(arm: str) -> bool:
    return arm == FLAT or arm.startswith(FLAT + "-")


def by_rate(results: Iterable[Result], arm: str, budget: float) -> dict[float, dict[int, Result]]:
    """Results of an arm at one budget: {rate: {seed: result}}, rates rising."""
    found: dict[float, dict[int, Result]] = {}
    for result in results:
        if result["arm"] == arm and result["budget_flops"] == budget:
            found.setdefault(result["learning_rate"], {})[result["seed"]] = result
    return dict(sorted(found.items()))


def level(result: Result) -> float:
    """NLL at the best K; infinite for a failed run."""
    return math.inf if "failed" in result else result["nll_best"]


def collapsed(result: Result) -> bool:
    """Whether a run has learned no more than the tokens' frequencies."""
    return "failed" not in result and level(result) > result["unigram_entropy"] - COLLAPSED


def sweep_of(rates: dict[float, dict[int, Result]]) -> dict[float, Result]:
    """Results of the first seed, by rate. The rate is chosen by them."""
    first = min((seed for seeds in rates.values() for seed in seeds), default=None)
    return {rate: seeds[first] for rate, seeds in rates.items() if first in seeds}


def best_rate(results: Iterable[Result], arm: str, budget: float) -> float | None:
    """The rate with the lowest NLL; None if all runs failed."""
    sweep = sweep_of(by_rate(results, arm, budget))
    best = min(sweep, key=lambda rate: level(sweep[rate]), default=None)
    return best if best is not None and math.isfinite(level(sweep[best])) else None


def arm_entry(results: Sequence[Result], arm: str, budget: float) -> dict[str, Any] | None:
    """An arm at one budget: its seeds at the best rate, and the sweep. None if all runs failed."""
    rates, best = by_rate(results, arm, budget), best_rate(results, arm, budget)
    if best is None:
        return None
    hidden = (
        "nll_by_sequence",
        "evaluations",
        "identity",
        "corpus",
        "scoring",
        "words",
        "limit",
        "arm",
        "budget_flops",
    )
    sweep = sweep_of(rates)
    seeds = [result for _, result in sorted(rates[best].items()) if "failed" not in result]
    return {
        "seeds": [{name: value for name, value in seed.items() if name not in hidden} for seed in seeds],
        "words": seeds[0]["words"],
        "sweep": {f"{rate:g}": None if "failed" in result else level(result) for rate, result in sweep.items()},
        "rate_at_the_edge": len(sweep) > 1 and best in (min(sweep), max(sweep)),
    }


def mean_by_k(seeds: Sequence[Result], key: str = "nll_by_k") -> dict[str, float]:
    return {k: fmean(seed[key][k] for seed in seeds) for k in seeds[0][key]}


def best_k(seeds: Sequence[Result]) -> str:
    means = mean_by_k(seeds)
    return min(means, key=lambda k: means[k])


def difference(
    results: Sequence[Result], arm: str, other: str, budget: float, other_budget: float
) -> tuple[float, float]:
    """NLL of ``arm`` minus NLL of ``other``, each at its best K and averaged over its seeds; and the standard error of the
    difference over the held-out sequences (not over training runs)."""
    lines = []
    for name, flops in ((arm, budget), (other, other_budget)):
        rate = best_rate(results, name, flops)
        assert rate is not None
        seeds = [result for result in by_rate(results, name, flops)[rate].values() if "failed" not in result]
        k = best_k(seeds)
        lines.append([fmean(values) for values in zip(*(seed["nll_by_sequence"][k] for seed in seeds), strict=True)])
    each = [a - b for a, b in zip(*lines, strict=True)]
    mean = fmean(each)
    n = len(each)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in each) / max(1, n - 1) / n)


def sweep_cost(results: Iterable[Result], at: Mapping[str, float], all_budgets: bool = False) -> dict[str, Any]:
    """Cost of choosing the rates, beside the reported runs. ``at`` gives the budget of each arm's reported runs. With
    ``all_budgets``, the cost of choosing that budget is included."""
    runs = [r for r in results if r["arm"] in at and (all_budgets or r["budget_flops"] == at[r["arm"]])]
    arms = sorted({result["arm"] for result in runs})
    reported = [
        result
        for arm in arms
        for result in by_rate(runs, arm, at[arm]).get(best_rate(runs, arm, at[arm]) or 0.0, {}).values()
    ]
    return {
        "runs": len(runs), "flops": sum(run["flops"] for run in runs), "seconds": sum(run["seconds"] for run in runs),
        "reported_runs": len(reported), "reported_flops": sum(run["flops"] for run in reported),
        "rates": {arm: [f"{rate:g}" for rate in sweep_of(by_rate(runs, arm, at[arm]))] for arm in arms},
    }  # fmt: skip


def flops_to_reach(
    results: Sequence[Result], arms: Sequence[str], budgets: Sequence[float], nll: float
) -> dict[str, dict[str, Any]]:
    """FLOPs at which each arm reaches a level of NLL, by two measures that must not be mixed (`report.flops_to_loss`).

    ``annealed``: from complete runs at several budgets. The mean over seeds is interpolated in log FLOPs between the last
    budget above the level and the first at or below it. ``at_most`` means that the smallest budget already reaches it.
    ``constant``: from evaluations at the peak learning rate during the largest run of the first seed. They read fewer
    held-out tokens, so they are shifted by the difference between the last evaluation and the final score. None means that
    the level is not reached.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        entries = [entry for budget in sorted(budgets) if (entry := arm_entry(results, arm, budget)) is not None]
        points = [
            (fmean(seed["flops"] for seed in entry["seeds"]), fmean(level(seed) for seed in entry["seeds"]))
            for entry in entries
        ]
        annealed, at_most, before = None, False, None
        for flops, value in points:
            if value <= nll:
                annealed, at_most = flops, before is None
                if before is not None:
                    share = (before[1] - nll) / (before[1] - value)
                    annealed = math.exp(math.log(before[0]) + share * math.log(flops / before[0]))
                break
            before = flops, value
        constant = None
        if entries:
            largest = max(budget for budget in budgets if best_rate(results, arm, budget) is not None)
            runs = by_rate(results, arm, largest)[best_rate(results, arm, largest) or 0.0]
            first = runs[min(runs)]
            points_along = evaluations(first)
            ends = [point for point in points_along if point.phase == "end"]
            shift = (
                ends[0].best_nll - min(first["nll_by_k"].get(str(k), math.inf) for k in ends[0].nll) if ends else 0.0
            )
            constant = reached_at_constant_rate(points_along, nll + (shift if math.isfinite(shift) else 0.0))
        found[arm] = {
            "annealed": annealed, "at_most": at_most, "constant": constant.flops if constant else None,
            "constant_at_most": constant.at_most if constant else False,
        }  # fmt: skip
    return found


def evaluations(result: Result) -> list[Evaluation]:
    """A result's evaluations during the run, as objects of the report."""
    rows = []
    for row in result["evaluations"]:
        by_k = {name: {int(k): value for k, value in row[name].items()} for name in ("nll", "bits_per_byte")}
        rows.append(Evaluation(**{**row, **by_k}))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def table(
    results: Sequence[Result], arms: Sequence[str], budget: float, budgets: dict[str, float] | None = None
) -> str:
    """Markdown table with one row per arm: NLL by K, difference to the best flat arm, relative cost of a token, samples.

    ``budgets`` overrides ``budget`` for some arms.
    """
    at = {arm: (budgets or {}).get(arm, budget) for arm in arms}
    entries = {arm: entry for arm in arms if (entry := arm_entry(results, arm, at[arm])) is not None}
    if not entries:
        return "No run is complete yet."
    ks = list(next(iter(entries.values()))["seeds"][0]["nll_by_k"])
    flat = min(
        (arm for arm in entries if is_flat(arm)),
        key=lambda arm: min(mean_by_k(entries[arm]["seeds"]).values()),
        default=None,
    )
    head = ["arm", "rate", "seeds", *(f"K={k}" for k in ks), "bits/byte", f"minus {flat}" if flat else "-",
            "FLOPs", "tokens", "price", "distinct-2", "repetition"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    per_token = {arm: entry["seeds"][0]["flops"] / entry["seeds"][0]["tokens"] for arm, entry in entries.items()}
    for arm, entry in entries.items():
        seeds = entry["seeds"]
        means, best = mean_by_k(seeds), best_k(seeds)
        cells = [f"**{means[k]:.3f}**" if k == best else f"{means[k]:.3f}" for k in ks]
        versus = "-"
        if flat is not None and arm != flat:
            gap, error = difference(results, arm, flat, at[arm], at[flat])
            versus = f"{gap:+.3f} ± {error:.3f}"
        text = seeds[0]["text"]
        held_out = f"{text['held_out_distinct_2']:.2f}"
        rate = f"{seeds[0]['learning_rate']:g}" + ("*" if entry["rate_at_the_edge"] else "")
        lines.append(
            f"| {arm} | {rate} | {len(seeds)} | " + " | ".join(cells)
            + f" | {mean_by_k(seeds, 'bits_per_byte_by_k')[best]:.3f} | {versus} | {fmean(s['flops'] for s in seeds):.2e}"
            + f" | {fmean(s['tokens'] for s in seeds):,.0f} | "
            + (f"{per_token[arm] / per_token[flat]:.2f}" if flat else "-")
            + f" | {fmean(s['text']['distinct_2'] for s in seeds):.2f} ({held_out})"
            + f" | {fmean(s['text']['repetition'] for s in seeds):.3f} |"
        )  # fmt: skip
    cost = sweep_cost(results, {arm: at[arm] for arm in entries}, bool(budgets))
    lines += [
        "",
        f"Held-out nats per token; the lowest of each arm in bold. ± is the standard error over"
        f" {len(first_sequences(results))} held-out sequences. price: FLOPs per training token, relative to the flat arm."
        " distinct-2 in brackets: held-out text. *: the best rate is the lowest or highest that was tried.",
        f"Sweep and seeds: {cost['runs']} runs, {cost['flops']:.2e} FLOPs, {cost['seconds'] / 3600:.2f} hours of training,"
        f" of which {cost['reported_runs']} runs and {cost['reported_flops']:.2e} FLOPs are reported.",
    ]
    runs = [
        run for run in results if run["arm"] in entries and run["budget_flops"] == at[run["arm"]] and collapsed(run)
    ]
    for worse, what, advice in (
        (False, "Collapsed, at", " A longer schedule.warmup or a lower rate may help."),
        (True, "Worse than", ""),
    ):
        if dead := [run for run in runs if (level(run) > run["unigram_entropy"] + COLLAPSED) == worse]:
            names = ", ".join(f"{r['arm']} seed {r['seed']} at {r['learning_rate']:g} ({level(r):.3f})" for r in dead)
            floor = dead[0]["unigram_entropy"]
            lines.append(f"{what} the entropy of the tokens' frequencies ({floor:.3f}): {names}.{advice}")
    for arm in at:
        if arm not in entries and (rates := by_rate(results, arm, at[arm])):
            tried = ", ".join(f"{rate:g}" for rate in rates)
            lines.append(f"No row for {arm}: its loss was not finite at every rate that was tried ({tried}).")
    if len({tuple(rates) for rates in cost["rates"].values()}) > 1:
        tried = "; ".join(f"{arm} {', '.join(rates)}" for arm, rates in cost["rates"].items())
        lines.append(f"NOT the same rates for each arm: {tried}.")
    return "\n".join(lines)


def first_sequences(results: Sequence[Result]) -> list[float]:
    result = next(result for result in results if "failed" not in result)
    sequences: list[float] = next(iter(result["nll_by_sequence"].values()))
    return sequences


def reach_table(nll: float, found: dict[str, dict[str, Any]], why: str) -> str:
    """Table of the FLOPs at which each arm reaches one level."""
    lines = [
        f"FLOPs to {nll:.3f} nats per token ({why}):",
        "",
        "| arm | annealed runs | during the largest run |",
        "| --- " * 3 + "|",
    ]

    def cell(flops: float | None, at_most: bool) -> str:
        return "not reached" if flops is None else f"{'at most ' if at_most else ''}{flops:.2e}"

    for arm, entry in found.items():
        constant = cell(entry["constant"], entry["constant_at_most"])
        lines.append(f"| {arm} | {cell(entry['annealed'], entry['at_most'])} | {constant} |")
    return "\n".join(lines)
