"""The skip-core phase of `one_step`: the core's layers do not run, and then start as copies of the layers around them.

Prelude and coda train at fewer FLOPs per token without the core (stacking, arXiv 2405.15319). Long runs leave the phase out,
because it did not lower their loss when it took 0.07 of the budget (docs/method.md).
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
"""The passes of a step that skips the core: one injection, which the coda reads."""
MOST, LEAST = 0.4, 0.15
"""Longest and shortest phase, as shares of the budget. A shorter phase is left out."""


def phase_share(config: Config) -> float:
    """Share of the budget that the skip-core phase takes; 0 if the budget's only limit is seconds.

    The phase has ``objective.one_step.skip_core`` tokens for each weight of the matrices that a step without the core
    multiplies by.
    """
    cost, budget = step_cost(config, SKIPPED), config.budget
    tokens = config.objective.one_step.skip_core * cost.matmul / 6
    steps = tokens / (config.data.batch_size * config.data.sequence_length)
    return budget_progress(budget, flops=tokens * cost.total, tokens=tokens, steps=steps, seconds=0.0)


class SkippedCore:
    """Decides when the core is skipped, and initialises it at the end of the phase."""

    def __init__(self, config: Config) -> None:
        without = bool(config.init.from_) or not config.model.n_prelude + config.model.n_coda
        self.asked = 0.0 if without else min(MOST, phase_share(config))
        """Length of the phase by the configuration, as a share of the budget, even if it is left out as too short."""
        self.share = min(config.objective.one_step.next_token_share, self.asked) if self.asked >= LEAST else 0.0
        self.over = not self.share
        """Whether the phase is over or left out, so that the core's layers run."""
        self.resumed = False

    def skips(self, progress: float) -> bool:
        """Whether a step skips the core when the share ``progress`` of the budget is spent."""
        return not self.over and progress < self.share

    def end(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        """At the end of the phase, copy the layers of prelude and coda, in order and spread evenly, into the core's layers.
        Returns the parameters that it sets; empty at any other time."""
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
        """Lines to print before training starts."""
        key = "objective.one_step.skip_core"
        if self.share and not self.over:
            return [
                f"skip-core phase until {100 * self.share:.3g}% of the budget ({key}): scores before then lack the core"
            ]
        left_out = f"the skip-core phase would take {100 * self.asked:.3g}% of the budget ({key}), which is too short"
        if not self.over:  # stopped in the phase, and resumed with another budget
            return [f"the core starts now, with copies of the layers around it: {left_out}"]
        if 0 < self.asked < LEAST and not self.resumed:
            return [f"the core runs from the first step: {left_out}"]
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"core_runs": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != {"core_runs"} or not isinstance(state["core_runs"], bool):
            raise ValueError(f"core_runs must be true or false, got {state}")
        self.resumed, self.over = True, state["core_runs"]
