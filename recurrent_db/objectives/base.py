"""The contract of an objective, and functions that objectives share.

An objective defines how a model is trained: what a step computes, its loss, and how many FLOPs it takes. Other code never
compares an objective's name. docs/adding-an-objective.md shows how to add one.

The trainer calls the objective once for each micro-batch:

    loss, metrics = objective(model, batch, rng, progress)

- ``loss`` is the mean over the micro-batch's tokens, in nats.
- ``metrics`` are detached tensors: 0-dimensional for a mean over all tokens, or shape (2,) with (sum, weight) for a mean
  over some of the tokens.
- ``rng`` draws numbers as a function of (seed, step, sample, stream).
- ``progress`` is the share of the budget spent so far, in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recurrent_db.accounting.flops import step_cost
from recurrent_db.config import Config
from recurrent_db.model.head import linear_cross_entropy
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.model.recurrence import Recurrence
from recurrent_db.rng import Rng

Metrics = dict[str, Tensor]


class Objective:
    """Base class of all objectives. `next_token` is the smallest example.

    A subclass must define ``recurrence``, `__call__` and `passes`. The defaults of the other members fit an objective that
    trains the whole model from the first step, has no state, and is scored by its likelihood at each K.
    """

    recurrence: Recurrence
    """Computes K iterations at inference for checkpoints of this objective. Objectives on images have none."""
    default_k: int = 1
    """Number of iterations K that an exported model runs by default."""
    flat: ClassVar[bool] = False
    """Whether only the first iteration is trained, so that the model is scored and used at K = 1."""
    two_stream: bool = False
    """Whether training uses two-stream attention."""
    core_trained: bool = True
    """Whether the core's layers have been trained so far. A property may change it during a run."""

    def __call__(self, model: Any, batch: Any, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        """Compute the loss of one micro-batch, in nats per token, and the metrics to log. The docstring of
        `recurrent_db.objectives.base` describes both. On text, ``model`` is a `LoopedLM` and ``batch`` a `data.Batch`. On
        images they are a network of `model.image_networks` and a `data.ImageBatch`."""
        raise NotImplementedError

    def passes(self, rng: Rng, progress: float) -> Passes:
        """The passes that `__call__` runs with the same ``rng`` and ``progress``. FLOPs are counted from them."""
        raise NotImplementedError

    def passes_of(self, row: Mapping[str, Any]) -> Passes | None:
        """The passes of a logged step, from its line of metrics.jsonl; None if the line does not tell."""
        return None

    def cost_rows(self) -> dict[str, dict[Passes, float]]:
        """Columns of the table of `recurrent-db flops`.

        Maps the name of a way to train with this objective to its kinds of step, each with its share of the steps. A name
        that several objectives return is printed once.
        """
        return {}

    def prepare(self, model: Any) -> None:
        """Called once before training. Override it to freeze parameters that the run does not train."""

    def visits(self, progress: float) -> int:
        """For how many steps in a row a slot (a place in the batch) holds its sample; see `data.loader.Slots`.

        Whenever the number changes along the run, all slots take new samples.
        """
        return 1

    def grow(self, model: Any, progress: float) -> list[nn.Parameter]:
        """Called before each step and before each save. Override it to set weights by a rule instead of a gradient.

        Returns the parameters that it set (their shards if the model is sharded). The trainer then resets their optimizer
        state, the running mean of the loss and the EMA.
        """
        return []

    def held_out(self, model: Any, batches: Iterable[Any], vocabulary: Any, seed: int) -> dict[str, float]:
        """Score held-out batches and return the metrics by name. ``vocabulary`` is the tokenizer or the images' classes. An
        empty result means that a language model is scored by its likelihood at each K instead."""
        return {}

    def describe(self, model: Any) -> list[str]:
        """Lines to print before training starts."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The objective's own state, as JSON values; empty if it has none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError, KeyError or TypeError: ``state`` is anything else.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {sorted(state)}")

    def slot_tensors(self) -> dict[str, Tensor]:
        """What the objective keeps for this process's slots between steps, by name ``NAME.SLOT``. Checkpoints hold it."""
        return {}

    def load_slot_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `slot_tensors`, for the slots that this process computes.

        Raises:
            ValueError, KeyError or TypeError: ``tensors`` is anything else.
        """
        if tensors:
            raise ValueError(f"{type(self).__name__} keeps no tensors, got {sorted(tensors)}")


def mean_passes(objective: Objective, config: Config, draws: int) -> dict[Passes, float]:
    """Estimate the share of each kind of step in a run, from ``draws`` steps spread evenly over the budget.

    If FLOPs are the budget's only limit (or with seconds), expensive kinds of step are fewer: shares are divided by the
    cost.
    """
    budget = config.budget
    drawn = Counter(objective.passes(Rng(config.seed, step), (step + 0.5) / draws) for step in range(draws))
    by_flops = budget.flops is not None and budget.tokens is None and budget.steps is None
    steps = {passes: times / (step_cost(config, passes).total if by_flops else 1) for passes, times in drawn.items()}
    return {passes: count / sum(steps.values()) for passes, count in steps.items()}


def cross_entropy(
    model: LoopedLM, hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy in nats.

    Args:
        hidden_BTD: the coda's output.
        targets_BT: int64 tokens.
        weights_BT: factors on the losses, broadcastable to (B, T).

    Returns:
        The weighted mean over positions, 0-dimensional, with gradient; and the losses without weights, fp32 (B, T),
        detached.
    """
    ones = torch.full(targets_BT.shape, 1 / targets_BT.numel(), device=targets_BT.device)
    weights_BT = ones if weights_BT is None else ones * weights_BT
    flat = targets_BT.flatten(), weights_BT.flatten()
    hidden_ND = hidden_BTD.flatten(0, 1)
    mean, losses_N = linear_cross_entropy(hidden_ND, model.head_weight, *flat, softmax=model.softmax_loss)
    return mean, losses_N.view(targets_BT.shape)


def position_rms(state_BTD: Tensor) -> Tensor:
    """RMS of each position's state over its components, averaged over positions: 0-dimensional fp32, detached.

    The order (root first, then mean over positions) makes it independent of how a batch is cut into micro-batches.
    """
    return state_BTD.detach().float().square().mean(-1).sqrt().mean()
