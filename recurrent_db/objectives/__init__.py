"""Ways of training, one file each, behind the contract in `base`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from recurrent_db.accounting.flops import Passes, step_cost
from recurrent_db.config import Config, DenoiseConfig
from recurrent_db.errors import UserError
from recurrent_db.objectives.base import Metrics, Objective, ScoresItself
from recurrent_db.objectives.blocks import BlockDenoise
from recurrent_db.objectives.denoise import Denoise
from recurrent_db.objectives.masked import Masked
from recurrent_db.objectives.next_token import NextToken
from recurrent_db.objectives.one_step import OneStep
from recurrent_db.objectives.unrolled import Unrolled
from recurrent_db.rng import Rng

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "next_token": NextToken,
    "unrolled": Unrolled,
    "one_step": OneStep,
    "denoise": Denoise,
    "denoise_paper": Denoise,
    "masked": Masked,
}


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective.name`` names; for a model in blocks its form for them."""
    if config.model.n_blocks and isinstance(config.objective.own, DenoiseConfig):
        return BlockDenoise(config)
    return OBJECTIVES[config.objective.name](config)


def drawn_passes(config: Config, draws: int) -> dict[Passes, float]:
    """What a run's steps would compute, and the share of each, by so many draws spread evenly over the budget. Of a budget
    in FLOPs alone a dearer step takes more, so that there are fewer of them."""
    objective, budget = build_objective(config), config.budget
    drawn = Counter(objective.passes(Rng(config.seed, step), (step + 0.5) / draws) for step in range(draws))
    by_flops = budget.flops is not None and budget.tokens is None and budget.steps is None
    steps = {passes: times / (step_cost(config, passes).total if by_flops else 1) for passes, times in drawn.items()}
    return {passes: count / sum(steps.values()) for passes, count in steps.items()}


def load_objective_state(objective: Objective, state: dict[str, Any], source: object) -> None:
    """Give an objective what it had learned. Raises `UserError`, naming ``source``, for what it does not keep."""
    try:
        objective.load_state_dict(state)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{source}: its objective's state is not what {type(objective).__name__} keeps: {error}"
        ) from None


__all__ = [
    "OBJECTIVES",
    "Metrics",
    "Objective",
    "ScoresItself",
    "build_objective",
    "drawn_passes",
    "load_objective_state",
]
