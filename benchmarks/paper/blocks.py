"""Compare blocks that are trained separately with end-to-end training, at equal FLOPs per layer.

python benchmarks/paper/blocks.py --data DIR [--arms A,B] [--seeds 0,1] [--budget-flops 3e13] [--judge JUDGE] [--minutes 50]
python benchmarks/paper/blocks.py --data CHARACTERS --arms masked-1,masked-3
python benchmarks/paper/blocks.py --memory

An arm's budget is divided among its blocks in proportion to their layers. Each block is a separate run of train/pretrain.py.
The block that trains the embedding runs first, and the others start from its embedding. The blocks are then joined and
scored as one model. Arms:

  next_token     the plain network
  blocks-1       the same network with noise conditioning and two streams
  *-uniform      noise ranges of equal width
  *-frozen       the embedding stays as initialised
  *-swap         block 2 is trained again with another seed and joined to the other blocks of that arm

Held-out text is scored by the NLL at sigma_max (K = 1) and, at K = B, by the likelihood of draws and the bound
(recurrent_db/denoise/bound.py). Samples are scored by distinct-2 and, with --judge (see eval/train_judge.py), by generative
perplexity and MAUVE. Masked arms are scored in bits per character, by the bound. Each arm and seed writes one result file,
RESULTS/blocks/NAME.json. The command can be killed and repeated to continue.

--memory instead measures the memory of one training step, parameters and optimizer included, for B = 1, 2, 3, 4, 6.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from benchmarks.quality.runs import complete, dotted
from benchmarks.slices import ROOT, Slice
from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.arguments import Names, run_command
from recurrent_db.config import load_config
from recurrent_db.data import Batch, open_data, read_manifest
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.block_choice import freeze_shared
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.rng import Rng
from recurrent_db.schema import Count, Positive, PositiveInt, at_least
from recurrent_db.store.folder import list_checkpoints
from recurrent_db.store.metrics import read_metrics


@dataclass(frozen=True)
class Arm:
    """One way to train the network."""

    blocks: int = 0
    """Number of blocks B. 0: the plain network, end to end."""
    words: tuple[str, ...] = ()
    masked: bool = False
    swap: str = ""
    """The arm whose block 2 is trained again."""


PLAIN = ("--objective.name", "next_token", "--model.n_blocks", "0")
ARMS: dict[str, Arm] = {
    "next_token": Arm(0, PLAIN),
    **{f"blocks-{b}": Arm(b) for b in (1, 2, 3, 4, 6)},
    **{f"blocks-{b}-uniform": Arm(b, ("--blocks.partition", "uniform")) for b in (2, 3, 4, 6)},
    "blocks-4-frozen": Arm(4, ("--blocks.shared", "frozen")),
    "blocks-4-swap": Arm(4, swap="blocks-4"),
    **{f"masked-{b}": Arm(b, masked=True) for b in (1, 3)},
}


@dataclass
class Args:
    """Compare models whose blocks are trained separately with end-to-end training, or measure a step's memory."""

    data: Path | None = None
    """Folder made by train/prepare_data.py. Its training split is the corpus; its validation split is scored. Masked arms
    need a character tokenizer."""
    arms: Names = ()
    """Arms to run. The default is all arms that are not masked."""
    seeds: tuple[Count, ...] = (0, 1)
    """Seeds."""
    config: Path = ROOT / "train/configs/gpt-blocks.toml"
    """Configuration with the model's shape; gpt-blocks-768.toml has the paper's."""
    masked_config: Path = ROOT / "train/configs/masked-blocks.toml"
    """Configuration with the shape of the masked arms."""
    budget_flops: Positive = 3e13
    """Training budget of an arm over all its blocks, in model FLOPs."""
    options: str = ""
    """Additional configuration keys for every run, e.g. "optim.lr=1e-3 model.d_model=64". Use separate --work and --results
    folders for them."""
    draws: PositiveInt = 16
    """Noise draws averaged in a likelihood; diffusion times per block and sequence for masked arms."""
    score_tokens: PositiveInt = 32_768
    """Number of held-out tokens to score."""
    judge: Path | None = None
    """Run directory of a judge, made by eval/train_judge.py. Without it, generative perplexity and MAUVE are left out."""
    minutes: Annotated[float | None, at_least(0)] = None
    """Time limit in minutes. Jobs that would not finish in time are not started. 0 only prints the existing results."""
    work: Path = ROOT / "runs/blocks"
    """Folder for run directories and logs."""
    results: Path = ROOT / "benchmarks/results"
    """Folder for the results."""
    threads: PositiveInt = 1
    """CPU threads of each run."""
    jobs: PositiveInt = 1
    """Number of arms to run in parallel."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    memory: bool = False
    """Measure the memory of a training step instead."""


@dataclass(frozen=True)
class Job:
    """An arm and a seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


class Comparison:
    """The comparison of one call of this script."""

    def __init__(self, args: Args) -> None:
        if args.data is None:
            raise UserError("--data is missing: give a folder made by train/prepare_data.py")
        self.args, self.data = args, args.data.resolve()
        self.judge = args.judge.resolve() if args.judge is not None else None
        if self.judge is not None and not list_checkpoints(self.judge):
            raise UserError(
                f"--judge {args.judge} is not a run directory with a checkpoint (make one with eval/train_judge.py)"
            )
        names = args.arms or [name for name, arm in ARMS.items() if not arm.masked]
        for name in names:
            if name not in ARMS:
                raise UserError(f"unknown arm {name!r}; choose from {', '.join(ARMS)}")
        self.budget = args.budget_flops
        self.jobs = [Job(name, seed) for seed in sorted(set(args.seeds)) for name in names]
        self.work, self.folder = args.work.resolve(), (args.results / "blocks").resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.slice = Slice(self.work, args.jobs, args.threads, args.minutes)
        self.head = {
            "budget_flops": self.budget, "options": args.options, "draws": args.draws, "score_tokens": args.score_tokens,
            "corpus": {split: {name: entry["text_sha256"] for name, entry in sources.items()}
                       for split, sources in read_manifest(self.data)["splits"].items()},
        }  # fmt: skip
        open_data(self.data, "validation")
        self.results = {job.name: found for job in self.jobs if (found := self.read(job)) is not None}

    def read(self, job: Job) -> dict[str, Any] | None:
        path = self.folder / f"{job.name}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        for key, value in self.head.items():
            if found["call"][key] != value:
                raise UserError(f"{path} was made with another {key}: remove it, or choose another --results")
        return dict(found)

    def pending(self) -> Iterator[Job]:
        for job in self.jobs:
            before = ARMS[job.arm].swap
            ready = not before or (self.folder / f"{before}-seed{job.seed}.json").exists()
            if job.name not in self.results and ready and (found := self.read(job)) is None:
                yield job
            elif job.name not in self.results and ready and found is not None:
                self.results[job.name] = found

    def seconds(self, job: Job) -> float:
        rate = self.slice.rate(job.arm)
        return self.budget / rate if rate else 0.0

    def words(self, arm: Arm, seed: int, directory: Path, budget: float) -> list[str]:
        args = self.args
        config = args.masked_config if arm.masked else args.config
        blocks = ["--model.n_blocks", arm.blocks] if arm.blocks else []
        return [str(word) for word in (
            config.resolve(), "--data.path", self.data, "--run.threads", args.threads,
            "--run.device", args.device, "--run.keep", 1, "--run.checkpoint_every", 200, "--eval.points", 1,
            "--eval.tokens", 4096, "--eval.k", 1, *dotted(args.options), *blocks, *arm.words,
            "--seed", seed, "--run.dir", directory, "--budget.flops", f"{budget:.6g}",
        )]  # fmt: skip

    def train(self, job: Job, lock: int, words: list[str]) -> None:
        directory, budget = Path(words[words.index("--run.dir") + 1]), float(words[words.index("--budget.flops") + 1])
        if not complete(directory, budget):
            self.slice.call(self.work / f"{job.name}.log", lock, "train/pretrain.py", *words, "--resume")

    def do(self, job: Job, lock: int) -> None:
        """Train, join, score, and write the result."""
        arm, started, log = ARMS[job.arm], time.monotonic(), self.work / f"{job.name}.log"
        place = self.work / job.name
        place.mkdir(parents=True, exist_ok=True)
        extra: dict[str, Any] = {}
        if arm.blocks <= 1:
            whole = ["--blocks.shared", "all"] if arm.blocks else []
            self.train(job, lock, [*self.words(arm, job.seed, place / "whole", self.budget), *whole])
            last = read_metrics(place / "whole" / "metrics.jsonl")[-1]
            extra = {name: last[name] for name in ("flops", "tokens", "seconds", "step")}
            final = place / "whole"
        else:
            final = place / "joined"
            runs = self.train_blocks(job, arm, lock, place)
            self.slice.call(log, lock, "-m", "recurrent_db", "blocks", "join", *runs, final, "--overwrite", "True")
            extra["blocks"] = json.loads((final / "blocks.json").read_text())["blocks"]
            for name in ("flops", "tokens", "seconds"):
                extra[name] = sum(block[name] for block in extra["blocks"].values())
        score = self.work / f"{job.name}.score.json"
        common = ["--data", self.data, "--json", score, "--draws", self.args.draws, "--device", self.args.device]
        if arm.masked:
            self.slice.call(
                log, lock, "eval/masked.py", final, *common, "--tokens", self.args.score_tokens, "--samples", 2
            )
        else:
            # Score end-to-end models at the other arms' K too, to separate the effect of K from that of the blocks.
            ks = {0: "1", 1: "1,2,3,4,6"}.get(arm.blocks, f"1,{arm.blocks}")
            self.slice.call(log, lock, "benchmarks/quality/score.py", final, *common, "--tokens", self.args.score_tokens,
                            "--k", ks, "--threads", self.args.threads)  # fmt: skip
            if self.judge is not None:
                text = self.work / f"{job.name}.text.json"
                self.slice.call(log, lock, "eval/generation.py", final, "--judge", self.judge, "--data", self.data,
                                "--k", ks, "--decodings", "t=1", "--each", 1, "--resamples", 0, "--json", text,
                                "--device", self.args.device)  # fmt: skip
                extra["judged"] = json.loads(text.read_text())["rows"]
        if "blocks" not in extra:
            extra["blocks"] = {}
        self.slice.measured(job.arm, self.budget, time.monotonic() - started)
        scored = json.loads(score.read_text())
        if "tokens" in scored:
            scored["scored_tokens"] = scored.pop("tokens")
        result = {**scored, "arm": job.arm, "seed": job.seed, "call": self.head,
                  "machine": platform.processor() or platform.machine(), "device": self.args.device, **extra}  # fmt: skip
        write_atomic(self.folder / f"{job.name}.json", json.dumps(result))

    def train_blocks(self, job: Job, arm: Arm, lock: int, place: Path) -> list[Path]:
        """Train the blocks and return the runs to join."""
        if arm.swap:
            before = self.work / f"{arm.swap}-seed{job.seed}"
            words = self.words(ARMS[arm.swap], job.seed + 1000, place / "block-2", self.budget / arm.blocks)
            self.train(job, lock, [*words, "--blocks.only", "2", "--init.from", str(before / "block-1")])
            return [before / "joined", place / "block-2"]
        runs = [place / f"block-{number}" for number in range(1, arm.blocks + 1)]
        config = load_config(Path(self.words(arm, 0, place, 1.0)[0]), self.words(arm, 0, place, 1.0)[1:])
        for number, run in enumerate(runs, 1):
            share = config.model.block_layers[number - 1] / config.model.n_core
            given = ["--blocks.only", str(number)]
            if number > 1 and config.blocks.shared == "owned":
                given += ["--init.from", str(runs[0])]
            self.train(job, lock, [*self.words(arm, job.seed, run, self.budget * share), *given])
        return runs

    def finished(self, job: Job) -> None:
        found = self.read(job)
        if found is not None:
            self.results[job.name] = found
            print(f"done {job.name}: {row(found)}", file=sys.stderr)


def row(found: dict[str, Any]) -> str:
    """One result as a row of a Markdown table."""
    name = f"| {found['arm']} | {found['seed']} | {found['flops']:.3g} | {found['tokens']:,} |"
    if "bits_per_character" in found:
        return f"{name} {found['bits_per_character']:.4f} bits per character (± {found['stderr']:.3f} nats per token) |"
    blocks = len(found["blocks"]) or 1
    mixture = f"{found['nll_by_k'][str(blocks)]:.3f}" if blocks > 1 else "-"
    text = found["text"]
    bound = f"{found['bound_by_k'][str(blocks)]:.3f}" if blocks > 1 else "-"
    line = f"{name} {found['nll_by_k']['1']:.3f} | {mixture} | {bound} |"
    line += f" {text['distinct_2']:.3f} ({text['held_out_distinct_2']:.3f}) |"
    for judged in (r for r in found.get("judged", []) if r["name"] == "model"):
        cells = [f"{judged[key]:.3f}" if judged[key] is not None else "-" for key in ("generative_ppl", "mauve")]
        line += f" K = {judged['k']}: gen-PPL {cells[0]}, MAUVE {cells[1]}, dist-2 {judged['distinct_2']:.3f} |"
    return line


COLUMNS = ("arm", "seed", "FLOPs", "tokens", "NLL at sigma_max", "mixture NLL at K = B", "bound at K = B",
           "distinct-2 (real text)")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory_of(args: Args, *words: str) -> tuple[int, int]:
    """(total bytes, bytes of the shared tables with their gradient and optimizer state): the largest number of bytes in use
    while a model and its optimizer are built and two steps are made."""
    config = load_config(args.config, [*words, *dotted(args.options)])
    config.model.vocab_size = config.model.vocab_size or 1024
    length, size = config.data.sequence_length, config.data.batch_size
    ids = torch.randint(config.model.vocab_size, (size, length + 1), generator=torch.Generator().manual_seed(0))
    docs = torch.zeros(size, length, dtype=torch.int32)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), docs, torch.arange(size))
    tables = 0

    def run() -> None:
        nonlocal tables
        model, objective = build_model(config.model, 0, "cpu", config.blocks.only), build_objective(config)
        freeze_shared(config, model)
        optimizer = build_optimizer(model, config.optim)
        for step in range(2):
            objective(model, batch, Rng(0, step), 0.0)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weight = model.embedding.weight
        tables = weight.nbytes * (4 if weight.requires_grad else 1)  # with a gradient and two moments

    return peak_live_bytes(run), tables


def memory_table(args: Args) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    block = ["--blocks.shared", "owned"]
    for name, words in (
        ("plain network, end to end", list(PLAIN)),
        *((f"B = {b}, block {n}", ["--model.n_blocks", str(b), "--blocks.only", str(n), *block,
                                  *(["--init.from", "-"] if n > 1 else [])])
          for b in (1, 2, 3, 4, 6) for n in ((1,) if b == 1 else (1, 2))),
    ):  # fmt: skip
        total, tables = memory_of(args, *words)
        rows.append({"name": name, "bytes": total, "tables_bytes": tables, "rest_bytes": total - tables})
    whole = next(r for r in rows if r["name"].startswith("B = 1"))
    plain = rows[0]
    for entry in rows:
        entry["ratio"] = entry["bytes"] / whole["bytes"]
        entry["rest_ratio"] = entry["rest_bytes"] / whole["rest_bytes"]
        entry["rest_to_plain"] = entry["rest_bytes"] / plain["rest_bytes"]
    return rows


def show_memory(args: Args) -> None:
    rows = memory_table(args)
    print(f"{args.config.name} {args.options}: peak memory of two training steps, seed 0, {platform.machine()}")
    print(f"{'':<28}{'MiB':>8}{'tables':>8}{'rest':>8}{'x B = 1':>9}{'rest x B = 1':>14}{'rest x plain':>14}")
    for r in rows:
        print(f"{r['name']:<28}{r['bytes'] / 2**20:>8.1f}{r['tables_bytes'] / 2**20:>8.1f}{r['rest_bytes'] / 2**20:>8.1f}"
              f"{r['ratio']:>9.3f}{r['rest_ratio']:>14.3f}{r['rest_to_plain']:>14.3f}")  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    write_atomic(args.results / "blocks-memory.json", json.dumps({"config": args.config.name, "options": args.options,
                                                                  "rows": rows}, indent=1))  # fmt: skip


def main(args: Args) -> int:
    if args.memory:
        show_memory(args)
        return 0
    work = Comparison(args)
    left = list(work.pending())
    if args.minutes != 0:
        work.slice.claim({"corpus": work.head["corpus"], "options": args.options})
        left = work.slice.run(lambda: list(work.pending()), work.do, work.seconds, work.finished)
    print("\n".join([HEAD, *(row(found) for found in work.results.values())]))
    if left:
        print(f"\nLeft: {', '.join(job.name for job in left)}; repeat the command to continue.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(Args, main)
