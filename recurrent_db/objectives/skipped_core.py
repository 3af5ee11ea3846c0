"""The opening phase of `one_step`: the core's blocks are skipped, then start as copies of the blocks around them.

Prelude and coda learn at a lower price while the core is skipped (stacking, arXiv 2405.15319). Long runs leave the phase
out: where it took .07 of the budget, runs ended no lower by it (docs/method.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recurrent_db.accounting.flops import step_cost
from recurrent_db.config import Config
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.optim.schedule import budget_progress

SKIPPED = Passes(core_grad=0, injections_grad=1)
"""A step that skips the core: the coda reads the injection."""
MOST, LEAST = 0.4, 0.15
"""Shares of the budget: the phase takes no more than the first, and is left out where it would take less than the second."""


def phase_share(config: Config) -> float:
    """Share of the budget that ``objective.one_step.skip_core`` tokens take for each weight of the matrices that such a
    step multiplies by; 0 where the budget does not say."""
    cost, budget = step_cost(config, SKIPPED), config.budget
    tokens = config.objective.one_step.skip_core * cost.matmul / 6
    steps = tokens / (config.data.batch_size * config.data.sequence_length)
    return budget_progress(budget, flops=tokens * cost.total, tokens=tokens, steps=steps, seconds=0.0)


class SkippedCore:
    """Whether the core is skipped at a point of the budget, and its start."""

    def __init__(self, config: Config) -> None:
        without = bool(config.init.from_) or not config.model.n_prelude + config.model.n_coda
        self.asked = 0.0 if without else min(MOST, phase_share(config))
        """Share of the budget that the configuration asks for, whether it is taken or left out as too little."""
        self.share = min(config.objective.one_step.next_token_share, self.asked) if self.asked >= LEAST else 0.0
        self.over = not self.share
        """Whether the core's blocks run."""
        self.resumed = False

    def skips(self, progress: float) -> bool:
        """Whether a step at this share of the budget skips the core."""
        return not self.over and progress < self.share

    def end(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        """When the phase is over, make the core's blocks copies of the blocks around them, from the first to the last.
        Returns the parameters that this sets."""
        if self.over or progress < self.share:
            return []
        self.over = True
        around, core = [*model.prelude, *model.coda], model.core.blocks
        with torch.no_grad():
            for number, block in enumerate(core):
                source = around[number * len(around) // len(core)]
                for parameter, value in zip(block.parameters(), source.parameters(), strict=True):
                    parameter.copy_(value)
        return list(core.parameters())

    def describe(self) -> list[str]:
        """Lines worth reading before training starts."""
        if self.share and not self.over:
            when = f"the core's blocks run from {100 * self.share:.3g}% of the budget on (objective.one_step.skip_core)"
            return [f"{when}: no score before then is that of a trained core"]
        asked = f"{100 * self.asked:.3g}% of the budget without them (objective.one_step.skip_core)"
        left_out = f"{asked} is left out as too little"
        if not self.over:  # stopped in the phase, and resumed with another budget
            return [f"the core's blocks start now, as copies of those around them: {left_out}"]
        if 0 < self.asked < LEAST and not self.resumed:
            return [f"the core's blocks run from the start: {left_out}"]
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"core_runs": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != {"core_runs"} or not isinstance(state["core_runs"], bool):
            raise ValueError(f"core_runs must be true or false, got {state}")
        self.resumed, self.over = True, state["core_runs"]
