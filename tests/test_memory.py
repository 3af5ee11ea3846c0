"""Peak memory of a training step, by objective, on the benchmark's own rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import load_script

from recurrent_db.memory import peak_live_bytes

CONFIG = Path(__file__).parents[1] / "train/configs/tiny.toml"


def test_the_counter_sees_tensors_that_live_together() -> None:
    def together() -> None:
        _ = [torch.ones(1 << 18) for _ in range(4)]  # a MiB each

    def in_turn() -> None:
        for _ in range(4):
            torch.ones(1 << 18)

    assert peak_live_bytes(together) == pytest.approx(4 << 20, rel=0.01)
    assert peak_live_bytes(in_turn) <= (2 << 20) * 1.01


def test_memory_of_a_denoising_step() -> None:
    benchmark = load_script("benchmarks/memory.py")
    rows = benchmark.measure(benchmark.Args(config=CONFIG, batch_size=2, repetitions=1))
    flat = rows["next_token"]["bytes"]
    assert rows["denoise"]["bytes"] <= 1.3 * flat
    # Walks of any length hold one state; unrolled training holds one for each backpropagated iteration.
    assert rows["denoise, scoring, K = 32"]["bytes"] == pytest.approx(
        rows["denoise, scoring, K = 2"]["bytes"], rel=0.05
    )
    assert rows["unrolled, 8 with gradient"]["bytes"] > 1.5 * rows["unrolled, 2 with gradient"]["bytes"]
    assert rows["unrolled, 8 with gradient"]["bytes"] > 2 * flat
