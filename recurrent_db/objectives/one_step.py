"""`one_step`: next-token training, then extra iterations trained one at a time.

A step of the extra iterations runs the core l times without gradient from the silent state, s_l = f(s_{l-1}, e), makes
one more pass with gradient, and takes the cross-entropy of its read-out:

    loss = -log p(token_{i+1} | read(f(stop(s_l), e)))

The gradient of one step through the last iteration alone is HRM's (arXiv 2506.21734). Nothing is noised: the state never
holds the answer, so the likelihood at every K is that of one deterministic pass.

The budget has three phases. The first (``skip_core`` tokens per weight; short runs only) skips the core: the coda reads the
injection, and prelude and coda learn at a lower price. Then the core's blocks start as copies of those (stacking, arXiv
2405.15319) and the first iteration is trained, which is next-token training. After ``next_token_share`` of the budget, l
is 0 with ``first_probability`` and otherwise uniform over 1 to ``prior_iterations``.

With ``corrupt_share``, a share of a sequence's context tokens (uniform between 0 and twice that) is replaced by random
tokens: the state is then an estimate from a corrupted context, which each pass learns to improve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurrent_db.accounting.flops import Passes, step_cost
from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.model.looped import LoopedLM
from recurrent_db.objectives.base import Metrics, Reduce, cross_entropy, position_rms
from recurrent_db.optim.schedule import budget_progress
from recurrent_db.recurrence.walk import PlainRecurrence
from recurrent_db.rng import Rng

SHALLOW = Passes(core_grad=0, injections_grad=1)
"""A step that trains no iteration."""
MOST, LEAST = 0.4, 0.15
"""Shares of the budget: such steps take no more than the first, and where they would take less than the second there are
none: runs of which they took .07 ended no lower by them (docs/method.md)."""


def shallow_share(config: Config) -> float:
    """Share of the budget that ``objective.one_step.skip_core`` tokens are for each weight of the matrices that such a step
    multiplies by; 0 where the budget does not say."""
    cost, budget = step_cost(config, SHALLOW), config.budget
    tokens = config.objective.one_step.skip_core * cost.matmul / 6
    steps = tokens / (config.data.batch_size * config.data.sequence_length)
    return budget_progress(budget, flops=tokens * cost.total, tokens=tokens, steps=steps, seconds=0.0)


def passes_of(depth: float) -> Passes:
    """What a step ran whose metrics have this ``prior_iterations``."""
    return Passes(core_no_grad=round(depth) - 1, core_grad=1) if depth else SHALLOW


class OneStep:
    """Draw how many iterations came before, run them without gradient, train the next one."""

    def __init__(self, config: Config) -> None:
        self.config = config.objective.one_step
        self.recurrence = PlainRecurrence(initial="zeros")
        alone = bool(config.init.from_) or not config.model.n_prelude + config.model.n_coda
        self.asked = 0.0 if alone else min(MOST, shallow_share(config))
        self.shallow = min(self.config.next_token_share, self.asked) if self.asked >= LEAST else 0.0
        self.grown = not self.shallow
        self.resumed = False

    def _depth(self, rng: Rng, progress: float) -> int:
        """The iteration that a step trains, from 1; 0 where it trains none."""
        if not self.grown and progress < self.shallow:
            return 0
        if progress < self.config.next_token_share or rng.scalar("start") < self.config.first_probability:
            return 1
        return 2 + int(rng.scalar("depth") * self.config.prior_iterations)

    def corrupted(self, tokens_BT: Tensor, samples_B: Tensor, vocab_size: int, rng: Rng) -> Tensor:
        """The context with a share of its tokens replaced, int64 (B, T), on the tokens' device."""
        shape = (tokens_BT.shape[1],)
        rate_B1 = rng.uniform(samples_B, (1,), "noise/rate") * 2 * self.config.corrupt_share
        hit_BT = rng.uniform(samples_B, shape, "noise/where") < rate_B1
        other_BT = (rng.uniform(samples_B, shape, "noise/what") * vocab_size).long()
        return torch.where(hit_BT.to(tokens_BT.device), other_BT.to(tokens_BT.device), tokens_BT)

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        depth, tokens_BT = self._depth(rng, progress), batch.tokens_BT
        if self.config.corrupt_share:
            tokens_BT = self.corrupted(tokens_BT, batch.sample_index_B, model.config.vocab_size, rng)
        visible = model.visible(tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(tokens_BT, visible)
        state_BTD = torch.zeros_like(e_BTD)
        if not depth:
            state_BTD = model.inject(state_BTD, e_BTD)
        else:
            with torch.no_grad():
                state_BTD = model.iterate(state_BTD, e_BTD, depth - 1, visible=visible)
            state_BTD = model.iterate(state_BTD, e_BTD, visible=visible)
        loss = cross_entropy(model, model.decode(state_BTD, visible=visible), batch.targets_BT)[0]
        return loss, {"depth": torch.tensor(float(depth)), "state_rms": position_rms(state_BTD)}

    def after_step(self, taken: Tensor, reduce: Reduce) -> None:
        pass

    def grow(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        """When the core's blocks begin to run, make them copies of the blocks around them, from the first to the last."""
        if self.grown or progress < self.shallow:
            return []
        self.grown = True
        around, core = [*model.prelude, *model.coda], model.core.blocks
        with torch.no_grad():
            for number, block in enumerate(core):
                source = around[number * len(around) // len(core)]
                for parameter, value in zip(block.parameters(), source.parameters(), strict=True):
                    parameter.copy_(value)
        return list(core.parameters())

    def describe(self, model: LoopedLM) -> list[str]:
        if self.shallow and not self.grown:
            when = (
                f"the core's blocks run from {100 * self.shallow:.3g}% of the budget on (objective.one_step.skip_core)"
            )
            return [f"{when}: no score before then is that of a trained core"]
        share = f"{100 * self.asked:.3g}% of the budget"
        left_out = f"{share} without them (objective.one_step.skip_core) is left out as too little"
        if not self.grown:  # stopped before they ran, and resumed with another budget or of another version
            return [f"the core's blocks start now, as copies of those around them: {left_out}"]
        return (
            [f"the core's blocks run from the start: {left_out}"] if 0 < self.asked < LEAST and not self.resumed else []
        )

    def state_dict(self) -> dict[str, Any]:
        return {"grown": self.grown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() - {"grown"} or not isinstance(state.get("grown", True), bool):
            raise ValueError(f"grown must be true or false, got {state}")
        self.resumed = True
        self.grown = state.get("grown", True)  # runs of before there was this ran all blocks from the start

    def passes(self, rng: Rng, progress: float) -> Passes:
        return passes_of(self._depth(rng, progress))
