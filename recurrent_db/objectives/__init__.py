"""Objectives: ways of training a model. `base` has the contract that each of them fulfils.

Each objective has a file of its own name. Other files are shared parts: `denoise_blocks` (`denoise` for a model in blocks),
`block_choice` (which block a step trains), `skipped_core` (the skip-core phase of `one_step`), `carried_states` (its states
between steps), `costs` and `cost_table` (`recurrent-db flops`).
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective, mean_passes


def build_objective(config: Config) -> Objective:
    """The objective ``config.objective.name``, in its form for a looped model or a model in blocks."""
    blocks_file = config.objective.own.blocks_file if config.model.n_blocks else ""
    module = importlib.import_module(f"{__name__}.{blocks_file or config.objective.name}")
    return cast(Objective, module.build(config))


def drawn_passes(config: Config, draws: int) -> dict[Passes, float]:
    """`base.mean_passes` for the configuration's objective."""
    return mean_passes(build_objective(config), config, draws)


def load_objective_state(
    objective: Objective, state: dict[str, Any], source: object, slot_tensors: dict[str, Tensor] | None = None
) -> None:
    """Restore an objective from its saved state.

    Args:
        state: the result of `Objective.state_dict`.
        source: where the state comes from, for error messages.
        slot_tensors: the result of `Objective.slot_tensors`, to continue training; None leaves them as they are.

    Raises:
        UserError: the state does not fit the objective.
    """
    try:
        objective.load_state_dict(state)
        if slot_tensors is not None:
            objective.load_slot_tensors(slot_tensors)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{source}: the saved state of the objective does not fit {type(objective).__name__}: {error}"
        ) from None


__all__ = ["Metrics", "Objective", "build_objective", "drawn_passes", "load_objective_state"]
