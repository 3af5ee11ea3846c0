"""Ways of training, behind the contract in `base`.

An objective's file has its name. The others are parts: `denoise_blocks` (denoise for a model in blocks), `block_choice`,
`skipped_core` (the opening phase of one_step), `costs` and `cost_table` (`recurrent-db flops`).
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from recurrent_db.config import Config
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective, mean_passes


def build_objective(config: Config) -> Objective:
    """The objective that ``config.objective.name`` names, in its form for the model."""
    blocks_file = config.objective.own.blocks_file if config.model.n_blocks else ""
    module = importlib.import_module(f"{__name__}.{blocks_file or config.objective.name}")
    return cast(Objective, module.build(config))


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
