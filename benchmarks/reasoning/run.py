"""One run of `reasoning/compare.py`: trains an arm on a generated task and writes its accuracy by K to a JSON file.

python benchmarks/reasoning/run.py --task s5 --arm next_token --json OUT

The loop resembles the trainer's, with generated batches. Objective, optimizer, schedule and FLOP count are the trainer's own
code. A killed run starts again from the beginning, because a run takes only minutes.

An objective that puts noised targets into its single stream (`denoise`) has an easier task in training than in scoring:
position i sees noised answers of earlier positions, which the input does not contain. Scoring starts from noise, so the
accuracy is a fair measure, but of a model that was trained with this help.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import contextlib
import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.quality.compare import ARMS
from benchmarks.quality.runs import dotted, identity
from benchmarks.reasoning.tasks import TASKS, Task
from benchmarks.slices import ROOT
from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.hardware import choose_device
from recurrent_db.arguments import run_command
from recurrent_db.config import Config, load_config
from recurrent_db.data import Batch
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import Objective, build_objective
from recurrent_db.optim.optimizer import CLIP_NORM, build_optimizer, step_unless
from recurrent_db.optim.schedule import budget_progress, learning_rate_scale, middle_of_step
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import Count, Positive, PositiveInt
from recurrent_db.training.guard import MOST_SKIPPED


@dataclass
class Args:
    """Train one arm on a generated task and measure its accuracy by K."""

    task: str
    """Task: s5, s5-generators or p-hop."""
    arm: str
    """Arm of benchmarks/quality/compare.py."""
    json: Path
    """File for the result."""
    seed: int = 0
    """Seed of weights, training samples and noise."""
    rate: Positive = 2e-3
    """Peak learning rate."""
    budget_flops: Positive = 2e13
    """Training budget, in model FLOPs."""
    steps: Count = 0
    """End after this many optimizer steps; 0 ends at the budget. Used to measure speed."""
    options: str = ""
    """Additional configuration keys, e.g. "model.n_core=1"."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations) to score."""
    draws: PositiveInt = 2
    """Noise draws whose probabilities are averaged."""
    samples: PositiveInt = 2048
    """Number of held-out samples to score."""
    threads: Count = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""


def task_config(task: Task, arm: str, options: str, seed: int, rate: Positive, budget: float) -> Config:
    """The configuration `tiny` with the task's vocabulary and length, and 16 samples a step."""
    if arm not in ARMS:
        raise UserError(f"unknown arm {arm!r}; choose from {', '.join(ARMS)}")
    words: list[Any] = [
        "--model.vocab_size", task.vocab_size, "--model.max_seq_len", task.length, "--data.sequence_length", task.length,
        "--data.batch_size", 16, "--data.document_mask", "False", *dotted(options), *ARMS[arm], "--seed", seed,
        "--optim.lr", f"{rate:g}", "--budget.flops", f"{budget:g}",
    ]  # fmt: skip
    config = load_config(ROOT / "train/configs/tiny.toml", [str(word) for word in words])
    return config


def batch_of(task: Task, rng: Rng, first: int, size: int, stream: str) -> Batch:
    """Samples ``first`` to ``first + size - 1``. Each sample is one document."""
    samples_B = torch.arange(first, first + size)
    tokens_BT, targets_BT = task.draw(rng, samples_B, stream)
    return Batch(tokens_BT, targets_BT, torch.zeros(tokens_BT.shape, dtype=torch.int32), samples_B)


def train(
    config: Config, task: Task, model: LoopedLM, objective: Objective, steps: int, device: torch.device
) -> dict[str, float]:
    """Train until the budget is spent. Returns what was spent. Raises `UserError` if the loss stays non-finite."""
    optimizer = build_optimizer(model, config.optim)
    cost_of = functools.cache(lambda passes: step_cost(config, passes))
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    tokens = config.data.batch_size * config.data.sequence_length
    step, flops, progress, started, in_a_row = 0, 0.0, 0.0, time.perf_counter(), 0
    bar = tqdm(total=100, disable=None, leave=False)
    model.train()
    if objective.visits(1.0) > 1:
        raise UserError("this benchmark draws new samples in each step: use objective.one_step.state = recomputed")
    while progress < 1 and not 0 < steps <= step:
        for parameter in objective.grow(model, progress):
            optimizer.state.pop(parameter, None)
        rng = Rng(config.seed, step)
        passes = objective.passes(rng, progress)
        spent = cost_of(passes).total * tokens
        middle = middle_of_step(progress, budget_progress(config.budget, flops + spent / 2, 0, 0, 0))
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * learning_rate_scale(config.schedule, middle)
        batch = batch_of(task, rng, step * config.data.batch_size, config.data.batch_size, "train").to(device)
        with autocast:
            loss, _ = objective(model, batch, rng, progress)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        step_unless(skip, optimizer)
        optimizer.zero_grad(set_to_none=True)
        in_a_row = in_a_row + 1 if bool(skip) else 0
        if in_a_row == MOST_SKIPPED:
            raise UserError(f"stopped at step {step}: loss or gradient not finite {in_a_row} steps in a row")
        step, flops = step + 1, flops + spent
        progress = budget_progress(config.budget, flops, 0, 0, 0)
        bar.update(int(100 * min(progress, 1)) - bar.n)
    bar.close()
    return {"flops": flops, "tokens": step * tokens, "steps": step, "seconds": time.perf_counter() - started}


@torch.no_grad()
def accuracy(
    model: LoopedLM,
    task: Task,
    ks: Sequence[int],
    samples: int,
    draws: PositiveInt,
    device: torch.device,
    at_once: int = 256,
) -> dict[str, Any]:
    """Accuracy (share of positions whose most likely answer is right) by K and group, and by K and position; and NLL by K in
    nats per position."""
    model.eval()
    rng, right, counts = Rng(0, EVALUATION_STEP), dict[tuple[int, str], float](), dict[str, float]()
    by_position = {k: torch.zeros(task.length) for k in ks}
    nats = dict.fromkeys(ks, 0.0)
    for first in range(0, samples, at_once):
        batch = batch_of(task, rng, first, min(at_once, samples - first), "held-out")
        groups = task.groups(batch.tokens_BT, batch.targets_BT)
        tokens_BT = batch.tokens_BT.to(device)
        e_BTD = model.encode(tokens_BT)
        mixture: dict[int, torch.Tensor] = {}
        n_draws = draws if model.recurrence.stochastic else 1
        for draw in range(n_draws):
            noise = NoiseSource(rng, batch.sample_index_B, task.length, draw)
            for k, hidden_BTD in model.recurrence.hidden(model, tokens_BT, e_BTD, ks, noise):
                p_BTV = model.logits(hidden_BTD).float().softmax(-1).cpu() / n_draws
                mixture[k] = mixture[k] + p_BTV if k in mixture else p_BTV
        for k, p_BTV in mixture.items():
            right_BT = p_BTV.argmax(-1) == batch.targets_BT
            nats[k] -= p_BTV.gather(-1, batch.targets_BT[..., None]).clamp(min=1e-38).log().double().sum().item()
            by_position[k] += right_BT.sum(0)
            for name, chosen_BT in groups.items():
                right[k, name] = right.get((k, name), 0.0) + (right_BT & chosen_BT).sum().item()
        for name, chosen_BT in groups.items():
            counts[name] = counts.get(name, 0.0) + chosen_BT.sum().item()
    return {
        "accuracy_by_k": {
            str(k): {name: right[k, name] / count if count else math.nan for name, count in counts.items()} for k in ks
        },
        "nll_by_k": {str(k): nats[k] / samples / task.length for k in ks},
        "accuracy_by_position": {str(k): [round(n, 4) for n in (by_position[k] / samples).tolist()] for k in ks},
        "samples": samples,
        "draws": draws if model.recurrence.stochastic else 1,
    }


def main(args: Args) -> int:
    if args.task not in TASKS:
        raise UserError(f"unknown task {args.task!r}; choose from {', '.join(TASKS)}")
    ks = sorted(set(args.k))
    check_output(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    task, device = TASKS[args.task], choose_device(args.device)
    config = task_config(task, args.arm, args.options, args.seed, args.rate, args.budget_flops)
    objective = build_objective(config)
    model = build_model(config.model, config.seed, device)
    model.recurrence, model.document_mask = objective.recurrence, False
    spent = train(config, task, model, objective, args.steps, device)
    model.recurrence = objective.recurrence  # it may depend on values learned in training
    trained = time.perf_counter()
    found = accuracy(model, task, ks, args.samples, args.draws, device)
    result = {
        "task": args.task, "arm": args.arm, "seed": args.seed, "learning_rate": args.rate, "budget_flops": args.budget_flops,
        "words": ARMS[args.arm], "options": args.options, "identity": identity(config), **spent,
        "seconds_scoring": time.perf_counter() - trained,
        "parameters": model.parameter_counts()["total"],
        "headline": task.headline, **found,
    }  # fmt: skip
    write_atomic(args.json, json.dumps(result))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
