"""Measure the cost of the document mask: training steps with and without it, in turns.

python benchmarks/speed/documents.py [--config train/configs/tiny.toml] [--length 60] [--device auto] [--json OUT]

Each row is an objective: the median and the quartiles, over pairs of steps, of the time with the mask divided by the time
without it. A step is forward and backward on random tokens. On the CPU, processor time is measured, so that other work on
the machine matters less.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from recurrent_db.accounting.hardware import choose_device, environment
from recurrent_db.arguments import run_command
from recurrent_db.config import load_config
from recurrent_db.data import Batch
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import build_model
from recurrent_db.model.attention import Need, choose
from recurrent_db.objectives import build_objective
from recurrent_db.rng import Rng
from recurrent_db.schema import Count, PositiveInt, at_least

ROWS = {
    "next_token": ["--objective.name", "next_token"],
    "denoise": ["--objective.name", "denoise"],
    "denoise, two-stream": ["--objective.name", "denoise", "--objective.denoise.conditioning", "two-stream"],
    "unrolled": ["--objective.name", "unrolled"],
}


@dataclass
class Args:
    """Measure the cost of the document mask in a training step."""

    config: Path = Path(__file__).parents[2] / "train/configs/tiny.toml"
    """TOML configuration with the model's shape."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size if the configuration takes it from a tokenizer."""
    batch_size: Count = 0
    """Sequences in a step; 0 uses the configuration's micro-batch."""
    length: Annotated[float, at_least(1)] = 60.0
    """Mean length of a document in tokens, with a geometric distribution."""
    pairs: Annotated[int, at_least(2)] = 30
    """Number of timed pairs of steps for each row."""
    attention: str = "auto"
    """Attention back end: sdpa, flex, flash or auto."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto. On CUDA the forward pass uses bfloat16 autocast, as in training."""
    seed: int = 0
    """Seed of weights, tokens and documents."""
    json: Path | None = None
    """File for the rows."""


def packed_batch(args: Args, vocab_size: int, n: int, length: int, device: torch.device) -> Batch:
    """Random tokens. Each position starts a new document with probability 1 / ``args.length``."""
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(vocab_size, (n, length + 1), generator=generator)
    docs = (torch.rand(n, length, generator=generator) < 1 / args.length).int().cumsum(1, dtype=torch.int32)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), docs, torch.arange(n)).to(device)


def make_step(args: Args, name: str, device: torch.device) -> Callable[[bool], float]:
    """A function that makes a step of one objective, with or without the mask, and returns its seconds."""
    config = load_config(args.config, ROWS[name])
    config.model.vocab_size = config.model.vocab_size or args.vocab_size
    n = args.batch_size or config.data.micro_batch_size or config.data.batch_size
    model, objective = build_model(config.model, args.seed, device), build_objective(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    need = Need(device, dtype, config.model.d_head, True, "two-stream" in name)
    model.attention, _ = choose(args.attention, need)
    batch = packed_batch(args, config.model.vocab_size, n, config.data.sequence_length, device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def step(masked: bool) -> float:
        model.document_mask = masked
        start = clock()
        with torch.autocast(device.type, dtype) if device.type == "cuda" else contextlib.nullcontext():
            loss = objective(model, batch, Rng(args.seed, 0), 0.0)[0]
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    return step


def main(args: Args) -> int:
    if args.json is not None:
        check_output(args.json)
    device = choose_device(args.device)
    rows = {}
    for name in ROWS:
        step = make_step(args, name, device)
        for _ in range(3):
            step(True), step(False)
        ratios = [step(True) / step(False) for _ in range(args.pairs)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"ratio": middle, "lower_quartile": low, "upper_quartile": high}
        print(f"{name:<22} {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    if args.json is not None:
        result = {"rows": rows, "seed": args.seed, "length": args.length, "environment": environment(device)}
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
