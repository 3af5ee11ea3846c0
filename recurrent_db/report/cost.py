"""A run's cost: FLOPs per token by part, bytes by holder, energy."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass
from typing import Any

from recurrent_db.accounting.flops import Cost, step_cost_by_part
from recurrent_db.objectives import build_objective, drawn_passes
from recurrent_db.report.runs import Run, number
from recurrent_db.rng import Rng

HOLDERS = ("parameters", "gradients", "optimizer", "average", "activations")
"""Kinds of tensors that hold memory: the columns ``memory/*_bytes`` of metrics.jsonl."""


def training_cost(run: Run, most: int = 2000) -> defaultdict[str, Cost]:
    """Mean FLOPs per training token, by part of the model. A part that the model lacks costs nothing.

    The objective tells which passes each step ran: from the logged row, or else from the step's random draws, which depend
    on (seed, step). At most ``most`` evenly spaced steps are used. A run without rows is represented by 256 steps, spread
    over its budget.
    """
    config, objective = run.config, build_objective(run.config)
    steps: list[tuple[int, float, dict[str, Any]]] = []
    progress = 0.0
    for row in run.rows:
        if (step := number(row.get("step"))) is not None:
            steps.append((int(step) - 1, progress, row))
        progress = run.progress_at(row) or progress
    stride = math.ceil(len(steps) / most) or 1
    counts = Counter(
        objective.passes_of(row) or objective.passes(Rng(config.seed, step), at) for step, at, row in steps[::stride]
    )
    shares = {passes: count / counts.total() for passes, count in counts.items()} or drawn_passes(config, 256)
    mean: defaultdict[str, Cost] = defaultdict(Cost)
    for passes, share in shares.items():
        for part, cost in step_cost_by_part(config, passes).items():
            mean[part] += Cost(*(value * share for value in astuple(cost)))
    return mean


def update_flops_per_token(run: Run) -> float | None:
    """FLOPs per token of clipping, optimizer and weight average, as logged; None if the run did not log them."""
    tokens, flops = run.series("tokens", "flops_update")
    return float(flops[-1] / tokens[-1]) if len(tokens) and tokens[-1] > 0 else None


def memory_by_holder(run: Run) -> dict[str, float] | None:
    """Bytes by holder, each the maximum over all steps; None if the run logged none."""
    found = {holder: run.most(f"memory/{holder}_bytes") for holder in HOLDERS}
    if all(value is None for value in found.values()):
        return None
    return {holder: value or 0.0 for holder, value in found.items()}


@dataclass(frozen=True)
class Energy:
    """The GPU's energy: total joules at the last reading, and joules per token trained until then."""

    joules: float
    per_token: float


def energy(run: Run) -> Energy | None:
    """The last reading of the energy counter; None if the run logged none."""
    tokens, joules = run.series("tokens", "energy_joules")
    if not len(tokens) or tokens[-1] <= 0:
        return None
    return Energy(float(joules[-1]), float(joules[-1] / tokens[-1]))
