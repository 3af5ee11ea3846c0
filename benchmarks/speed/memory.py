"""Measure peak memory and time of one training step by objective, on one shape.

python benchmarks/speed/memory.py [--config train/configs/tiny.toml] [--batch-size 8] [--json OUT]

Rows: next_token; denoise with one stream and with two; unrolled with 2 and 8 backpropagated iterations; and, without
gradient, scoring by a walk with K = 2 and K = 32. A denoising training step has no K, because it makes one pass.

Memory is the largest number of bytes that tensors hold at once during forward and backward, without parameters and batch but
with gradients. Time is the median of interleaved repetitions. Every number is followed by its ratio to next_token.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recurrent_db.accounting.hardware import choose_device, peak_memory_bytes
from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.arguments import run_command
from recurrent_db.config import load_config
from recurrent_db.data import Batch
from recurrent_db.evaluation.likelihood import token_log_probabilities
from recurrent_db.files import write_atomic
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import PositiveInt

CPU = torch.device("cpu")

ROWS: dict[str, list[str]] = {
    "next_token": ["--objective.name", "next_token"],
    "denoise": ["--objective.name", "denoise"],
    "denoise, two-stream": ["--objective.name", "denoise", "--objective.denoise.conditioning", "two-stream"],
    "unrolled, 2 with gradient": ["--objective.unrolled.truncation", "2"],
    "unrolled, 8 with gradient": ["--objective.unrolled.truncation", "8"],
    "denoise, scoring, K = 2": ["--objective.name", "denoise"],
    "denoise, scoring, K = 32": ["--objective.name", "denoise"],
}  # fmt: skip
DEEP = ["--objective.name", "unrolled", "--objective.unrolled.mean_depth", "64"]


@dataclass
class Args:
    """Measure the peak memory and time of one step by objective."""

    config: Path = Path(__file__).parents[2] / "train/configs/tiny.toml"
    """TOML configuration with the model's shape."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size if the configuration takes it from a tokenizer."""
    batch_size: PositiveInt = 8
    """Sequences in the step."""
    repetitions: PositiveInt = 7
    """Timed repetitions of each row, interleaved."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto. On CUDA the forward pass uses bfloat16 autocast, as in training."""
    json: Path | None = None
    """File for the rows."""


def step_of(
    config_path: Path, name: str, vocab_size: int, batch_size: int, device: torch.device = CPU
) -> Callable[[], None]:
    """A function that does one row's work on synthetic tokens: forward and backward of an objective (gradients are dropped
    at the end), or scoring."""
    config = load_config(config_path, [*(DEEP if name.startswith("unrolled") else []), *ROWS[name]])
    config.model.vocab_size = config.model.vocab_size or vocab_size
    model, objective = build_model(config.model, 0, device), build_objective(config)
    autocast = torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (batch_size, config.data.sequence_length + 1), generator=generator)
    docs = torch.zeros(batch_size, config.data.sequence_length, dtype=torch.int32)  # one document each
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), docs, torch.arange(batch_size)).to(device)

    if "scoring" in name:
        k, rng, model.recurrence = int(name.split()[-1]), Rng(0, EVALUATION_STEP), objective.recurrence

        @torch.no_grad()
        def walk() -> None:
            with autocast:
                token_log_probabilities(model, batch.tokens_BT, batch.targets_BT, [k], rng, batch.sample_index_B)

        return walk

    def step() -> None:
        with autocast:
            loss = objective(model, batch, Rng(0, 0), 0.0)[0]
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(args: Args) -> dict[str, dict[str, float]]:
    """Rows {bytes, seconds, bytes_ratio, seconds_ratio} by name."""
    device = choose_device(args.device)
    steps = {name: step_of(args.config, name, args.vocab_size, args.batch_size, device) for name in ROWS}
    rows: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()  # warm-up
        rows[name] = {"bytes": peak_live_bytes(step, device)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repetitions):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["seconds"] = statistics.median(times[name])
        row["bytes_ratio"] = row["bytes"] / rows["next_token"]["bytes"]
        # Ratios are taken pair by pair, because the machine's speed drifts and neighbours in time drift together.
        row["seconds_ratio"] = statistics.median(a / b for a, b in zip(times[name], times["next_token"], strict=True))
    return rows


def main(args: Args) -> int:
    rows = measure(args)
    device = choose_device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{args.config.name}, {args.batch_size} sequences, seed 0, {where}, {torch.get_num_threads()} threads")
    print(f"{'step':<28}{'peak MiB':>10}{'x':>7}{'seconds':>10}{'x':>7}")
    for name, row in rows.items():
        print(
            f"{name:<28}{row['bytes'] / 2**20:>10.1f}{row['bytes_ratio']:>7.2f}{row['seconds']:>10.4f}"
            f"{row['seconds_ratio']:>7.2f}"
        )
    streams = rows["denoise, two-stream"]["seconds_ratio"] / rows["denoise"]["seconds_ratio"]
    print(f"two streams take {streams:.2f} times as long as one in a step")
    print(f"peak memory of this process: {peak_memory_bytes(device) / 2**20:.0f} MiB")
    if args.json is not None:
        write_atomic(args.json, json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
