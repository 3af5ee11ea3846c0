"""The contract of an objective, and what objectives share.

An objective says how a model is trained; nothing else knows. It is called once for each micro-batch,

    loss, metrics = objective(model, batch, rng, progress)

with the loss averaged over the micro-batch's tokens; metrics as detached 0-dimensional tensors averaged the same way,
or pairs (sum, weight), shape (2,), where the average is over some of the tokens; ``rng`` drawing as a function of
(seed, step, sample, stream); and ``progress`` the share of the budget that is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from recurrent_db.accounting.flops import Passes
from recurrent_db.data import Batch
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.model.head import linear_cross_entropy
from recurrent_db.model.looped import LoopedLM
from recurrent_db.recurrence.walk import Recurrence
from recurrent_db.rng import Rng

Metrics = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """One way of training. See `next_token` for the smallest example."""

    @property
    def recurrence(self) -> Recurrence:
        """How a checkpoint of this objective runs K iterations."""
        ...

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch, in nats per token, and what is worth logging."""
        ...

    def passes(self, rng: Rng, progress: float) -> Passes:
        """What a step computes for each token, realised draws included: the basis of the FLOP count."""
        ...

    def after_step(self, taken: Tensor, reduce: Reduce) -> None:
        """Called once after each optimizer step, when all its micro-batches have been seen: the place to learn from
        them, unless the step was not ``taken`` because a number was not finite (a 0-dimensional bool on the device;
        to look at it on the host makes the host wait). ``reduce`` sums a tensor over all
        processes; draws must not change before this."""
        ...

    def grow(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        """Called before each step with the share of the budget that is spent, and before anything is saved: the place to
        set weights by a rule and not by a gradient. Returns those that it set, of a sharded model the shards: what was
        averaged of them before says nothing of them now."""
        ...

    def describe(self, model: LoopedLM) -> list[str]:
        """Lines worth reading before training starts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the objective learns on the way, as JSON values; empty where it learns nothing."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s result."""
        ...


@runtime_checkable
class ScoresItself(Protocol):
    """An objective whose runs are not (or not all) scored as a likelihood by K."""

    def held_out(self, model: LoopedLM, batches: Iterable[Batch], tokenizer: Tokenizer, seed: int) -> dict[str, float]:
        """Columns for the metrics from held-out batches; empty where the run is scored as others are."""
        ...


class NeverGrows:
    """Base of objectives that train the whole model from the first step on."""

    def grow(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        return []


class Stateless(NeverGrows):
    """Base of objectives that learn nothing of their own and have nothing to say."""

    def after_step(self, taken: Tensor, reduce: Reduce) -> None:
        pass

    def describe(self, model: LoopedLM) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


def cross_entropy(
    model: LoopedLM, hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy in nats: its mean over positions (each times its weight, broadcastable to (B, T)), to be
    differentiated, and the plain losses, fp32 (B, T), detached."""
    ones = torch.full(targets_BT.shape, 1 / targets_BT.numel(), device=targets_BT.device)
    weights_BT = ones if weights_BT is None else ones * weights_BT
    flat = targets_BT.flatten(), weights_BT.flatten()
    hidden_ND = hidden_BTD.flatten(0, 1)
    mean, losses_N = linear_cross_entropy(hidden_ND, model.embedding.weight, *flat, softmax=model.softmax_loss)
    return mean, losses_N.view(targets_BT.shape)


def position_rms(state_BTD: Tensor) -> Tensor:
    """RMS per component of each position's state, averaged over positions: 0-dimensional fp32, detached, and the same
    however a batch is cut into micro-batches."""
    return state_BTD.detach().float().square().mean(-1).sqrt().mean()
