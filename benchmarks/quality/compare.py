"""Compare the objectives at equal compute: every arm, several seeds, a sweep of the learning rate.

python benchmarks/quality/compare.py --data DIR [--size tiny|gpu] [--arms A,B] [--budget-flops 7e12,3e13] [--minutes 50]

Every run is a complete, annealed run of train/pretrain.py. Each arm tries the same learning rates with the first seed. Its
other seeds use the best of these rates. A finished run writes one small file, RESULTS/quality-SIZE/NAME.json. All files are
merged into RESULTS/quality-SIZE.json, and the table is printed.

The command can be killed and repeated: finished runs are not repeated, and an unfinished run continues from its checkpoint.
--minutes limits its time; it then lists the remaining runs. `--minutes 0` only merges. With several budgets, the tables also
give the FLOPs at which each arm reaches a level of NLL.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from benchmarks.quality import tables
from benchmarks.quality.plot import plot
from benchmarks.quality.runs import complete, contradiction, dotted, identity, limit_corpus, middle_first
from benchmarks.quality.tables import FLAT, Result, is_flat
from benchmarks.slices import ROOT, Failed, Slice
from recurrent_db.accounting.flops import inference_cost, step_cost
from recurrent_db.accounting.hardware import choose_device
from recurrent_db.arguments import Names, listed, run_command
from recurrent_db.config import Config, config_from_json, load_config
from recurrent_db.data import load_tokenizer, open_data, read_manifest
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.objectives import build_objective
from recurrent_db.report.runs import evaluations
from recurrent_db.rng import Rng
from recurrent_db.schema import Count, Positive, PositiveInt, at_least
from recurrent_db.store.folder import list_checkpoints
from recurrent_db.store.metrics import read_metrics


def unrolled(mean_depth: int, truncation: int, injection: str = "linear") -> list[str]:
    """Options for Huginn's training, with the initialisation for its own mean depth."""
    return [
        "--objective.name", "unrolled", "--objective.unrolled.mean_depth", str(mean_depth),
        "--objective.unrolled.truncation", str(truncation), "--model.expected_depth", str(mean_depth),
        "--model.injection", injection,
    ]  # fmt: skip


ARMS: dict[str, list[str]] = {
    "next_token": ["--objective.name", "next_token"],
    "unrolled-32-8": unrolled(32, 8),
    "unrolled-8-4": unrolled(8, 4),
    "unrolled-8-4-diagonal": unrolled(8, 4, "diagonal"),
    "unrolled-4-2": unrolled(4, 2),
    "unrolled-4-2-add": unrolled(4, 2, "add"),
    "unrolled-4-2-diagonal": unrolled(4, 2, "diagonal"),
    "unrolled-2-2-diagonal": unrolled(2, 2, "diagonal"),
    "one_step": ["--objective.name", "one_step"],
    # Control of the previous arm: the skip-core phase is equally long, and every step trains the first iteration.
    "one_step-first-iteration": ["--objective.name", "one_step", "--objective.one_step.next_token_share", "1"],
    "one_step-corrupt": ["--objective.name", "one_step", "--objective.one_step.corrupt_share", "0.1"],
    "one_step-corrupt-first-iteration": [
        "--objective.name", "one_step", "--objective.one_step.corrupt_share", "0.1",
        "--objective.one_step.next_token_share", "1",
    ],
    "denoise": ["--objective.name", "denoise"],
    "denoise_paper": ["--objective.name", "denoise_paper"],
}  # fmt: skip
"""Arms: name -> options that are added to the size's configuration."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "config": "tiny.toml", "budget": 7e12, "rates": (3e-3, 6e-3, 1.2e-2), "score_tokens": 16_384, "options": [],
        "arms": list(ARMS),
    },
    # 16,384 tokens a step. A short budget then has enough steps, and enough of them are warm-up (docs/notebook.md).
    # Four arms, three rates and a second seed are 16 runs and 6.4e16 FLOPs. This takes under 25 minutes if training runs at
    # 60 TFLOP/s and starting and scoring a run takes 25 seconds. It is not yet measured.
    "gpu": {
        "config": "pythia-70m-looped.toml", "budget": 4e15, "rates": (3e-4, 6e-4, 1.2e-3), "score_tokens": 131_072,
        "options": ["--data.batch_size", "64", "--schedule.warmup", "0.2"],
        "arms": ["next_token", "unrolled-4-2-diagonal", "one_step", "one_step-first-iteration"],
    },
}  # fmt: skip
EVAL = ["--eval.points", "5", "--eval.k", "1", "4", "--eval.tokens", "8192"]
"""Options for evaluations during a run, from which FLOPs to reach a level are computed."""

FALLING = 0.005
"""Smallest decrease of the flat arm's NLL, in nats per token, that counts as progress when its epochs are doubled."""

MOST_EPOCHS = 128
"""Largest number of epochs with --data-limited."""


@dataclass
class Args:
    """Train, score and compare all arms at equal FLOPs. Can be stopped and continued."""

    data: Path
    """Folder made by train/prepare_data.py. Its training split is the corpus; its validation split is scored."""
    size: Literal["tiny", "gpu"] = "tiny"
    """Model size: train/configs/tiny.toml for a CPU, pythia-70m-looped.toml for a GPU."""
    arms: Names = ()
    """Arms to run. The default depends on the size; for tiny it is all arms."""
    seeds: tuple[Count, ...] = (0, 1)
    """Seeds. The smallest one sweeps the learning rates; the others use the best rate."""
    rates: tuple[Positive, ...] = ()
    """Peak learning rates to try. The default is three rates that suit the size."""
    budget_flops: tuple[Positive, ...] = ()
    """Training budget of a run, in model FLOPs. Several, separated by commas, also give the FLOPs to reach a level. The
    default suits the size."""
    data_limited: Count = 0
    """Train on this many first tokens of the corpus only. The flat arm's budget is doubled until its held-out NLL stops
    falling. The other arms then run at its best budget and the next one. 0 uses the whole corpus and --budget-flops."""
    reach: tuple[Positive, ...] = ()
    """Levels of NLL in nats per token, separated by commas, for which FLOPs to reach them are computed. The default is the
    final NLL of the best unrolled arm."""
    options: str = ""
    """Additional configuration keys for every run, e.g. "optim.weight_decay=0.3 data.batch_size=16". Use separate --work and
    --results folders for them."""
    minutes: Annotated[float | None, at_least(0)] = None
    """Time limit in minutes. Runs that would not finish in time are not started. 0 only merges results."""
    work: Path | None = None
    """Folder for run directories and logs; runs/quality-SIZE by default."""
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
    """Noise draws averaged in a likelihood."""
    score_tokens: Count = 0
    """Number of held-out tokens to score at the end of a run; 0 uses the size's default."""
    plot: Path | None = None
    """File for a figure (.svg, .png or .pdf). It shows the arms at the budget with the most arms and, for several budgets,
    the final NLL at each budget."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    arm: str
    seed: int
    rate: float
    budget: float
    limit: int = 0
    """Number of corpus tokens that the run may use; 0 means all."""

    @property
    def name(self) -> str:
        limited = f"-data{self.limit}" if self.limit else ""
        return f"{self.arm}-seed{self.seed}-lr{self.rate:g}-flops{self.budget:g}{limited}"


def choose_arms(names: Sequence[str]) -> list[str]:
    """Check names of arms, and return them in the table's order."""
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name!r}; choose from {', '.join(ARMS)}")
    return [name for name in ARMS if name in names]


class Quality:
    """The comparison of one call of this script."""

    def __init__(self, args: Args) -> None:
        self.args, size = args, SIZES[args.size]
        self.arms = choose_arms(args.arms or size["arms"])
        self.seeds = sorted(set(args.seeds))
        self.rates = sorted(set(args.rates or size["rates"]))
        self.budgets = sorted(set(args.budget_flops or [size["budget"]]))
        self.levels, self.ks = sorted(set(args.reach)), sorted(set(args.k))
        self.config = ROOT / "train/configs" / size["config"]
        self.score_tokens = args.score_tokens or size["score_tokens"]
        self.options = [*size["options"], *dotted(args.options)]
        self.data, self.work = args.data.resolve(), (args.work or ROOT / f"runs/quality-{args.size}").resolve()
        self.folder = (args.results / f"quality-{args.size}").resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        corpus = {split: open_data(self.data, split) for split in ("train", "validation")}
        self.vocab_size = load_tokenizer(self.data).vocab_size
        self.corpus = {
            "name": self.data.name, "train_tokens": corpus["train"].tokens, "held_out_tokens": corpus["validation"].tokens,
            "vocab_size": self.vocab_size, "tokenizer": corpus["train"].tokenizer_hash,
            "text_sha256": {
                split: {name: entry["text_sha256"] for name, entry in sources.items()}
                for split, sources in read_manifest(self.data)["splits"].items()
            },
        }  # fmt: skip
        if args.data_limited > corpus["train"].tokens:
            raise UserError(f"--data-limited {args.data_limited}: the corpus has {corpus['train'].tokens:,} tokens")
        on_gpu = self.resolved(Run(self.arms[0], 0, 1e-3, 1.0))[1]
        jobs = args.jobs or (1 if on_gpu else max(1, (os.cpu_count() or 1) // args.threads))
        self.slice = Slice(self.work, jobs, args.threads, args.minutes)
        self.identities: dict[str, dict[str, Any]] = {}
        self.results = self.read_results()

    # -----------------------------------------------------------------------------------------------------------------
    # One run

    def words(self, run: Run) -> list[str]:
        """Command-line arguments of train/pretrain.py for a run."""
        data = self.work / f"data-{run.limit}" if run.limit else self.data
        return [str(word) for word in (
            self.config, "--data.path", data, "--data.val_path", self.data, "--run.dir", self.work / run.name,
            "--run.threads", self.args.threads, "--run.device", self.args.device, "--run.keep", 1,
            "--run.checkpoint_every", 200, *EVAL,
            *self.options, *ARMS[run.arm],
            "--seed", run.seed, "--optim.lr", f"{run.rate:g}", "--budget.flops", f"{run.budget:g}",
        )]  # fmt: skip

    def resolved(self, run: Run) -> tuple[Config, bool]:
        """The run's complete configuration, and whether it runs on a GPU."""
        words = self.words(run)
        config = load_config(Path(words[0]), words[1:])
        config.model.vocab_size = config.model.vocab_size or self.vocab_size
        return config, choose_device(config.run.device).type == "cuda"

    def identity(self, run: Run) -> dict[str, Any]:
        """The part of the configuration that must be equal in two results with the same name."""
        if run.name not in self.identities:
            self.identities[run.name] = identity(self.resolved(run)[0])
        return self.identities[run.name]

    def scoring(self) -> dict[str, Any]:
        return {"k": self.ks, "tokens": self.score_tokens, "draws": self.args.draws}

    def do(self, run: Run, lock: int) -> None:
        """Train, score, and write the result. A run that diverges gives a result too: its learning rate is too high."""
        started, before = time.monotonic(), self.flops_done(run)
        directory, log = self.work / run.name, self.work / f"{run.name}.log"
        words, name = self.words(run), f"{run.name}.json"
        if run.limit:
            limit_corpus(self.data, self.work / f"data-{run.limit}", run.limit)
        head = {
            "arm": run.arm, "seed": run.seed, "learning_rate": run.rate, "budget_flops": run.budget, "limit": run.limit,
            "words": ARMS[run.arm], "corpus": self.corpus, "scoring": self.scoring(), "identity": self.identity(run),
        }  # fmt: skip
        score = self.work / f"{run.name}.score.json"
        try:
            if not complete(directory, run.budget):
                self.slice.call(log, lock, "train/pretrain.py", *words, "--resume")
                if not complete(
                    directory, run.budget
                ):  # after a signal the trainer saves a checkpoint and ends with status 0
                    raise Failed(f"{run.name} was stopped early; the next call continues it from its checkpoint")
            trained = time.monotonic()
            self.slice.call(
                log, lock, "benchmarks/quality/score.py", directory, "--data", self.data, "--json", score,
                "--k", listed(self.ks), "--tokens", self.score_tokens, "--draws", self.args.draws,
                "--threads", self.args.threads, "--device", self.args.device,
            )  # fmt: skip
        except Failed as error:
            if "not finite" not in str(error):
                raise
            last = read_metrics(directory / "metrics.jsonl")[-1]
            spent = {
                "flops": last["flops"],
                "tokens": last["tokens"],
                "steps": last["step"],
                "seconds": last["seconds"],
            }
            write_atomic(self.folder / name, json.dumps({**head, **spent, "failed": str(error)}))
            return
        if before < run.budget:
            self.slice.measured(run.arm, run.budget - before, trained - started)
        self.slice.measured(f"{run.arm}/score", 1, time.monotonic() - trained)
        rows = read_metrics(directory / "metrics.jsonl")
        config = config_from_json((directory / "config.json").read_text(), str(directory))
        last = rows[-1]
        write_atomic(self.folder / name, json.dumps({
            **head, "flops": last["flops"], "tokens": last["tokens"], "steps": last["step"], "seconds": last["seconds"],
            "flops_forward": last["flops_forward"], "flops_backward": last["flops_backward"],
            "peak_memory_bytes": max(row["peak_memory_bytes"] or 0 for row in rows),
            **json.loads(score.read_text()), "evaluations": [asdict(point) for point in evaluations(config, rows)],
        }))  # fmt: skip

    def flops_done(self, run: Run) -> float:
        """FLOPs that an unfinished run has saved in its newest checkpoint."""
        checkpoints = list_checkpoints(self.work / run.name)
        if not checkpoints:
            return 0.0
        step = int(checkpoints[-1].name.removeprefix("step-"))
        rows = read_metrics(self.work / run.name / "metrics.jsonl")
        return max((row["flops"] for row in rows if row["step"] <= step), default=0.0)

    def seconds(self, run: Run) -> float:
        """Estimated time of a run, or of the rest of it, from the arm's measured rate. At first a few steps measure it."""
        rate = self.slice.rate(run.arm) or self.calibrate(run)
        config, _ = self.resolved(run)
        recurrence = build_objective(config).recurrence
        score = self.slice.rate(f"{run.arm}/score")
        if score is None:  # before the first score: assume that every K starts from the beginning
            passes = sum(
                inference_cost(config.model, config.data.sequence_length, recurrence.passes(k)) for k in self.ks
            )
            draws = self.args.draws if recurrence.stochastic else 1
            score = rate / (passes * draws * self.score_tokens)
        return 1.1 * (max(0.0, run.budget - self.flops_done(run)) / rate + 1 / score) + 5

    def calibrate(self, run: Run) -> float:
        """FLOPs per second, measured on a few steps of an arm."""
        directory = self.work / f"rate-{run.arm}"
        lock = os.open(self.work / f"rate-{run.arm}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        words = [
            *self.words(Run(run.arm, run.seed, run.rate, 1e30)),
            "--run.dir",
            directory,
            "--eval.points",
            0,
            "--budget.steps",
            30,
        ]
        try:
            self.slice.call(self.work / f"rate-{run.arm}.log", lock, "train/pretrain.py", *words, "--overwrite")
        finally:
            os.close(lock)
        rows = read_metrics(directory / "metrics.jsonl")[10:]
        self.slice.measured(run.arm, rows[-1]["flops"] - rows[0]["flops"], rows[-1]["seconds"] - rows[0]["seconds"])
        return self.slice.rate(run.arm) or 1.0

    # -----------------------------------------------------------------------------------------------------------------
    # All runs

    def read_results(self) -> dict[str, Result]:
        """Results by file name, for this corpus and limit. Raises `UserError` if one contradicts this call's settings."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            result = json.loads(path.read_text())
            if (
                result["corpus"]["text_sha256"] != self.corpus["text_sha256"]
                or result["limit"] != self.args.data_limited
            ):
                continue
            run = Run(result["arm"], result["seed"], result["learning_rate"], result["budget_flops"], result["limit"])
            if run.arm in ARMS:
                key = contradiction(result["identity"], self.identity(run))
                if key:
                    raise UserError(
                        f"{path} was made with another {key}: remove it to repeat the run, or choose another --results"
                    )
            if result["scoring"] != self.scoring() and "failed" not in result:
                if run.arm in self.arms and complete(self.work / run.name, run.budget):
                    continue  # it is scored again
                raise UserError(f"{path} was scored with {result['scoring']}, and its run is not in {self.work}: use the"
                                " same --k, --score-tokens and --draws, or remove it")  # fmt: skip
            found[path.stem] = result
        return found

    def wanted(self) -> Iterator[Run]:
        """The runs of this call that are known so far, by falling priority."""
        if self.args.data_limited:
            yield from self.wanted_limited()
            return
        for budget in self.budgets:
            yield from self.sweep(self.arms, budget)
        for budget in self.budgets:
            for arm in self.arms:
                yield from self.more_seeds(arm, budget)

    def sweep(self, arms: Sequence[str], budget: float) -> Iterator[Run]:
        for rate in middle_first(self.rates):
            for arm in arms:
                yield Run(arm, self.seeds[0], rate, budget, self.args.data_limited)

    def more_seeds(self, arm: str, budget: float) -> Iterator[Run]:
        rate = tables.best_rate(self.results.values(), arm, budget)
        swept = all(run.name in self.results for run in self.sweep([arm], budget))
        if swept and rate is not None:
            for seed in self.seeds[1:]:
                yield Run(arm, seed, rate, budget, self.args.data_limited)

    def ladder(self) -> list[float]:
        """Budgets for --data-limited: 2, 4, 8... epochs of the flat arm."""
        config, _ = self.resolved(Run(FLAT, 0, 1e-3, 1.0))
        epoch = step_cost(config, build_objective(config).passes(Rng(0, 0), 0.0)).total * self.args.data_limited
        return [float(f"{epoch * 2**n:.3g}") for n in range(1, int(math.log2(MOST_EPOCHS)) + 1)]

    def flat_ladder(self) -> tuple[list[tuple[float, float]], bool]:
        """The flat arms' (budget, lowest NLL) so far, and whether the NLL has stopped falling."""
        flat, points = [arm for arm in self.arms if is_flat(arm)], list[tuple[float, float]]()
        for budget in self.ladder():
            if not all(run.name in self.results for run in self.sweep(flat, budget)):
                return points, False
            runs = [result for result in self.results.values() if result["budget_flops"] == budget]
            points.append((budget, min((tables.level(run) for run in runs if is_flat(run["arm"])), default=math.inf)))
            if len(points) > 1 and points[-1][1] > points[-2][1] - FALLING:
                return points, True
        return points, True

    def wanted_limited(self) -> Iterator[Run]:
        flat, others = ([arm for arm in self.arms if is_flat(arm) == kind] for kind in (True, False))
        if not flat:
            raise UserError(f"--data-limited needs a flat arm among --arms: {FLAT}")
        points, ended = self.flat_ladder()
        for budget in self.ladder()[: len(points) + (not ended)]:
            yield from self.sweep(flat, budget)
        if ended:
            best = min(points, key=lambda point: point[1])[0]
            for budget in (budget for budget, _ in points if budget >= best):
                yield from self.sweep(others, budget)
            for arm, budget in self.best_budgets().items():
                yield from self.more_seeds(arm, budget)

    def best_budgets(self) -> dict[str, float]:
        """For each arm, the budget with its lowest NLL."""
        best: dict[str, Result] = {}
        for result in self.results.values():
            arm = result["arm"]
            if result["seed"] == self.seeds[0] and tables.level(result) < (
                tables.level(best[arm]) if arm in best else math.inf
            ):
                best[arm] = result
        return {arm: result["budget_flops"] for arm, result in best.items()}

    def pending(self) -> list[Run]:
        for run in self.wanted():  # another process may have finished some of them
            if run.name not in self.results and (path := self.folder / f"{run.name}.json").exists():
                result = json.loads(path.read_text())
                if result["scoring"] == self.scoring():
                    self.results[run.name] = result
        runs = [run for run in self.wanted() if run.name not in self.results]
        for run in runs:  # not in the threads of `do`, because the parser redirects standard error of the whole process
            self.identity(run)
        return runs

    def finished(self, run: Run) -> None:
        path = self.folder / f"{run.name}.json"
        if path.exists():
            result = self.results[run.name] = json.loads(path.read_text())
            what = result.get("failed") or f"NLL {result['nll_best']:.3f} at K = {result['best_k']}"
            print(f"done  {run.name}: {what}, {result['seconds']:.0f} s", file=sys.stderr)
            self.merge()

    # -----------------------------------------------------------------------------------------------------------------
    # Output

    def merge(self) -> str:
        """Write the merged file and return the tables in Markdown."""
        results = list(self.results.values())
        names = [*ARMS, *sorted({result["arm"] for result in results} - set(ARMS))]
        if self.args.data_limited:
            best = self.best_budgets()
            stop = max((best[arm] for arm in best if is_flat(arm)), default=0.0)
            arms = {arm: tables.arm_entry(results, arm, best[arm]) for arm in names if arm in best}
            text = tables.table(results, list(best), stop, best)
            merged = {
                "budget_flops": stop,
                "limit": self.args.data_limited,
                "flat": self.flat_ladder()[0] if best else [],
            }
            merged |= {"best_budgets": best, "arms": arms, "sweep": tables.sweep_cost(results, best, all_budgets=True)}
        else:
            budgets = sorted({result["budget_flops"] for result in results})
            by_budget = {
                budget: {arm: entry for arm in names if (entry := tables.arm_entry(results, arm, budget)) is not None}
                for budget in budgets
            }
            main = self.budgets[-1] if self.budgets[-1] in budgets else max(budgets, default=self.budgets[-1])
            text = (
                "No run is complete yet."
                if not budgets
                else "\n\n".join(f"{budget:g} FLOPs\n\n{tables.table(results, names, budget)}" for budget in budgets)
            )
            reached = self.reached(results, names, budgets, main)
            merged = {
                "budget_flops": main, "arms": by_budget.get(main, {}),
                "sweep": tables.sweep_cost(results, dict.fromkeys(names, main)),
                "other_budgets": [{"budget_flops": b, "arms": by_budget[b]} for b in budgets if b != main],
                "reach": [{"nll": nll, "why": why, "arms": found} for nll, why, found in reached],
            }  # fmt: skip
            text += "".join("\n\n" + tables.reach_table(nll, found, why) for nll, why, found in reached)
        merged = {"size": self.args.size, "corpus": self.corpus, **merged}
        limited = f"-data{self.args.data_limited}" if self.args.data_limited else ""
        write_atomic(self.folder.with_name(f"{self.folder.name}{limited}.json"), json.dumps(merged, indent=1) + "\n")
        return text

    def reached(
        self, results: Sequence[Result], arms: Sequence[str], budgets: Sequence[float], main: float
    ) -> list[tuple[float, str, dict[str, Any]]]:
        levels = [(nll, "asked for") for nll in self.levels]
        ends = {
            arm: min(tables.mean_by_k(entry["seeds"]).values())
            for arm in arms
            if arm.startswith("unrolled") and (entry := tables.arm_entry(results, arm, main)) is not None
        }
        if ends and not levels:
            best = min(ends, key=lambda arm: ends[arm])
            levels = [(ends[best], f"the end of {best} at {main:.2e} FLOPs")]
        found = [name for name in arms if any(result["arm"] == name for result in results)]
        return [(nll, why, tables.flops_to_reach(results, found, budgets, nll)) for nll, why in levels]


def main(args: Args) -> int:
    if args.plot is not None:
        if args.plot.suffix not in (".svg", ".png", ".pdf"):
            raise UserError(f"--plot {args.plot}: its name must end in .svg, .png or .pdf")
        check_output(args.plot)
    quality = Quality(args)
    if args.minutes == 0:
        left = quality.pending()
    else:
        quality.slice.claim({"corpus": quality.corpus["text_sha256"], "options": quality.options})
        left = quality.slice.run(quality.pending, quality.do, quality.seconds, quality.finished)
    print(quality.merge())
    if args.plot is not None:
        budgets = quality.budgets
        if args.data_limited:
            budgets = sorted({result["budget_flops"] for result in quality.results.values()})
        if not budgets or not plot(quality.results.values(), quality.arms, budgets, args.plot):
            print("no figure, because no run is complete", file=sys.stderr)
    if left:
        names = ", ".join(run.name for run in left[:6]) + (", ..." if len(left) > 6 else "")
        print(f"\nLeft: {len(left)} runs known so far ({names}); repeat the command to continue.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(Args, main)
