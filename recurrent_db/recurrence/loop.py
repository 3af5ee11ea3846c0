"""The plain loop: K iterations of the core from one initial state, then a read-out (Huginn, arXiv 2502.05171, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recurrent_db.model.attention import Visible
from recurrent_db.model.looped import STATE_STD, LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.model.recurrence import NoiseSource, Probe


def truncated_normal(u: Tensor, std: float) -> Tensor:
    """Map uniform numbers in [0, 1] to a normal distribution truncated at three standard deviations, as Huginn's initial
    state. ``std`` is the standard deviation before truncation."""
    tail = 0.0013498980316301  # Phi(-3)
    return std * torch.special.ndtri(tail + u * (1 - 2 * tail))


@dataclass(frozen=True)
class PlainLoop:
    """The plain loop. Implements `model.recurrence.Recurrence`."""

    initial: Literal["zeros", "random"]
    """Initial state: zeros, or a truncated normal with std sqrt(2/5)."""
    walk: None = None

    @property
    def loop(self) -> PlainLoop:
        return self

    @property
    def stochastic(self) -> bool:
        return self.initial == "random"

    def levels(self, k: int) -> list[float]:
        return []

    def start(self, like_BTD: Tensor, noise: NoiseSource) -> Tensor:
        if self.initial == "zeros":
            return torch.zeros_like(like_BTD)
        u = noise.uniform(like_BTD.shape[1], like_BTD.shape[2], "state", like_BTD.device)
        return truncated_normal(u, STATE_STD).to(like_BTD.dtype)

    def hidden(
        self,
        model: LoopedLM,
        tokens_BT: Tensor,
        e_BTD: Tensor,
        ks: Sequence[int],
        noise: NoiseSource,
        probe: Probe | None = None,
        visible: Visible | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        visible = visible or model.visible(e_BTD.shape[1])
        state, done = self.start(e_BTD, noise), 0
        for k in sorted(set(ks)):
            if probe is None:
                state = model.iterate(state, e_BTD, k - done, visible=visible)
            else:
                for iteration in range(1, k + 1):
                    state = probe.edit(state) if probe.edit is not None and iteration == k else state
                    state = model.iterate(state, e_BTD, visible=visible)
                    probe.states.append(state)
            done = k
            yield k, model.decode(state, visible=visible)

    def ready(self, model: LoopedLM) -> PlainLoop:
        return self

    def passes(self, k: int) -> Passes:
        return Passes(core_no_grad=k, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False)
