"""Test whether iterations help on tasks that need depth: generated tasks, all arms, equal FLOPs, accuracy by K.

python benchmarks/reasoning/compare.py [--tasks s5-generators,p-hop] [--arms A,B] [--budget-flops 2e13] [--minutes 30]

tasks.py describes the tasks; run.py is one run. The arms are those of benchmarks/quality/compare.py in the shape of `tiny`
(width 128, layers 1/2/1, 0.9M parameters). A finished run writes one small file, RESULTS/reasoning/NAME.json. All files are
merged into RESULTS/reasoning.json, and the tables are printed. Finished runs are not repeated. With several learning rates,
the first seed sweeps them and the others use the best.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

from benchmarks.quality.compare import ARMS, choose_arms
from benchmarks.quality.runs import contradiction, identity, middle_first
from benchmarks.quality.tables import Result, by_rate, sweep_of
from benchmarks.reasoning.run import task_config
from benchmarks.reasoning.tasks import TASKS
from benchmarks.slices import ROOT, Failed, Slice
from recurrent_db.accounting.hardware import choose_device
from recurrent_db.arguments import Names, listed, run_command
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.schema import Count, Positive, PositiveInt, at_least


@dataclass
class Args:
    """Train all arms on tasks that need depth, at equal FLOPs, and print accuracy by K."""

    tasks: Names = ("s5-generators", "p-hop")
    """Tasks, separated by commas: s5, s5-generators, p-hop. s5 needs more FLOPs, to learn all 14,400 products first."""
    arms: Names = ()
    """Arms to run, separated by commas; all by default."""
    seeds: tuple[Count, ...] = (0, 1)
    """Seeds. The smallest one sweeps the learning rates; the others use the best rate."""
    rates: tuple[Positive, ...] = (5e-4, 1e-3, 2e-3)
    """Peak learning rates to try."""
    budget_flops: Positive = 2e13
    """Training budget of a run, in model FLOPs."""
    options: str = ""
    """Additional configuration keys for every run, e.g. "model.n_core=1". Use a separate --results folder for them."""
    minutes: Annotated[float | None, at_least(0)] = None
    """Time limit in minutes. Runs that would not finish in time are not started. 0 only merges results."""
    work: Path = ROOT / "runs/reasoning"
    """Folder for logs and measured rates."""
    results: Path = ROOT / "benchmarks/results"
    """Folder for the results."""
    threads: PositiveInt = 1
    """CPU threads of each run."""
    jobs: Count = 0
    """Number of parallel runs. 0: as many as fit on the cores, or one on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations) to score."""
    draws: PositiveInt = 2
    """Noise draws whose probabilities are averaged."""
    samples: PositiveInt = 2048
    """Number of held-out samples to score."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    arm: str
    seed: int
    rate: float
    budget: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm}-seed{self.seed}-lr{self.rate:g}-flops{self.budget:g}"


class Reasoning:
    """The comparison of one call of this script."""

    def __init__(self, args: Args) -> None:
        self.args, self.arms, self.tasks = args, choose_arms(args.arms or list(ARMS)), args.tasks
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
        self.seeds, self.rates, self.ks = sorted(set(args.seeds)), sorted(set(args.rates)), sorted(set(args.k))
        one = choose_device(args.device).type == "cuda"
        jobs = args.jobs or (1 if one else max(1, (os.cpu_count() or 1) // args.threads))
        self.slice = Slice(args.work.resolve(), jobs, args.threads, args.minutes, resumable=False)
        self.folder = (args.results / "reasoning").resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {}
        for path in sorted(self.folder.glob("*.json")):
            result = json.loads(path.read_text())
            if result["arm"] in ARMS and (key := self.contradiction(result)) is not None:
                raise UserError(
                    f"{path} was made with another {key}: remove it to repeat the run, or choose another --results"
                )
            self.results[path.stem] = result

    def contradiction(self, result: Result) -> str | None:
        """The first setting in which a result differs from this call; None if all are equal."""
        if (result["words"], result["options"]) != (ARMS[result["arm"]], self.args.options):
            return f"arm or options ({' '.join([*result['words'], result['options']]).strip()})"
        keys = ("task", "arm", "options", "seed", "learning_rate", "budget_flops")
        return contradiction(result["identity"], self.identity(*(result[key] for key in keys)))

    def identity(self, task: str, arm: str, options: str, seed: int, rate: float, budget: float) -> dict[str, Any]:
        """The part of the configuration that must be equal in two results with the same name."""
        return identity(task_config(TASKS[task], arm, options, seed, rate, budget))

    # -----------------------------------------------------------------------------------------------------------------
    # Runs

    def wanted(self) -> Iterator[Run]:
        budget = self.args.budget_flops
        for rate in middle_first(self.rates):
            for task in self.tasks:
                for arm in self.arms:
                    yield Run(task, arm, self.seeds[0], rate, budget)
        for task in self.tasks:
            for arm in self.arms:
                swept = [Run(task, arm, self.seeds[0], rate, budget).name for rate in self.rates]
                best = self.best_rate(task, arm, budget)
                if best is not None and all(name in self.results for name in swept):
                    for seed in self.seeds[1:]:
                        yield Run(task, arm, seed, best, budget)

    def pending(self) -> list[Run]:
        return [run for run in self.wanted() if run.name not in self.results]

    def words(self, run: Run, out: Path) -> list[object]:
        return [
            "benchmarks/reasoning/run.py", "--task", run.task, "--arm", run.arm, "--seed", run.seed,
            "--rate", f"{run.rate:g}",
            "--budget-flops", f"{run.budget:g}", "--json", out, "--k", listed(self.ks), "--draws", self.args.draws,
            "--samples", self.args.samples, "--threads", self.args.threads, "--device", self.args.device,
            *([f"--options={self.args.options}"] if self.args.options else []),
        ]  # fmt: skip

    def do(self, run: Run, lock: int) -> None:
        out = self.folder / f"{run.name}.json"
        try:
            self.slice.call(self.slice.work / f"{run.name}.log", lock, *self.words(run, out))
        except Failed as error:
            if "not finite" not in str(error):
                raise
            failed = {
                "task": run.task, "arm": run.arm, "seed": run.seed, "learning_rate": run.rate, "budget_flops": run.budget,
                "words": ARMS[run.arm], "options": self.args.options, "flops": 0.0, "seconds": 0.0, "failed": str(error),
                "identity": self.identity(run.task, run.arm, self.args.options, run.seed, run.rate, run.budget),
            }  # fmt: skip
            write_atomic(out, json.dumps(failed))
            return
        result = json.loads(out.read_text())
        self.slice.measured(f"{run.task}/{run.arm}", result["flops"], result["seconds"])
        self.slice.measured(f"{run.task}/{run.arm}/score", 1, result["seconds_scoring"])

    def seconds(self, run: Run) -> float:
        """Estimated time of a run. Before an arm's first run, a few steps measure its speed."""
        kind = f"{run.task}/{run.arm}"
        if self.slice.rate(kind) is None:
            lock, out = os.open(os.devnull, os.O_RDONLY), self.slice.work / f"rate-{run.task}-{run.arm}.json"
            try:
                self.slice.call(out.with_suffix(".log"), lock, *self.words(run, out), "--steps", 10)
            finally:
                os.close(lock)
            result = json.loads(out.read_text())
            self.slice.measured(kind, result["flops"], result["seconds"])
            self.slice.measured(f"{kind}/score", 1, result["seconds_scoring"])
        rate, score = self.slice.rate(kind), self.slice.rate(f"{kind}/score")
        return 1.1 * (run.budget / (rate or 1.0) + 1 / (score or 1.0)) + 5

    def finished(self, run: Run) -> None:
        path = self.folder / f"{run.name}.json"
        if path.exists():
            result = self.results[run.name] = json.loads(path.read_text())
            what = result.get("failed") or f"accuracy {quality_of(result):.3f} at its best K"
            print(f"done  {run.name}: {what}, {result['seconds']:.0f} s", file=sys.stderr)
            self.merge()

    # -----------------------------------------------------------------------------------------------------------------
    # Output

    def of_task(self, task: str) -> list[Result]:
        return [result for result in self.results.values() if result["task"] == task]

    def best_rate(self, task: str, arm: str, budget: float) -> float | None:
        """The rate with the highest accuracy in the task's headline group at the best K, for the first seed."""
        sweep = sweep_of(by_rate(self.of_task(task), arm, budget))
        best = max(sweep, key=lambda rate: quality_of(sweep[rate]), default=None)
        return best if best is not None and quality_of(sweep[best]) >= 0 else None

    def merge(self) -> str:
        """Write the merged file and return the tables in Markdown."""
        budgets = sorted({result["budget_flops"] for result in self.results.values()})
        merged: dict[str, Any] = {"budgets": {}}
        parts = []
        for budget in budgets:
            tasks: dict[str, Any] = {}
            for task in TASKS:
                arms: dict[str, Any] = {}
                names = dict.fromkeys([*ARMS, *(result["arm"] for result in self.of_task(task))])
                for arm in names:
                    rates, best = by_rate(self.of_task(task), arm, budget), self.best_rate(task, arm, budget)
                    if best is not None:
                        seeds = [result for _, result in sorted(rates[best].items()) if "failed" not in result]
                        swept = {f"{rate:g}": quality_of(result) for rate, result in sweep_of(rates).items()}
                        arms[arm] = {"seeds": seeds, "sweep": swept}
                if arms:
                    runs = [result for result in self.of_task(task) if result["budget_flops"] == budget]
                    tasks[task] = {
                        "arms": arms,
                        "runs": len(runs),
                        "flops": sum(run["flops"] for run in runs),
                        "seconds": sum(run["seconds"] for run in runs),
                    }
                    parts.append(f"{task}, {budget:g} FLOPs\n\n{table(tasks[task])}")
            merged["budgets"][f"{budget:g}"] = tasks
        write_atomic(self.folder.with_name("reasoning.json"), json.dumps(merged, indent=1) + "\n")
        return "\n\n".join(parts) or "No run is complete yet."


def quality_of(result: Result) -> float:
    """Accuracy in the headline group at the best K; -1 for a failed run."""
    if "failed" in result:
        return -1.0
    return max(float(groups[result["headline"]]) for groups in result["accuracy_by_k"].values())


def table(found: dict[str, Any]) -> str:
    """Markdown table with one row per arm and K: accuracy by group in percent, mean over seeds."""
    first = next(iter(found["arms"].values()))["seeds"][0]
    ks, groups = list(first["accuracy_by_k"]), list(next(iter(first["accuracy_by_k"].values())))
    lines = ["| " + " | ".join(["arm", "rate", "seeds", "K", *groups]) + " |", "| --- " * (4 + len(groups)) + "|"]
    for arm, entry in found["arms"].items():
        seeds = entry["seeds"]
        for k in ks:
            cells = [f"{100 * fmean(seed['accuracy_by_k'][k][group] for seed in seeds):.1f}" for group in groups]
            rate = f"{seeds[0]['learning_rate']:g}"
            lines.append("| " + " | ".join([arm, rate, str(len(seeds)), k, *cells]) + " |")
    lines += ["", f"Accuracy in percent. {found['runs']} runs, including the sweep of the rates: {found['flops']:.2e} FLOPs,"
              f" {found['seconds'] / 3600:.2f} hours."]  # fmt: skip
    return "\n".join(lines)


def main(args: Args) -> int:
    reasoning = Reasoning(args)
    if args.minutes == 0:
        left = reasoning.pending()
    else:
        left = reasoning.slice.run(reasoning.pending, reasoning.do, reasoning.seconds, reasoning.finished)
    print(reasoning.merge())
    if left:
        names = ", ".join(run.name for run in left[:6]) + (", ..." if len(left) > 6 else "")
        print(f"\nLeft: {len(left)} runs known so far ({names}); repeat the command to continue.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(Args, main)
