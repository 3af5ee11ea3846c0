"""Measure accuracy on tasks by K, beside chance, a unigram model and the same model untrained.

python eval/sweep.py RUN --k 1,2,4,8,16,32 --tasks arc_easy,blimp --data DIR [--json OUT] [--plot OUT.svg]

For each K the table gives accuracy, its standard error and bootstrap interval, forward FLOPs per item, seconds, and z. z is
the paired difference to the better of the unigram and the untrained model on the same items, divided by its standard error.

Tasks are the offline tasks of eval/lm_eval_cli.py, with the harness's prompts. Choices with equal scores share the credit.
FLOPs count a shared prefix once, because it is computed once. Under torchrun the processes share the work.
"""

from __future__ import annotations

import os
import sys

# Set before the first import of tqdm, which reads it: the harness does not check for a terminal before it draws bars.
os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" else "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from lm_eval_cli import quiet_harness
from numpy.typing import NDArray
from offline_tasks import OFFLINE, chosen, maker, offline_tasks, task_folder
from sweep_tables import BASELINES, Row, Table, compare, group_table, plot, text

from recurrent_db.arguments import Names, run_command
from recurrent_db.data import open_data
from recurrent_db.data.directory import MANIFEST
from recurrent_db.data.ngram import unigram_log_p
from recurrent_db.errors import UserError
from recurrent_db.evaluation.accuracy import Accuracy, Floats, credit
from recurrent_db.files import check_output, write_atomic
from recurrent_db.schema import Count, PositiveInt, at_least

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM


@dataclass
class Args:
    """Measure the accuracy of a run's newest good checkpoint on offline tasks, by K."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder with the tasks' files: benchmark JSONL, or for the heldout tasks a folder made by train/prepare_data.py."""
    tasks: Names = ("arc_easy", "piqa", "blimp")
    """Task names: arc_easy, piqa, blimp, blimp_PARADIGM, blimp_*, lambada, heldout_cloze,
    heldout_last_word."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations)."""
    untrained_k: Annotated[int | None, at_least(1)] = None
    """K of the untrained model; the smallest of --k by default."""
    counts: Path | None = None
    """Data directory whose training tokens the unigram model counts. By default the run's own, or else --data."""
    draws: PositiveInt = 1
    """Noise draws averaged in a likelihood."""
    sigma: float | None = None
    """Noise level at which a denoiser's inference starts; the run's sigma_max by default."""
    limit: Annotated[int | None, at_least(1)] = None
    """Largest number of items of each task; all by default."""
    fewshot: Count = 0
    """Number of solved examples before each question. BLiMP always has none."""
    batch_size: str = "auto"
    """Sequences in a batch, or auto."""
    seed: int = 0
    """Seed of the noise and of the untrained weights."""
    cache: Path | None = None
    """JSON Lines file that stores answers and reuses stored ones, so that a killed sweep can continue."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    json: Path | None = None
    """File for the rows."""
    plot: Path | None = None
    """File for a plot of accuracy against FLOPs; its name ends in .svg, .png or .pdf."""


# ---------------------------------------------------------------------------------------------------------------------
# From the harness's samples to table rows

Samples = list[dict[str, Any]]
Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""


def item_credits(task: Task, samples: Samples, answers: Sequence[Sequence[Answer]]) -> dict[str, Floats]:
    """Credit of each item, (N,), by metric. ``answers`` holds one answer for each request of an item."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"acc": np.array([float(greedy) for ((_, greedy),) in answers])}
    wanted = [metric["metric"] for metric in task.config.metric_list]
    credits: dict[str, list[float]] = {metric: [] for metric in ("acc", "acc_norm") if metric in wanted}
    for sample, answer in zip(samples, answers, strict=True):
        scores = [log_p for log_p, _ in answer]
        lengths = [len(choice) for choice in task.doc_to_choice(sample["doc"])]
        for metric, values in credits.items():
            normed = [s / n for s, n in zip(scores, lengths, strict=True)] if metric == "acc_norm" else scores
            values.append(credit(normed, sample["target"]))
    return {metric: np.array(values) for metric, values in credits.items()}


def chance(task: Task, samples: Samples) -> Floats:
    """Expected credit of each item for a random choice, (N,). Zero for tasks without choices."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return np.zeros(len(samples))
    return np.array([1 / len(sample["arguments"]) for sample in samples])


def unigram_answers(lm: RecurrentDBLM, samples: Samples, log_p_V: Floats) -> list[list[Answer]]:
    """Answers to the same requests by token frequencies alone. ``log_p_V`` holds the log-frequency of each token."""
    best = int(log_p_V.argmax())

    def answer(context: str, continuation: str) -> Answer:
        tokens = lm._encode_pair(context, continuation)[1]
        return float(log_p_V[tokens].sum()), all(token == best for token in tokens)

    return [[answer(*arguments) for arguments in sample["arguments"]] for sample in samples]


def token_counts(args: Args, lm: RecurrentDBLM) -> NDArray[np.int64] | None:
    """Number of occurrences of each token in the training data, (V,). None if the training data are not found.

    Raises:
        UserError: --counts has no training data made with the run's tokenizer.
    """
    for folder in (args.counts,) if args.counts else (Path(lm.run_config.data.path), args.data):
        if args.counts is None and not (folder / MANIFEST).is_file():
            continue
        try:
            data = open_data(folder, "train", expect_tokenizer_hash=lm.tokenizer.hash)
        except UserError:
            if args.counts:
                raise
            continue
        counts = np.zeros(lm.tokenizer.vocab_size, dtype=np.int64)
        for source in data.sources.values():
            for start in range(0, source.tokens, 1 << 24):
                part = source.read(start, min(1 << 24, source.tokens - start))
                counts += np.bincount(part, minlength=len(counts))
        return counts
    return None


@dataclass
class Sweep:
    """Runs models on tasks and collects their rows."""

    args: Args
    ks: list[int]
    rows: dict[tuple[str, str], list[Row]] = field(default_factory=dict)
    """Rows by (task, metric)."""
    samples: dict[str, Samples] = field(default_factory=dict)

    def add(
        self,
        name: str,
        model: str,
        k: int | None,
        credits: dict[str, Floats],
        flops: float | None,
        seconds: float | None,
    ) -> None:
        for metric, credits_N in credits.items():
            row = Row(name, metric, model, k, len(credits_N), Accuracy.of(credits_N), flops, seconds, credits_N)
            self.rows.setdefault((name, metric), []).append(row)

    def run(self, lm: RecurrentDBLM, tasks: dict[str, Task], model: str) -> None:
        """Evaluate one model, at its current K, on all tasks."""
        from lm_eval.evaluator import evaluate

        for name, task in tasks.items():
            before = lm.scorer.flops, lm.scorer.seconds
            result = evaluate(
                lm, {"tasks": {name: task}, "groups": {}}, limit=self.args.limit, bootstrap_iters=0, log_samples=True
            )
            assert result is not None  # RecurrentDBLM tells the harness in every process that its rank is 0
            samples = self.samples[name] = result["samples"][name]
            answers = [sample["filtered_resps"] for sample in samples]
            cost = lm.scorer.flops - before[0], lm.scorer.seconds - before[1]
            self.add(name, model, lm.k, item_credits(task, samples, answers), *cost)

    def add_baselines(self, lm: RecurrentDBLM, tasks: dict[str, Task], counts: NDArray[np.int64] | None) -> None:
        """Add chance and the unigram model, on the items of the earlier runs."""
        for name, task in tasks.items():
            samples = self.samples[name]
            metrics = [metric for of, metric in self.rows if of == name]
            self.add(name, "chance", None, {metric: chance(task, samples) for metric in metrics}, None, None)
            if counts is not None:
                answers = unigram_answers(lm, samples, unigram_log_p(counts))
                self.add(name, "unigram", None, item_credits(task, samples, answers), None, None)

    def tables(self, groups: dict[str, list[str]]) -> list[Table]:
        """All tables, groups first. The tasks of a group appear only in the group's table."""
        by_task: dict[str, list[Table]] = {}
        for (name, metric), rows in self.rows.items():
            rows.sort(key=lambda row: (row.baseline, row.k or 0))
            by_task.setdefault(name, []).append(compare(Table(name, metric, rows)))
        grouped = [group_table(group, [by_task[name][0] for name in names]) for group, names in groups.items()]
        members = {name for names in groups.values() for name in names}
        return grouped + [table for name, tables in by_task.items() if name not in members for table in tables]


# ---------------------------------------------------------------------------------------------------------------------
# Command


def check(args: Args) -> tuple[list[int], list[str]]:
    """Values of K and names of tasks. Raises UserError for options that are wrong on their face."""
    ks, names = sorted(set(args.k)), list(args.tasks)
    for name in names:
        if maker(name) is None:
            raise UserError(f"--tasks {name}: not an offline task; choose from {', '.join(OFFLINE)}")
    if args.plot is not None and args.plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {args.plot}: its name must end in .svg, .png or .pdf")
    for path in (args.json, args.plot):
        if path is not None:
            check_output(path)
    return ks, names


def sweep(args: Args, ks: list[int], names: list[str]) -> tuple[RecurrentDBLM, list[Table]]:
    """Run all tasks at each K, with the baselines. Returns the run's model and the tables."""
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f'the lm-eval harness is not installed ({error}): pip install "recurrent-db[eval]"') from None
    from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM
    from recurrent_db.evaluation.lm_eval_tasks import checked_tasks, user_errors

    configs = offline_tasks(names, args.data)

    def model(k: int) -> RecurrentDBLM:
        return RecurrentDBLM(
            str(args.run), k=k, sigma=args.sigma, draws=args.draws, batch_size=args.batch_size, device=args.device,
            seed=args.seed, cache=None if args.cache is None else str(args.cache),
        )  # fmt: skip

    lm = model(ks[0])
    counts = token_counts(args, lm)
    if counts is None:
        lm._warn("no unigram row: the run's training data are not in %s (give --counts DIR)", lm.run_config.data.path)
    with task_folder(configs) as folder, user_errors(datasets.exceptions.DatasetsError), checked_tasks():
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load(chosen(names, configs))
        tasks: dict[str, Task] = loaded["tasks"]
        for task in tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", args.fewshot)
            task.set_fewshot_seed(seed=1234)  # the harness's default
        runs = Sweep(args, ks)
        name = args.run.resolve().name
        for k in ks:
            lm.choose(k)
            runs.run(lm, tasks, f"{name} (run)" if name in BASELINES else name)
        untrained = model(args.untrained_k or ks[0])
        untrained.untrain(args.seed)
        untrained._warned = lm._warned  # do not repeat warnings
        runs.run(untrained, tasks, "untrained")
        runs.add_baselines(lm, tasks, counts)
    groups = {config["group"]: config["task"] for config in configs if "group" in config}
    return lm, runs.tables(groups)


def main(args: Args) -> int:
    ks, names = check(args)
    with quiet_harness():
        lm, tables = sweep(args, ks, names)
    if lm.processes.rank:
        return 0
    info = lm.get_model_info()
    if args.json is not None:
        rows = [row.to_json() for table in tables for part in (table, *table.members) for row in part.rows]
        result = {
            "checkpoint": str(lm.checkpoint), "objective": lm.objective, "k": ks, "draws": info["draws"],
            "sigma": lm.sigma, "seed": args.seed, "limit": args.limit, "fewshot": args.fewshot, "rows": rows,
        }  # fmt: skip
        write_atomic(args.json, json.dumps(result, indent=1))
    if args.plot is not None:
        plot(tables, args.plot)
    print(f"{lm.checkpoint}: {lm.objective}, {info['draws']} draws, {lm.processes.world} processes")
    for table in tables:
        print("\n" + text(table))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
