"""Compare image networks that are trained in blocks with end-to-end training, at equal FLOPs (arXiv 2506.14202).

python benchmarks/paper/vision.py --data DIR [--arms A,B] [--seeds 0,1] [--budget-flops 1e14] [--minutes 50]
python benchmarks/paper/vision.py --data DIR --arms dit-1,dit-3 --extractor FILE

DIR is made by train/prepare_images.py with a validation and a test split. Arms that classify (ViT):

  vit            the plain network of 12 layers, end to end
  vit-4          the plain network with 4 layers: the size of one block of three
  vit-4x3        the averaged probabilities of three plain networks of 4 layers, each with a third of the budget
  blocks-1       12 layers conditioned on the noise level, in one block
  blocks-3       three blocks that train alone
  blocks-3-uniform   the same with noise ranges of equal width in ln sigma

Arms that generate (DiT):

  dit-1, dit-2, dit-3    one to three blocks
  dit-3-gamma0           three blocks without overlap
  dit-3-uniform          the same with noise ranges of equal width in ln sigma

The learning rate of each family (plain, blocks, dit) is chosen first, by short runs of its arm in RATED that are scored on
the validation split. The test split is scored once, at the end of each run. Each arm and seed writes one result file,
RESULTS/vision/DATA/NAME.json. The command can be killed and repeated to continue; several calls share the work.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from benchmarks.quality.runs import complete, dotted
from benchmarks.slices import ROOT, Slice
from recurrent_db.arguments import Names, run_command
from recurrent_db.data import open_images
from recurrent_db.errors import UserError
from recurrent_db.evaluation.image_metrics import load_extractor
from recurrent_db.files import write_atomic
from recurrent_db.schema import Count, Positive, PositiveInt, at_least
from recurrent_db.store.metrics import read_metrics


@dataclass(frozen=True)
class Arm:
    """One way to train a network."""

    family: str
    """The arms of a family share their learning rate."""
    words: tuple[str, ...]
    members: int = 1
    """Number of networks whose probabilities are averaged. They share the budget."""


PLAIN = ("--objective.name", "classify", "--model.n_blocks", "0")
GAMMA0 = ("--model.n_blocks", "3", "--blocks.gamma", "0")
UNIFORM = ("--blocks.partition", "uniform")
ARMS: dict[str, Arm] = {
    "vit": Arm("plain", PLAIN),
    "blocks-3": Arm("blocks", ("--model.n_blocks", "3")),
    "vit-4": Arm("plain", (*PLAIN, "--model.n_core", "4")),
    "blocks-1": Arm("blocks", ("--model.n_blocks", "1")),
    "blocks-3-uniform": Arm("blocks", ("--model.n_blocks", "3", *UNIFORM)),
    "vit-4x3": Arm("plain", (*PLAIN, "--model.n_core", "4"), members=3),
    "dit-3": Arm("dit", ("--model.n_blocks", "3")),
    "dit-1": Arm("dit", ("--model.n_blocks", "1")),
    "dit-3-gamma0": Arm("dit", GAMMA0),
    "dit-3-uniform": Arm("dit", (*GAMMA0, *UNIFORM)),
    "dit-2": Arm("dit", ("--model.n_blocks", "2")),
}
RATED = {"plain": "vit", "blocks": "blocks-3", "dit": "dit-3"}
"""The arm whose short runs choose the rate of a family."""
CONFIGS = {"plain": "vit-blocks", "blocks": "vit-blocks", "dit": "dit-blocks"}
SCORES = {"plain": "eval/nll_k1", "blocks": "eval/nll_k3", "dit": "eval/loss"}
"""The validation score, lower is better, by which the rate of a family is chosen."""
RATE_SHARE = 5
"""A short run has the budget divided by this."""


@dataclass
class Args:
    """Compare image networks trained in blocks with end-to-end training, at equal FLOPs."""

    data: Path
    """Folder made by train/prepare_images.py."""
    arms: Names = ("vit", "blocks-3", "vit-4", "blocks-1", "blocks-3-uniform", "vit-4x3")
    """Arms to run, most important first."""
    seeds: tuple[Count, ...] = (0, 1)
    """Seeds."""
    rates: tuple[Positive, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates to choose from. A single one is used without a choice."""
    budget_flops: Positive = 1e14
    """Training budget of an arm, in model FLOPs."""
    options: str = ""
    """Additional configuration keys for every run, e.g. "model.d_model=32". Use separate --work and --results for them."""
    extractor: Path | None = None
    """Extractor of features made by benchmarks/paper/image_metric.py. Arms that generate need it."""
    samples: PositiveInt = 5000
    """Images to generate."""
    sampler_steps: PositiveInt = 24
    """Euler steps of each image."""
    guidance: float = 2.0
    """Strength of classifier-free guidance."""
    minutes: Annotated[float | None, at_least(0)] = None
    """Time limit in minutes. Jobs that would not finish in time are not started. 0 only prints the existing results."""
    work: Path = ROOT / "runs/vision"
    """Folder for run directories and logs."""
    results: Path = ROOT / "benchmarks/results"
    """Folder for the results."""
    threads: PositiveInt = 1
    """CPU threads of each run."""
    jobs: PositiveInt = 1
    """Number of arms to run in parallel."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""


@dataclass(frozen=True)
class Job:
    """An arm and a seed, or with a rate a short run that helps to choose the rate."""

    arm: str
    seed: int
    rate: float = 0.0

    @property
    def name(self) -> str:
        return f"rate-{self.arm}-{self.rate:g}" if self.rate else f"{self.arm}-seed{self.seed}"


class Comparison:
    """The comparison of one call of this script."""

    def __init__(self, args: Args) -> None:
        self.args, self.data = args, args.data.resolve()
        for name in args.arms:
            if name not in ARMS:
                raise UserError(f"unknown arm {name!r}; choose from {', '.join(ARMS)}")
        self.options = dotted(args.options)
        splits = {split: open_images(self.data, split) for split in ("train", "validation", "test")}
        if any(ARMS[name].family == "dit" for name in args.arms):
            if args.extractor is None:
                raise UserError("arms that generate need --extractor: make one with benchmarks/paper/image_metric.py")
            self.extractor, extractor = args.extractor.resolve(), load_extractor(args.extractor).hash
        else:
            extractor = None
        self.work, self.folder = (
            args.work.resolve() / self.data.name,
            (args.results / "vision" / self.data.name).resolve(),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.slice = Slice(self.work, args.jobs, args.threads, args.minutes)
        self.made_with = {"data": splits["train"].hash, "options": args.options}
        self.call = {**self.made_with, "budget_flops": args.budget_flops}
        generates = {"samples": args.samples, "sampler_steps": args.sampler_steps, "guidance": args.guidance,
                     "extractor": extractor}  # fmt: skip
        self.own_call = {"plain": {}, "blocks": {}, "dit": generates}
        self.jobs = [Job(name, seed) for seed in sorted(set(args.seeds)) for name in args.arms]
        self.results = {job.name: found for job in self.jobs if (found := self.read(job)) is not None}

    def read(self, job: Job) -> dict[str, Any] | None:
        """The result of a job that is done.

        Raises:
            UserError: it was made with other settings.
        """
        path = self.folder / f"{job.name}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        for key, value in {**self.call, **self.own_call[ARMS[job.arm].family]}.items():
            if found["call"].get(key) != value:
                raise UserError(f"{path} was made with another {key}: remove it, or choose another --results")
        return dict(found)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def rate(self, family: str) -> float | None:
        """The chosen rate of a family; None while short runs are missing."""
        scores = {}
        for rate in self.args.rates:
            run = self.run_dir(Job(RATED[family], 0, rate))
            if len(self.args.rates) == 1:
                return rate
            if not complete(run, self.args.budget_flops / RATE_SHARE):
                return None
            scores[rate] = read_metrics(run / "metrics.jsonl")[-1][SCORES[family]]
        return min(scores, key=lambda rate: scores[rate])

    def pending(self) -> Iterator[Job]:
        for job in self.jobs:
            if job.name in self.results:
                continue
            if (found := self.read(job)) is not None:
                self.results[job.name] = found
                continue
            family = ARMS[job.arm].family
            if self.rate(family) is not None:
                yield job
                continue
            for rate in self.args.rates:
                short = Job(RATED[family], 0, rate)
                if not complete(self.run_dir(short), self.budget(short)):
                    yield short

    def budget(self, job: Job) -> float:
        """FLOPs of one run of a job."""
        return self.args.budget_flops / (RATE_SHARE if job.rate else ARMS[job.arm].members)

    def seconds(self, job: Job) -> float:
        rate = self.slice.rate(ARMS[job.arm].family)
        return self.budget(job) * (1 if job.rate else ARMS[job.arm].members) / rate if rate else 0.0

    def run_dir(self, job: Job, member: int = 0) -> Path:
        return self.work / (job.name if not member else f"{job.name}-member{member}")

    def do(self, job: Job, lock: int) -> None:
        """Train, and unless the job only helps to choose a rate, score and write the result."""
        arm, started, log = ARMS[job.arm], time.monotonic(), self.work / f"{job.name}.log"
        rate = job.rate or self.rate(arm.family)
        runs = [self.run_dir(job, member) for member in range(1 if job.rate else arm.members)]
        for member, run in enumerate(runs):
            if not complete(run, self.budget(job)):
                words = (
                    ROOT / f"train/configs/{CONFIGS[arm.family]}.toml", "--data.path", self.data, "--optim.lr", rate,
                    "--run.threads", self.args.threads, "--run.device", self.args.device, "--run.keep", 1,
                    "--eval.points", 2, *self.options, *arm.words,
                    "--seed", job.seed + 100 * member, "--run.dir", run, "--budget.flops", f"{self.budget(job):.6g}",
                )  # fmt: skip
                self.slice.call(log, lock, "train/pretrain.py", *words, "--resume")
        self.slice.measured(arm.family, self.budget(job) * len(runs), time.monotonic() - started)
        if job.rate:
            return
        score = self.work / f"{job.name}.score.json"
        common = (*runs, "--data", self.data, "--json", score, "--device", self.args.device)
        if arm.family == "dit":
            self.slice.call(
                log, lock, "eval/images.py", *common, "--samples", self.args.samples, "--guidance", self.args.guidance,
                "--sampler-steps", self.args.sampler_steps, "--extractor", self.extractor,
                "--grid", self.work / f"{job.name}.png",
            )  # fmt: skip
        else:
            self.slice.call(log, lock, "benchmarks/paper/vision_score.py", *common)
        rows = [read_metrics(run / "metrics.jsonl")[-1] for run in runs]
        sums = {name: sum(row[name] for row in rows) for name in ("flops", "seconds", "step")}
        call = {**self.call, **self.own_call[arm.family]}
        result = {"arm": job.arm, "seed": job.seed, "rate": rate, **sums, **json.loads(score.read_text()), "call": call}
        write_atomic(self.folder / f"{job.name}.json", json.dumps(result))

    def finished(self, job: Job) -> None:
        if not job.rate and (found := self.read(job)) is not None:
            self.results[job.name] = found
            print(f"done {job.name}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def correct(found: dict[str, Any], column: str) -> np.ndarray:
    """Whether each test image was classified rightly, float64 (N,)."""
    packed = np.frombuffer(bytes.fromhex(found["correct"][column]), np.uint8)
    return np.unpackbits(packed, count=found["images"]).astype(np.float64)


def read_outs(found: dict[str, Any]) -> dict[str, str]:
    """The predictions of an arm to print: a name and its column."""
    blocks = int(found["blocks"])
    if blocks <= 1:
        return {found["arm"]: "1"}
    alone = {f"{found['arm']}, block {b} alone": f"block {b}" for b in range(1, blocks + 1)}
    return {**alone, found["arm"]: str(blocks), f"{found['arm']}, {2 * blocks} steps": str(2 * blocks)}


def classification_table(results: list[dict[str, Any]]) -> list[str]:
    """Rows of a Markdown table: accuracy in percent by seed, its mean, and the difference to `vit`.

    The 95 percent interval is that of the images' paired differences, averaged over seeds.
    """
    by_name: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for found in results:
        for name, column in read_outs(found).items():
            by_name.setdefault(name, []).append((found, column))
    lines = ["| read-out | FLOPs | accuracy by seed, percent | NLL, nats | mean | minus vit |", "|" + " --- |" * 6]
    control = {found["seed"]: correct(found, column) for found, column in by_name.get("vit", [])}
    for name, entries in by_name.items():
        entries = sorted(entries, key=lambda entry: entry[0]["seed"])
        each = [correct(found, column) for found, column in entries]
        nlls = ", ".join(f"{found['nll'][column]:.3f}" for found, column in entries)
        paired = [
            (own, control[found["seed"]])
            for own, (found, _) in zip(each, entries, strict=True)
            if found["seed"] in control
        ]
        gap = "-"
        if paired and name != "vit":
            difference = 100 * np.mean([own - other for own, other in paired], axis=0)
            gap = f"{difference.mean():+.2f} ± {1.96 * difference.std() / math.sqrt(len(difference)):.2f}"
        shares = ", ".join(f"{100 * own.mean():.2f}" for own in each)
        lines.append(
            f"| {name} | {entries[0][0]['flops']:.3g} | {shares} | {nlls} | {100 * np.mean(each):.2f} | {gap} |"
        )
    return lines


def generation_table(results: list[dict[str, Any]]) -> list[str]:
    """Rows of a Markdown table: Fréchet distance and KID by seed, beside the floor."""
    lines = ["| arm | seed | FLOPs | Fréchet distance | KID | floor |", "|" + " --- |" * 6]
    for found in results:
        score, floor = found["distance"], found["floor"]
        lines.append(
            f"| {found['arm']} | {found['seed']} | {found['flops']:.3g} | {score['frechet']:.3f} | {score['kid']:.4f}"
            f" ± {score['kid_std']:.4f} | {floor['frechet']:.3f} |"
        )
    return lines


def table(results: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    classify = [found for found in results if ARMS[found["arm"]].family != "dit"]
    generate = [found for found in results if ARMS[found["arm"]].family == "dit"]
    parts = [classification_table(classify)] * bool(classify) + [generation_table(generate)] * bool(generate)
    return "\n\n".join("\n".join(lines) for lines in parts)


def main(args: Args) -> int:
    comparison = Comparison(args)
    left = list(comparison.pending())
    if args.minutes != 0:
        comparison.slice.claim(comparison.made_with)
        left = comparison.slice.run(
            lambda: list(comparison.pending()), comparison.do, comparison.seconds, comparison.finished
        )
    print(table(list(comparison.results.values())))
    if left:
        print(
            f"\nLeft: {', '.join(dict.fromkeys(job.name for job in left))}; repeat the command to continue.",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    run_command(Args, main)
