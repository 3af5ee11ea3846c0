"""The learning rate over a budget, and the moving average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from recurrent_db.config import BudgetConfig, ScheduleConfig
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.schedule import budget_progress, learning_rate_scale, middle_of_step

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_warm_up_rises_in_a_line_from_zero(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup=0.2)
    for share in (0.0, 0.1, 0.5, 0.9):
        assert learning_rate_scale(schedule, share * 0.2) == pytest.approx(share)
    assert learning_rate_scale(schedule, 0.2) == pytest.approx(1)


def test_the_end_of_each_schedule() -> None:
    def rates(name: str) -> list[float]:
        return [
            learning_rate_scale(ScheduleConfig(name=name, warmup=0.0), progress) for progress in (0.5, 0.7, 0.85, 1.0)
        ]

    assert rates("constant") == [1, 1, 1, 1]
    assert rates("wsd") == pytest.approx([1, 1, 0.5, 0])  # the last 30 percent fall in a line
    assert rates("cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * p)) for p in (0.5, 0.7, 0.85, 1.0)])


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [0.3, 1.0, 1.01, 10.0, 10.2, 10.7])
def test_no_step_has_rate_0(name: str, steps: float) -> None:
    """Also not a last step of which less than half fits into the budget. Other steps take the rate at their middle."""
    budget, schedule, step = BudgetConfig(steps=steps), ScheduleConfig(name=name, warmup=0.1), 0
    while (before := budget_progress(budget, 0, 0, step, 0)) < 1:
        half_way = budget_progress(budget, 0, 0, step + 0.5, 0)
        middle = middle_of_step(before, half_way)
        assert learning_rate_scale(schedule, middle) > 0
        assert step + 1 > steps or middle == half_way
        step += 1


def test_progress_is_that_of_the_limit_nearest_to_its_end() -> None:
    budget = BudgetConfig(steps=10.0, tokens=1000.0)
    assert budget_progress(budget, flops=1e30, tokens=300, steps=2, seconds=1e9) == 0.3
    assert budget_progress(budget, flops=0, tokens=300, steps=4, seconds=0) == 0.4
    assert budget_progress(BudgetConfig(), flops=1, tokens=1, steps=1, seconds=1) == 0


def test_an_average_is_that_of_its_formula_and_skips_no_update() -> None:
    """shadow <- d shadow + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)). A skipped step only counts."""
    model = nn.Linear(1, 1, bias=False)
    weight, expected, decay = model.weight, 2.0, 0.3
    with torch.no_grad():
        weight.fill_(2.0)
    average = EMA(model, decay)
    for n, (value, skip) in enumerate([(5.0, False), (7.0, True), (-1.0, False), (4.0, False), (0.5, False)]):
        with torch.no_grad():
            weight.fill_(value)
        average.update(model, torch.tensor(skip))
        keep = min(decay, (1 + n) / (10 + n))
        expected = expected if skip else keep * expected + (1 - keep) * value
        assert average.shadow["weight"].item() == pytest.approx(expected)
    average.swap(model)
    assert weight.item() == pytest.approx(expected)
    assert average.shadow["weight"].item() == 0.5
    average.restart(model)
    assert average.updates == 0
    assert average.shadow["weight"].item() == pytest.approx(expected)
