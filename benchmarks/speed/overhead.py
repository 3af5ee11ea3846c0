"""What a training step spends beside the model: reading its batch, and counting FLOPs and memory.

python benchmarks/speed/overhead.py --data DIR [--json OUT]

Each is timed on its own beside a whole step of `train/configs/tiny.toml`, by medians. The exit status is 1 if reading takes
more than a twentieth of a step, or counting more than a two-hundredth.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.hardware import EnergyMeter, peak_memory_bytes
from recurrent_db.accounting.memory_split import MemorySplit
from recurrent_db.arguments import run_command
from recurrent_db.config import load_config
from recurrent_db.data import Loader, open_data
from recurrent_db.files import write_atomic
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.optimizer import CLIP_NORM, build_optimizer, update_flops
from recurrent_db.rng import Rng
from recurrent_db.schema import PositiveInt
from recurrent_db.store.train_state import TrainState

CONFIG = Path(__file__).parents[2] / "train/configs/tiny.toml"
LIMITS = {"reading": 1 / 20, "counting": 1 / 200}
"""Largest share of a step's time."""


@dataclass
class Args:
    """Time what a step does beside the model."""

    data: Path
    """Data directory to read batches from."""
    steps: PositiveInt = 9
    """Steps that are timed; reading and counting are timed eleven times as often."""
    json: Path | None = None
    """File to write the result to."""


def median_seconds(action: Callable[[int], object], repetitions: int) -> float:
    times = []
    for number in range(repetitions):
        started = time.perf_counter()
        action(number)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(data: Path, steps: int) -> dict[str, float]:
    """Seconds of a step, and of reading and counting alone."""
    config, tokens = load_config(CONFIG, ["--objective.name", "denoise"]), open_data(data, "train")
    config.model.vocab_size, device = tokens.vocab_size, torch.device("cpu")
    loader = Loader(tokens, config.data.sequence_length, config.data.batch_size)
    model, objective = build_model(config.model, 0), build_objective(config)
    optimizer, state = build_optimizer(model, config.optim), TrainState()
    memory, energy, update = MemorySplit(model), EnergyMeter(device), sum(update_flops(model, config.optim).values())

    def step(number: int) -> None:
        loss, _ = objective(model, loader.batch(number), Rng(0, number), 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def count(number: int) -> None:
        """The trainer's calls in the order of its loop."""
        passes = objective.passes(Rng(0, number), 0.0)
        cost = step_cost(config, passes)
        with memory.forward(device, passes.core_grad):
            pass
        state.count(cost, update, config.data.batch_size * config.data.sequence_length)
        _ = state.flops.row(), cost.total, cost.hardware, peak_memory_bytes(device)
        memory.row(optimizer, None, passes.core_grad)
        energy.joules()

    with memory.forward(device, 1):
        step(0)
    return {
        "step": median_seconds(step, steps),
        "reading": median_seconds(loader.batch, 11 * steps),
        "counting": median_seconds(count, 11 * steps),
    }


def main(args: Args) -> int:
    seconds = measure(args.data, args.steps)
    shares = {name: seconds[name] / seconds["step"] for name in LIMITS}
    for name, share in shares.items():
        print(f"{name}: {seconds[name] * 1e6:.0f} microseconds, {share:.2%} of a step (at most {LIMITS[name]:.1%})")
    if args.json is not None:
        write_atomic(args.json, json.dumps({"seconds": seconds, "shares": shares}, indent=1) + "\n")
    return int(any(share > LIMITS[name] for name, share in shares.items()))


if __name__ == "__main__":
    run_command(Args, main)
