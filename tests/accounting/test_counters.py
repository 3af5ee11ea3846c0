"""What a training step spends on counting itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import batch

from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.hardware import EnergyMeter, peak_memory_bytes
from recurrent_db.accounting.memory_split import MemorySplit
from recurrent_db.config import load_config
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.optimizer import CLIP_NORM, build_optimizer, update_flops
from recurrent_db.rng import Rng
from recurrent_db.store.train_state import TrainState

CONFIG = Path(__file__).parents[2] / "train/configs/tiny.toml"


def median_seconds(action: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def test_accounting_takes_less_than_a_two_hundredth_of_a_step() -> None:
    config = load_config(CONFIG, ["--objective.name", "denoise", "--model.vocab_size", "2048"])
    device = torch.device("cpu")
    model = build_model(config.model, 0)
    objective, optimizer = build_objective(config), build_optimizer(model, config.optim)
    micro = batch(config.data.batch_size, config.data.sequence_length, config.model.vocab_size)
    memory, energy, state = MemorySplit(model), EnergyMeter(device), TrainState()
    update = sum(update_flops(model, config.optim).values())

    def step() -> None:
        loss, _ = objective(model, micro, Rng(0, state.step), 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def account() -> None:
        """The trainer's calls in the order of its loop."""
        passes = objective.passes(Rng(0, state.step), 0.0)
        cost = step_cost(config, passes)
        with memory.forward(device, passes.core_grad):
            pass
        state.count(cost, update, micro.tokens_BT.numel())
        _ = state.flops.row(), cost.total, cost.hardware, peak_memory_bytes(device)
        memory.row(optimizer, None, passes.core_grad)
        energy.joules()

    with memory.forward(device, 1):
        step()
    whole, counting = median_seconds(step, 9), median_seconds(account, 99)
    assert state.tokens == 99 * config.data.batch_size * config.data.sequence_length
    assert counting < 0.005 * whole, f"{counting * 1e6:.0f} of {whole * 1e6:.0f} microseconds"
