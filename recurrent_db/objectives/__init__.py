"""Ways of training, one file each, behind the contract in `base`. A file's name is its objective's."""

from __future__ import annotations

import importlib
from typing import Any, cast

from recurrent_db.config import Config
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective, mean_passes


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective.name`` names."""
    return cast(Objective, importlib.import_module(f"{__name__}.{config.objective.name}").build(config))


def drawn_passes(config: Config, draws: int) -> dict[Passes, float]:
    """`base.mean_passes` of the configuration's own objective."""
    return mean_passes(build_objective(config), config, draws)


def load_objective_state(objective: Objective, state: dict[str, Any], source: object) -> None:
    """Give an objective what it had learned. Raises `UserError`, naming ``source``, for what it does not keep."""
    try:
        objective.load_state_dict(state)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{source}: its objective's state is not what {type(objective).__name__} keeps: {error}"
        ) from None


__all__ = ["Metrics", "Objective", "build_objective", "drawn_passes", "load_objective_state"]
