"""The passes of each objective's steps, from which `recurrent-db flops` computes its tables."""

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
    """All objectives' `cost_rows`: for each way to train, its kinds of step and their shares."""
    found: dict[str, dict[Passes, float]] = {}
    for name in OBJECTIVE_NAMES:
        found |= build_objective(_named(config, name)).cost_rows()
    return found


def inference_passes(config: Config) -> dict[str, Callable[[int], Passes]]:
    """Functions from K to the passes of K iterations: ``unrolled`` for the plain loop, ``denoise`` for the walk."""
    return {name: build_objective(_named(config, name)).recurrence.passes for name in ("unrolled", "denoise")}


def skip_core_phase(config: Config) -> dict[str, dict[str, float | None]]:
    """Length of the skip-core phase of `one_step`, as shares of the budget; None without a budget.

    ``skip_core_share`` is the actual length. ``skip_core_asked`` is the length by the configuration, even if the phase is
    left out as too short.
    """
    budgeted = any(limit is not None for limit in vars(config.budget).values())
    phase = SkippedCore(config)
    return {
        "one_step": {
            "skip_core_share": phase.share if budgeted else None,
            "skip_core_asked": phase.asked if budgeted else None,
        }
    }


def block_passes(config: Config) -> dict[int, Passes]:
    """The passes of a training step of each block, by its number, if each block has a process of its own."""
    found = {}
    for block in range(1, config.model.n_blocks + 1):
        alone = copy.deepcopy(config)
        alone.blocks.only = block
        if config.blocks.shared == "all" and not config.objective.own.copies:
            alone.blocks.shared = "owned"
        found[block] = _first_step(build_objective(alone))
    return found


def whole_passes(config: Config) -> Passes:
    """The passes of a training step if all layers are one block with the same conditioning, trained end to end."""
    whole = copy.deepcopy(config)
    whole.model.n_blocks, whole.model.block_layers, whole.blocks.shared = 1, [config.model.n_core], "all"
    return _first_step(build_objective(whole))


def image_steps(config: Config) -> dict[str, tuple[Config, Passes]]:
    """The kinds of training steps of a network for images: for each name the configuration of its process, and its passes.

    In blocks these are the steps of each block in a process of its own, and of all layers as one block.
    """
    if not config.model.n_blocks:
        return {config.objective.name: (config, _first_step(build_objective(config)))}
    found = {}
    for block, passes in block_passes(config).items():
        alone = copy.deepcopy(config)
        alone.blocks.only = block
        found[f"block {block}"] = alone, passes
    whole = copy.deepcopy(config)
    whole.model.n_blocks, whole.model.block_layers, whole.blocks.shared = 1, [config.model.n_core], "all"
    return {**found, "end to end": (whole, whole_passes(config))}


def _first_step(objective: Objective) -> Passes:
    return objective.passes(Rng(0, 0), 0.0)
