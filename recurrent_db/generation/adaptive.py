"""Sequential decoding in which each token takes as many iterations as it needs: `Adaptive`.

After each iteration a criterion compares with the one before it; where they differ by less than the threshold, the position
is read out as it is (Huginn's zero-shot adaptive compute, arXiv 2502.05171, section 6.1):

- `kl`: the divergence KL(p_n || p_(n-1)) of the read-outs, nats.
- `entropy`: the difference of the read-outs' entropies, nats.
- `latent`: the states' difference, as a share of the state's norm. It needs no read-out; the other two make one (coda and
  head) after each iteration.

What later positions see of one that left after n iterations: in their iterations up to n what it made in the same one, in
all later ones what it made in its n-th, its last: the slots of iterations that did not run hold copies. The coda sees the
states that were read out.

With a warm start a position's state starts as that of the one before it was read out, and not from zeros or noise.

Both are about the last position of a context and the new ones: those before, which are run together, start as ever and run
all K iterations.

Each row leaves by itself: its iterations are the same in any batch. A step ends when all of its rows have left, so a batch
saves of the time what its slowest row does.

Shapes: B rows, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recurrent_db.errors import UserError
from recurrent_db.generation.loop_decoder import LoopRows
from recurrent_db.model.attention import Visible
from recurrent_db.model.layers import wide

THRESHOLDS = {"kl": 5e-4, "entropy": 1e-3, "latent": 0.03}
"""Criteria, and below what they hold where nothing else is asked for."""


@dataclass(frozen=True)
class Exit:
    """When a position has settled."""

    criterion: str
    threshold: float

    @classmethod
    def parse(cls, word: str) -> Exit:
        """``CRITERION`` or ``CRITERION:THRESHOLD``, as in ``kl:1e-3``. Raises `UserError`."""
        name, colon, number = word.partition(":")
        try:
            threshold = float(number) if colon else THRESHOLDS[name]
            if name in THRESHOLDS and 0 <= threshold < float("inf"):
                return cls(name, threshold)
        except (KeyError, ValueError):
            pass
        raise UserError(f"an exit is kl, entropy or latent, with a threshold of 0 or more as in kl:1e-3, not {word!r}")

    @property
    def reads(self) -> bool:
        """Whether it looks at read-outs, and not at states."""
        return self.criterion != "latent"

    def settled(self, old: Tensor, new: Tensor) -> Tensor:
        """Whether two successive read-outs, logits (B, V), or states (B, D) are near enough: bool (B,)."""
        old, new = old.to(wide(old.dtype)), new.to(wide(new.dtype))
        if self.criterion == "latent":
            return (new - old).norm(dim=-1) < self.threshold * new.norm(dim=-1)
        log_p, log_q = new.log_softmax(-1), old.log_softmax(-1)
        if self.criterion == "kl":
            return (log_p.exp() * (log_p - log_q)).sum(-1) < self.threshold
        entropies = [-(logs.exp() * logs).sum(-1) for logs in (log_p, log_q)]
        return (entropies[0] - entropies[1]).abs() < self.threshold


class Adaptive(LoopRows):
    """Up to K iterations a token, until ``exit``; K where there is none. Other arguments as of `LoopRows`."""

    def __init__(self, *args: Any, exit: Exit | None, warm_start: bool) -> None:
        super().__init__(*args)
        self.exit, self.warm_start = exit, warm_start

    def read(self, indices: list[int]) -> Tensor:
        states_BTD = super().read(indices)
        if len(indices) == len(self.rows):
            self._state_BD = self.start_BSD[:, 0].clone()
            """Where the next positions start, if warm."""
        for index, states_TD in zip(indices, states_BTD, strict=True):
            read = len(self.ids[self.rows[index]]) - self._firsts[self.rows[index]] - 1
            self._state_BD[index] = states_TD[read - 1] if read else self.start_BSD[index, 0]
        return states_BTD

    def keep(self, indices: list[int]) -> None:
        super().keep(indices)
        self._state_BD = self._state_BD[indices]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        cache, model = self.ready(), self.model
        alive = [row in self.alive for row in self.rows]
        places = [
            len(self.ids[row]) - self._firsts[row] - 1 if live else cache.capacity
            for row, live in zip(self.rows, alive, strict=True)
        ]
        visible = cache.pass_over(torch.tensor(places)[:, None])
        tokens_B1 = torch.tensor([self.ids[row][-1:] for row in self.rows], device=cache.device)
        e_B1D = model.encode(tokens_B1, visible)
        cold_BD = self.start_BSD[list(range(len(places))), places]
        state_B1D = (self._state_BD if self.warm_start else cold_BD)[:, None].to(e_B1D.dtype)
        state_B1D, logits_BV, depths = self._settled(state_B1D, e_B1D, visible, alive)
        self._state_BD = state_B1D[:, 0]
        out, logits_BV = [], logits_BV.cpu()
        for index, row in enumerate(self.rows):
            if alive[index]:
                cache.hold(index, places[index], depths[index])
                ids = self.ids[row]
                out.append((row, [self.sampling.draw(logits_BV[index], ids, self.uniform(row, "token", len(ids)))]))
                self.stats.read += 1
                self.stats.iterations += depths[index]
        self.stats.steps += 1
        return out

    def _settled(
        self, state_B1D: Tensor, e_B1D: Tensor, visible: Visible, alive: list[bool]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Each row's state when it left, the logits that it is read out to, and after how many iterations."""

        def read(state_B1D: Tensor) -> Tensor:
            return self.logits(state_B1D, visible)[:, 0]

        if self.exit is None:
            state_B1D = self.model.iterate(state_B1D, e_B1D, self.k, visible=visible)
            return state_B1D, read(state_B1D), [self.k] * len(alive)
        left_B = ~torch.tensor(alive, device=state_B1D.device)
        depths_B, logits_BV = torch.zeros_like(left_B, dtype=torch.long), None
        for iteration in range(1, self.k + 1):
            old_B1D, old_BV = state_B1D, logits_BV
            new_B1D = self.model.iterate(state_B1D, e_B1D, visible=visible)
            state_B1D = torch.where(left_B[:, None, None], state_B1D, new_B1D)
            depths_B = depths_B.masked_fill(~left_B, iteration)
            if self.exit.reads:
                logits_BV = read(state_B1D)
            if iteration > 1:
                old, new = (old_B1D[:, 0], state_B1D[:, 0]) if not self.exit.reads else (old_BV, logits_BV)
                assert old is not None and new is not None
                left_B = left_B | self.exit.settled(old, new)
            if left_B.all():
                break
        # What the coda holds of a position is of its last read-out.
        return state_B1D, read(state_B1D) if logits_BV is None else logits_BV, depths_B.tolist()
