"""Compare the planned memory of a training step with the measured memory.

python benchmarks/speed/footprint.py [--json OUT] [--docs docs/measurements.md]

Each row trains one step (micro-batches, clipping, update) on random tokens. The allocator's events give the largest number
of bytes that tensors hold at once, and `accounting.step_memory` gives the planned number. --docs writes the table into a
Markdown file.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recurrent_db.accounting.hardware import choose_device
from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.accounting.step_memory import Step
from recurrent_db.arguments import run_command
from recurrent_db.config import load_config
from recurrent_db.data import Batch
from recurrent_db.files import write_atomic
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.optimizer import CLIP_NORM, build_optimizer, step_unless
from recurrent_db.rng import Rng

DEEP = "--objective.name unrolled --objective.unrolled.mean_depth 8 "
STEPS = {
    "next_token": "--objective.name next_token",
    "next_token, Muon": "--objective.name next_token --optim.name muon",
    "unrolled, 4 with gradient": DEEP + "--objective.unrolled.truncation 4",
    "unrolled, 4, checkpointed": DEEP + "--objective.unrolled.truncation 4 --run.activation_checkpointing true",
    "one_step": "--objective.name one_step --objective.one_step.next_token_share 0",
    "denoise": "--objective.name denoise",
    "denoise, weight average": "--objective.name denoise --optim.ema_decay 0.99",
    "denoise, two-stream": "--objective.name denoise --objective.denoise.conditioning two-stream",
}
SHAPES = {
    "d 64, 1/2/1": "--model.d_model 64 --model.n_heads 4 --model.n_prelude 1 --model.n_core 2 --model.n_coda 1"
    " --model.d_mlp 160 --data.sequence_length 64 --model.vocab_size 512",
    "d 96, 1/1/3": "--model.d_model 96 --model.n_heads 2 --model.n_prelude 1 --model.n_core 1 --model.n_coda 3"
    " --model.d_mlp 128 --data.sequence_length 32 --model.vocab_size 4096",
    "d 128, 2/4/2": "--model.d_model 128 --model.n_heads 4 --model.n_prelude 2 --model.n_core 4 --model.n_coda 2"
    " --model.d_mlp 352 --data.sequence_length 128 --model.vocab_size 2048",
}
SEQUENCES = 6


@dataclass
class Args:
    """Measure the memory that the plan predicts."""

    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto."""
    docs: Path | None = None
    """Markdown file to write the table into, between its marks."""
    json: Path | None = None
    """File for the rows."""


def measure(
    shape: str, step: str, micro_batches: int = 1, bfloat16: bool = False, documents: bool = False, device: str = "cpu"
) -> tuple[int, int, int]:
    """Peak bytes of one step: measured, predicted, and the part of both that parameters, optimizer and average hold."""
    where = choose_device(device)
    config = load_config(None, [*SHAPES[shape].split(), *STEPS[step].split()])
    model, objective = build_model(config.model, 0, where), build_objective(config)
    model.core.checkpointing = config.run.activation_checkpointing
    optimizer = build_optimizer(model, config.optim)
    ema = EMA(model, config.optim.ema_decay) if config.optim.ema_decay else None
    length = config.data.sequence_length
    ids = torch.randint(config.model.vocab_size, (SEQUENCES, length + 1), generator=torch.Generator().manual_seed(0))
    docs = (torch.arange(length) >= (length // 2 if documents else length)).int().expand(SEQUENCES, length).contiguous()
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), docs, torch.arange(SEQUENCES)).to(where)

    def train() -> None:
        for _ in range(micro_batches):
            with torch.autocast(where.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
                loss = objective(model, batch, Rng(0, 0), 0.0)[0]
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        step_unless(torch.zeros((), dtype=torch.bool, device=where), optimizer)
        if ema is not None:
            ema.update(model, torch.zeros((), dtype=torch.bool, device=where))
        optimizer.zero_grad(set_to_none=True)

    train()  # creates the optimizer's state
    passes = objective.passes(Rng(0, 0), 0.0)
    line = Step(
        config, SEQUENCES, micro_batches, passes, half=bfloat16, cuda=where.type == "cuda", masked=documents
    ).timeline()
    state = sum(line.held[part] for part in ("parameters", "optimizer", "average"))
    return state + peak_live_bytes(train, where), line.largest, state


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((shape, step, {}) for shape in SHAPES for step in STEPS),
    ("d 128, 2/4/2", "next_token", {"micro_batches": 2}),
    ("d 128, 2/4/2", "unrolled, 4 with gradient", {"micro_batches": 3}),
    ("d 128, 2/4/2", "denoise", {"documents": True}),
    ("d 128, 2/4/2", "unrolled, 4 with gradient", {"bfloat16": True}),
    ("d 128, 2/4/2", "denoise", {"bfloat16": True}),
]
"""Rows of the table: shape, step, and further arguments of `measure`."""


def rows(device: str = "cpu") -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for shape, step, more in CASES:
        measured, predicted, state = measure(shape, step, device=device, **more)
        told = ", ".join(f"{name} {value}" if value is not True else name for name, value in more.items())
        above = (predicted - state) / (measured - state) - 1
        found.append({
            "shape": shape, "step": step + (f", {told}" if told else ""), "measured": measured, "predicted": predicted,
            "error": predicted / measured - 1, "error_above_state": above,
        })  # fmt: skip
    return found


def markdown(found: list[dict[str, object]], device: str) -> str:
    """The table, with the machine and the command of the measurement."""
    head = (
        f"Seed 0, {SEQUENCES} sequences, {device}, {platform.machine()}, torch {torch.__version__}: `python"
        " benchmarks/speed/footprint.py --docs docs/measurements.md`\n\n"
        "| shape | step | measured MB | planned MB | error | error above weights and optimizer |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(
        f"| {r['shape']} | {r['step']} | {r['measured'] / 1e6:.2f} | {r['predicted'] / 1e6:.2f} | {r['error']:+.1%} |"  # type: ignore[operator]
        f" {r['error_above_state']:+.1%} |"
        for r in found
    )


def main(args: Args) -> int:
    found = rows(args.device)
    print(markdown(found, args.device))
    worst = max(abs(float(str(r["error"]))) for r in found)
    print(f"\nlargest error: {worst:.1%}")
    if args.docs is not None:
        text = args.docs.read_text(encoding="utf-8")
        block = f"<!-- measured: begin -->\n{markdown(found, args.device)}\n<!-- measured: end -->"
        text = re.sub(r"<!-- measured: begin -->.*<!-- measured: end -->", lambda _: block, text, flags=re.DOTALL)
        write_atomic(args.docs, text)
    if args.json is not None:
        write_atomic(args.json, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
