"""Ways of training, one file each, behind the contract in `base`."""

from __future__ import annotations

from collections.abc import Callable

from recurrent_db.config import Config
from recurrent_db.objectives.base import Metrics, Objective, ScoresItself
from recurrent_db.objectives.blocks import BlockDenoise
from recurrent_db.objectives.denoise import Denoise
from recurrent_db.objectives.masked import Masked
from recurrent_db.objectives.next_token import NextToken
from recurrent_db.objectives.unrolled import Unrolled

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "next_token": NextToken,
    "unrolled": Unrolled,
    "denoise": Denoise,
    "denoise-paper": Denoise,
    "masked": Masked,
}


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective.name`` names; for a model in blocks its form for them."""
    if config.model.n_blocks and config.objective.name.startswith("denoise"):
        return BlockDenoise(config)
    return OBJECTIVES[config.objective.name](config)


__all__ = ["OBJECTIVES", "Metrics", "Objective", "ScoresItself", "build_objective"]
