"""`one_step`: next-token training, then training of extra iterations with gradient through one core pass.

The budget has three phases:

1. Skip-core phase (short runs only): the core's layers do not run, and the coda reads the injection's output. It lasts
   ``skip_core`` tokens per weight; see `skipped_core`.
2. Next-token phase, until ``next_token_share`` of the budget: the first iteration is trained, as `next_token` does.
3. Iteration phase: a step draws a number l of earlier passes. l is 0 with probability ``first_probability``, else uniform
   over 1 to ``prior_iterations``.

A step of the iteration phase runs the core l times without gradient from the zero state, s_l = f(s_{l-1}, e), then once with
gradient, and takes the cross-entropy of the read-out:

    loss = -log p(token_{i+1} | read(f(stop(s_l), e)))

With ``state = carried`` a step of the iteration phase runs no pass without gradient. Each slot of the batch holds its sample
for N = ``prior_iterations`` + 1 steps (visits), and s_l is the state that the visit before left (`carried_states`). It was
computed with the weights of that step; the context e comes from the current weights. Every step trains all of the
iterations 1 to N, each in 1/N of its slots.

Backpropagating through the last pass alone comes from HRM (arXiv 2506.21734). No noise is added and the state never holds
the answer, so the likelihood at every K comes from one deterministic forward computation.

With ``corrupt_share``, a share of each sequence's input tokens, uniform between 0 and twice ``corrupt_share``, is replaced
by random tokens. The state is then an estimate from a corrupted context, which each pass learns to improve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective, cross_entropy, mean_passes, position_rms
from recurrent_db.objectives.carried_states import CarriedStates, by_visit
from recurrent_db.objectives.skipped_core import SKIPPED, SkippedCore
from recurrent_db.recurrence.loop import PlainLoop
from recurrent_db.rng import Rng

DRAWS = 1000
"""Number of steps, spread over the budget, from which the mean cost of a step is computed."""


def passes_of_depth(depth: float) -> Passes:
    """The passes of a step that trains iteration ``depth``, counted from 1; depth 0 skips the core."""
    return Passes(core_no_grad=round(depth) - 1, core_grad=1) if depth else SKIPPED


class OneStep(Objective):
    """Draw a number of core passes to run without gradient, then train the pass after them."""

    recurrence = PlainLoop(initial="zeros")

    def __init__(self, config: Config) -> None:
        self.whole, self.config = config, config.objective.one_step
        self.default_k = 1 + self.config.prior_iterations
        self.skipped_core = SkippedCore(config)
        self.states = CarriedStates(config.data.batch_size) if self.config.state == "carried" else None

    @property
    def core_trained(self) -> bool:  # type: ignore[override]
        return self.skipped_core.over

    def visits(self, progress: float) -> int:
        carried = self.states is not None and progress >= self.config.next_token_share
        return 1 + self.config.prior_iterations if carried else 1

    def _depth(self, rng: Rng, progress: float) -> int:
        """The number of core passes of a step, the last with gradient; 0 in the skip-core phase."""
        if self.skipped_core.skips(progress):
            return 0
        if self.visits(progress) > 1:
            return 1
        if progress < self.config.next_token_share or rng.scalar("start") < self.config.first_probability:
            return 1
        return 2 + int(rng.scalar("depth") * self.config.prior_iterations)

    def corrupted(self, tokens_BT: Tensor, samples_B: Tensor, vocab_size: int, rng: Rng) -> Tensor:
        """The input tokens with a random share of each sequence replaced, int64 (B, T), on the tokens' device."""
        shape = (tokens_BT.shape[1],)
        rate_B1 = rng.uniform(samples_B, (1,), "noise/rate") * 2 * self.config.corrupt_share
        hit_BT = rng.uniform(samples_B, shape, "noise/where") < rate_B1
        other_BT = (rng.uniform(samples_B, shape, "noise/what") * vocab_size).long()
        return torch.where(hit_BT.to(tokens_BT.device), other_BT.to(tokens_BT.device), tokens_BT)

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        depth, visits, tokens_BT = self._depth(rng, progress), self.visits(progress), batch.tokens_BT
        if self.config.corrupt_share:
            tokens_BT = self.corrupted(tokens_BT, batch.sample_index_B, model.config.vocab_size, rng)
        visible = model.visible(tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(tokens_BT, visible)
        state_BTD = torch.zeros_like(e_BTD)
        if self.states is not None and visits > 1:
            state_BTD, visit_B = self.states.take(batch.sample_index_B, rng, state_BTD)
        if not depth:
            state_BTD = model.inject(state_BTD, e_BTD)
        else:
            with torch.no_grad():
                state_BTD = model.iterate(state_BTD, e_BTD, depth - 1, visible=visible)
            state_BTD = model.iterate(state_BTD, e_BTD, visible=visible)
        loss, losses_BT = cross_entropy(model, model.decode(state_BTD, visible=visible), batch.targets_BT)
        metrics = {"depth": torch.tensor(float(depth)), "state_rms": position_rms(state_BTD)}
        if self.states is not None and visits > 1:
            self.states.keep(batch.sample_index_B, rng, visit_B, state_BTD)
            metrics |= by_visit(visits, visit_B, losses_BT, state_BTD)
        return loss, metrics

    def passes(self, rng: Rng, progress: float) -> Passes:
        return passes_of_depth(self._depth(rng, progress))

    def passes_of(self, row: Mapping[str, Any]) -> Passes | None:
        """From the logged depth. A resumed run may have changed its budget, so its configuration alone does not tell which
        steps it ran."""
        depth = row.get("depth")
        return None if depth is None else passes_of_depth(float(depth))

    def cost_rows(self) -> dict[str, dict[Passes, float]]:
        return {"one_step": mean_passes(self, self.whole, DRAWS)}

    def grow(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        return self.skipped_core.end(model, progress)

    def describe(self, model: LoopedLM) -> list[str]:
        return self.skipped_core.describe()

    def state_dict(self) -> dict[str, Any]:
        return self.skipped_core.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_core.load_state_dict(state)

    def slot_tensors(self) -> dict[str, Tensor]:
        return self.states.tensors() if self.states is not None else {}

    def load_slot_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self.states is None:
            return super().load_slot_tensors(tensors)
        self.states.load(tensors)


def build(config: Config) -> OneStep:
    return OneStep(config)
