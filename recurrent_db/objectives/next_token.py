"""`next_token`: one core pass and next-token cross-entropy. This is the flat control in every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective, cross_entropy
from recurrent_db.recurrence.loop import PlainLoop
from recurrent_db.rng import Rng


class NextToken(Objective):
    """Run one core pass from a zero state."""

    recurrence = PlainLoop(initial="zeros")
    flat = True

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(batch.tokens_BT, visible)
        state_BTD = model.iterate(torch.zeros_like(e_BTD), e_BTD, visible=visible)
        return cross_entropy(model, model.decode(state_BTD, visible=visible), batch.targets_BT)[0], {}

    def passes(self, rng: Rng, progress: float) -> Passes:
        return Passes(core_grad=1)

    def cost_rows(self) -> dict[str, dict[Passes, float]]:
        return {"next_token": {Passes(core_grad=1): 1.0}}


def build(config: Config) -> NextToken:
    return NextToken()
