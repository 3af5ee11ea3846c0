"""Ways of training, one file each, behind the contract in `base`."""

from __future__ import annotations

from collections.abc import Callable

from recurrent_db.config import Config
from recurrent_db.objectives.base import Metrics, Objective
from recurrent_db.objectives.denoise import Denoise
from recurrent_db.objectives.denoise_token import DenoiseToken
from recurrent_db.objectives.next_token import NextToken
from recurrent_db.objectives.unrolled import Unrolled

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "next_token": NextToken,
    "unrolled": Unrolled,
    "denoise": Denoise,
    "denoise-token": DenoiseToken,
    "denoise-paper": DenoiseToken,
}


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective.name`` names."""
    return OBJECTIVES[config.objective.name](config)


__all__ = ["OBJECTIVES", "Metrics", "Objective", "build_objective"]
