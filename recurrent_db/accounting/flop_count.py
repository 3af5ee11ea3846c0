"""Cumulative FLOPs of a run, as the trainer, checkpoints, ``metrics.jsonl`` and reports record them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recurrent_db.accounting.flops import Cost


@dataclass
class FlopCount:
    """Cumulative FLOPs by kind."""

    forward: float = 0.0
    backward: float = 0.0
    backward_weight: float = 0.0
    """The part of ``backward`` for the gradients of the weights."""
    recomputed: float = 0.0
    """Forward work that the backward pass repeats. Not part of ``total``."""
    causal: float = 0.0
    """``total`` with attention counted only over the pairs that the causal mask allows."""
    update: float = 0.0
    """Clipping, optimizer and EMA. Not part of ``total``."""

    @property
    def total(self) -> float:
        """Model FLOPs, which budgets and MFU count."""
        return self.forward + self.backward

    def add(self, cost: Cost, update: float, tokens: int) -> None:
        """Add one step of ``tokens`` tokens. ``cost`` is per token, ``update`` is the FLOPs of the step's update."""
        self.forward += cost.forward * tokens
        self.backward += cost.backward * tokens
        self.backward_weight += cost.backward_weight * tokens
        self.recomputed += cost.recomputed * tokens
        self.causal += cost.causal * tokens
        self.update += update

    def row(self) -> dict[str, float]:
        """The columns of ``metrics.jsonl``: ``flops`` is the total, ``flops_<kind>`` each kind."""
        return {"flops": self.total, **{f"flops_{kind}": value for kind, value in vars(self).items()}}

    @classmethod
    def from_row(cls, row: Mapping[str, float]) -> FlopCount:
        """The inverse of `row`. Other columns are ignored."""
        return cls(**{kind: row[f"flops_{kind}"] for kind in vars(cls())})


FLOP_COLUMNS = tuple(FlopCount().row())
"""Names of the FLOP columns of ``metrics.jsonl``."""
