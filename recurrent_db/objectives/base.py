"""The contract of an objective, and what objectives share.

An objective says how a model is trained, and what it needs of the rest; nobody else asks for an objective by name. To add
one, write ``objectives/NAME.py`` with a function ``build(config)``, a section ``NAME`` in
`objective_config.Objectives`, and a test.

It is called once for each micro-batch,

    loss, metrics = objective(model, batch, rng, progress)

with the loss averaged over the micro-batch's tokens; metrics as detached 0-dimensional tensors averaged the same way,
or pairs (sum, weight), shape (2,), where the average is over some of the tokens; ``rng`` drawing as a function of
(seed, step, sample, stream); and ``progress`` the share of the budget that is spent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recurrent_db.accounting.flops import step_cost
from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.model.head import linear_cross_entropy
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.model.recurrence import Recurrence
from recurrent_db.rng import Rng

Metrics = dict[str, Tensor]


class Objective:
    """One way of training. `next_token` is the smallest example.

    A subclass has a ``recurrence``, `__call__` and `passes`. The rest has defaults: an objective that trains the whole
    model from the first step on, learns nothing of its own, and is scored as a likelihood by K.
    """

    recurrence: Recurrence
    """How a checkpoint of this objective runs K iterations."""
    default_k: int = 1
    """Iterations that an exported model runs where its user does not say."""
    flat: ClassVar[bool] = False
    """Whether only the first iteration is ever trained: K = 1 is the model."""
    two_stream: bool = False
    """Whether attention has a second stream of keys to serve."""
    core_trained: bool = True
    """Whether the core's blocks have run in training so far."""

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch, in nats per token, and what is worth logging."""
        raise NotImplementedError

    def passes(self, rng: Rng, progress: float) -> Passes:
        """What a step computes for each token, realised draws included: the basis of the FLOP count."""
        raise NotImplementedError

    def passes_of(self, row: Mapping[str, Any]) -> Passes | None:
        """What the step behind a row of metrics.jsonl computed, where the row says so."""
        return None

    def cost_rows(self) -> dict[str, dict[Passes, float]]:
        """Rows of `recurrent-db flops`: ways to train with this objective, each with the shares of its kinds of step. Where
        objectives give the same row it is printed once."""
        return {}

    def prepare(self, model: LoopedLM) -> None:
        """Called once before training: the place to freeze parameters that this run never trains."""

    def grow(self, model: LoopedLM, progress: float) -> list[nn.Parameter]:
        """Called before each step with the share of the budget that is spent, and before anything is saved: the place to
        set weights by a rule and not by a gradient. Returns those that it set, of a sharded model the shards: what was
        averaged of them before says nothing of them now."""
        return []

    def held_out(self, model: LoopedLM, batches: Iterable[Batch], tokenizer: Tokenizer, seed: int) -> dict[str, float]:
        """Columns for the metrics from held-out batches; empty where the run is scored as a likelihood by K."""
        return {}

    def describe(self, model: LoopedLM) -> list[str]:
        """Lines worth reading before training starts."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the objective learns on the way, as JSON values; empty where it learns nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s result. Raises ValueError, KeyError or TypeError for anything else."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


def mean_passes(objective: Objective, config: Config, draws: int) -> dict[Passes, float]:
    """What a run's steps would compute, and the share of each, by so many draws spread evenly over the budget. Of a budget
    in FLOPs alone a dearer step takes more, so that there are fewer of them."""
    budget = config.budget
    drawn = Counter(objective.passes(Rng(config.seed, step), (step + 0.5) / draws) for step in range(draws))
    by_flops = budget.flops is not None and budget.tokens is None and budget.steps is None
    steps = {passes: times / (step_cost(config, passes).total if by_flops else 1) for passes, times in drawn.items()}
    return {passes: count / sum(steps.values()) for passes, count in steps.items()}


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
