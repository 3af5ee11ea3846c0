"""What each way of training computes at a configuration's shape: the rows of `recurrent-db flops`."""

from __future__ import annotations

import copy
from collections.abc import Callable

from recurrent_db.config import Config
from recurrent_db.model.passes import Passes
from recurrent_db.objective_config import OBJECTIVE_NAMES
from recurrent_db.objectives import Objective, build_objective
from recurrent_db.objectives.skipped_core import SkippedCore
from recurrent_db.rng import Rng


def _named(config: Config, name: str) -> Config:
    config = copy.deepcopy(config)
    config.objective.name = name
    return config


def training_passes(config: Config) -> dict[str, dict[Passes, float]]:
    """The passes of a training step by way of training, and the share of the steps that makes each."""
    rows: dict[str, dict[Passes, float]] = {}
    for name in OBJECTIVE_NAMES:
        rows |= build_objective(_named(config, name)).cost_rows()
    return rows


def inference_passes(config: Config) -> dict[str, Callable[[int], Passes]]:
    """What K iterations compute, by recurrence: the plain loop and the walk."""
    return {name: build_objective(_named(config, name)).recurrence.passes for name in ("unrolled", "denoise")}


def opening_phase(config: Config) -> dict[str, dict[str, float | None]]:
    """Shares of the budget that `one_step` spends without the core, and that its ``skip_core`` asks for; None without a
    budget."""
    budgeted = any(limit is not None for limit in vars(config.budget).values())
    phase = SkippedCore(config)
    return {
        "one_step": {
            "skip_core_share": phase.share if budgeted else None,
            "skip_core_asked": phase.asked if budgeted else None,
        }
    }


def block_passes(config: Config) -> dict[int, Passes]:
    """What a step of each block computes where each block is trained by a process of its own."""
    found = {}
    for block in range(1, config.model.n_blocks + 1):
        alone = copy.deepcopy(config)
        alone.blocks.only = block
        alone.blocks.shared = "owned" if config.blocks.shared == "all" else config.blocks.shared
        found[block] = _first_step(build_objective(alone))
    return found


def whole_passes(config: Config) -> Passes:
    """What a step computes where the blocks are one network, conditioned as they are and trained end to end."""
    whole = copy.deepcopy(config)
    whole.model.n_blocks, whole.model.block_layers, whole.blocks.shared = 1, [config.model.n_core], "all"
    return _first_step(build_objective(whole))


def _first_step(objective: Objective) -> Passes:
    return objective.passes(Rng(0, 0), 0.0)
