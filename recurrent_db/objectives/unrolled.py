"""`unrolled`: Huginn's training (arXiv 2502.05171, section 3.3) with random depth and truncated backpropagation."""

from __future__ import annotations

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.model.depth import sample_depth
from recurrent_db.model.looped import STATE_STD, LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.objective_config import UnrolledConfig
from recurrent_db.objectives.base import Metrics, Objective, cross_entropy, position_rms
from recurrent_db.recurrence.loop import PlainLoop, truncated_normal
from recurrent_db.rng import Rng

NAME = "unrolled"
"""The objective's name in a configuration."""


class Unrolled(Objective):
    """Draw a depth for the step, run so many core passes from a random state, backpropagate through the last of them."""

    recurrence = PlainLoop(initial="random")

    def __init__(self, config: UnrolledConfig) -> None:
        self.config, self.default_k = config, config.mean_depth

    def _depth(self, rng: Rng) -> tuple[int, int]:
        return sample_depth(rng, self.config.mean_depth, self.config.truncation)

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        without, with_gradient = self._depth(rng)
        visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(batch.tokens_BT, visible)
        u = rng.uniform(batch.sample_index_B, tuple(e_BTD.shape[1:]), "state", e_BTD.device, torch.float32)
        state_BTD = truncated_normal(u, STATE_STD).to(e_BTD.dtype)
        with torch.no_grad():
            state_BTD = model.iterate(state_BTD, e_BTD, without, visible=visible)
        state_BTD = model.iterate(state_BTD, e_BTD, with_gradient, visible=visible)
        loss = cross_entropy(model, model.decode(state_BTD, visible=visible), batch.targets_BT)[0]
        return loss, {"depth": torch.tensor(float(without + with_gradient)), "state_rms": position_rms(state_BTD)}

    def passes(self, rng: Rng, progress: float) -> Passes:
        without, with_gradient = self._depth(rng)
        return Passes(core_no_grad=without, core_grad=with_gradient)

    def cost_rows(self) -> dict[str, dict[Passes, float]]:
        """Steps of depth r = mean_depth. The distribution's mean is r + 1, because one is added to the Poisson count."""
        depth = self.config.mean_depth
        truncation = min(self.config.truncation or depth, depth)
        return {
            "unrolled_truncated": {Passes(core_no_grad=depth - truncation, core_grad=truncation): 1.0},
            "unrolled_full": {Passes(core_grad=depth): 1.0},
        }


def build(config: Config) -> Unrolled:
    return Unrolled(config.objective.unrolled)
