"""Memory of a training step: its peak by objective, its split by holder, and what activation checkpointing saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import OBJECTIVES, batch, load_script, micro_config, micro_model
from torch import Tensor, nn

from recurrent_db.accounting.memory_split import MemorySplit, peak_live_bytes
from recurrent_db.model import LoopedLM
from recurrent_db.objectives import Objective
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.rng import Rng

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[2] / "train/configs/tiny.toml"


def test_the_counter_sees_tensors_that_live_together() -> None:
    def together() -> None:
        _ = [torch.ones(1 << 18) for _ in range(4)]  # a MiB each

    def in_turn() -> None:
        for _ in range(4):
            torch.ones(1 << 18)

    assert peak_live_bytes(together) == pytest.approx(4 << 20, rel=0.01)
    assert peak_live_bytes(in_turn) <= (2 << 20) * 1.01


def test_memory_of_a_denoising_step() -> None:
    benchmark = load_script("benchmarks/speed/memory.py")
    rows = benchmark.measure(benchmark.Args(config=CONFIG, batch_size=2, repetitions=1))
    flat = rows["next_token"]["bytes"]
    assert rows["denoise"]["bytes"] <= 1.3 * flat
    # Walks of any length hold one state; unrolled training holds one for each backpropagated iteration.
    assert rows["denoise, scoring, K = 32"]["bytes"] == pytest.approx(
        rows["denoise, scoring, K = 2"]["bytes"], rel=0.05
    )
    assert rows["unrolled, 8 with gradient"]["bytes"] > 1.5 * rows["unrolled, 2 with gradient"]["bytes"]
    assert rows["unrolled, 8 with gradient"]["bytes"] > 2 * flat


# ---------------------------------------------------------------------------------------------------------------------
# The split


def deep(depth: int, objective: str = "unrolled", checkpointing: bool = False) -> tuple[LoopedLM, Objective]:
    """A model that backpropagates through ``depth`` of many iterations."""
    config = micro_config(
        "--objective.name", objective, "--objective.unrolled.mean_depth", 64,
        "--objective.unrolled.truncation", depth,
    )  # fmt: skip
    model, train = micro_model(config, spread=0.1)
    model.core.checkpointing = checkpointing
    return model, train


def loss_and_gradients(model: LoopedLM, train: Objective, split: MemorySplit | None = None) -> list[Tensor]:
    if split is None:
        loss, _ = train(model, batch(), Rng(0, 0), 0.0)
    else:
        with split.forward(CPU, 1):
            loss, _ = train(model, batch(), Rng(0, 0), 0.0)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [loss.detach(), *gradients]


def activations(depth: int, checkpointing: bool) -> int:
    model, train = deep(depth, checkpointing=checkpointing)
    split = MemorySplit(model)
    loss_and_gradients(model, train, split)
    return split.activations[1]


def test_what_a_model_and_its_optimizer_hold() -> None:
    config = micro_config("--objective.name", "denoise", "--optim.ema_decay", 0.9)
    model, train = micro_model(config)  # float64: eight bytes
    model.core.blocks[0].mlp.proj.weight.requires_grad_(False)
    optimizer, ema, split = build_optimizer(model, config.optim), EMA(model, config.optim.ema_decay), MemorySplit(model)
    with split.forward(CPU, 1):
        train(model, batch(), Rng(0, 0), 0.0)[0].backward()
    assert split.row(optimizer, ema, 1)["memory/optimizer_bytes"] == 0  # a first step that was not taken
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    sizes = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert split.row(optimizer, ema, 1) == {
        "memory/parameters_bytes": 8 * sum(sizes),
        "memory/gradients_bytes": held,
        "memory/optimizer_bytes": 2 * 8 * sum(trained) + 4 * len(trained),  # two moments, and a step count for each
        "memory/average_bytes": 8 * sum(sizes),
        "memory/activations_bytes": split.activations[1],
    }
    assert held == 8 * sum(trained) < 8 * sum(sizes)


def test_activations_of_two_layers_by_hand() -> None:
    """Saved: the input (3 x 4), tanh's output (3 x 5, by tanh and again by the second layer), and no parameter."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    split = MemorySplit(network)
    with split.forward(CPU, 7):
        network(torch.rand(3, 4)).sum()
    assert split.activations == {7: 4 * (3 * 4 + 3 * 5)}


def test_activations_grow_with_the_backpropagated_depth_unless_checkpointed() -> None:
    two, four, eight = (activations(depth, checkpointing=False) for depth in (2, 4, 8))
    assert eight - four == 2 * (four - two)
    state = batch().tokens_BT.numel() * 32 * 8  # of width 32 in float64
    assert four - two > 2 * 10 * state
    two, four, eight = (activations(depth, checkpointing=True) for depth in (2, 4, 8))
    assert four - two == 2 * state
    assert eight - four == 4 * state


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_watching_changes_nothing(objective: str) -> None:
    plain = loss_and_gradients(*deep(3, objective))
    model, train = deep(3, objective)
    watched = loss_and_gradients(model, train, MemorySplit(model))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


@pytest.mark.parametrize("objective", ["unrolled", "denoise"])
def test_checkpointing_changes_no_gradient(objective: str) -> None:
    plain = loss_and_gradients(*deep(5, objective))
    checkpointed = loss_and_gradients(*deep(5, objective, checkpointing=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_checkpointing_lowers_the_peak() -> None:
    peaks = []
    for checkpointing in (False, True):
        model, train = deep(8, checkpointing=checkpointing)
        peaks.append(peak_live_bytes(lambda model=model, train=train: loss_and_gradients(model, train)))
    assert peaks[1] < 0.4 * peaks[0]  # 0.23 at this size
