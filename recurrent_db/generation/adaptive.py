"""Adaptive depth: sequential decoding in which each token takes as many iterations as it needs.

After each iteration an exit criterion compares a position with the same position one iteration earlier. If they differ by
less than the threshold, the position stops (Huginn's zero-shot adaptive compute, arXiv 2502.05171, section 6.1):

- ``kl``: the divergence KL(p_n || p_(n-1)) of the read-outs, in nats.
- ``entropy``: the absolute difference of the read-outs' entropies, in nats.
- ``latent``: the norm of the difference of states, divided by the norm of the new state. It needs no read-out; the other
  criteria run coda and head after each iteration.

If a position stops after n iterations, later positions see its iterations 1 to n, then copies of iteration n up to K. The
coda sees the states at which positions stopped.

With a warm start, a position's initial state is the last state of the position before it, instead of zeros or noise.

Exits and warm starts apply to the last position of a prompt and to new positions. Earlier positions of the prompt run
together, from the usual initial state, for all K iterations.

Sequences stop independently, so a sequence takes the same iterations in any batch. A step ends when its slowest sequence
stops.

Shapes: B sequences, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurrent_db.generation.loop_decoder import LoopDecoder
from recurrent_db.generation.options import Exit
from recurrent_db.model.attention import Visible
from recurrent_db.model.norms import wide


def settled(exit: Exit, old: Tensor, new: Tensor) -> Tensor:
    """Whether each sequence may stop, bool (B,), from two successive logits (B, V), or states (B, D) for ``latent``."""
    old, new = old.to(wide(old.dtype)), new.to(wide(new.dtype))
    if exit.criterion == "latent":
        return (new - old).norm(dim=-1) < exit.threshold * new.norm(dim=-1)
    log_p, log_q = new.log_softmax(-1), old.log_softmax(-1)
    if exit.criterion == "kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1) < exit.threshold
    entropies = [-(logs.exp() * logs).sum(-1) for logs in (log_p, log_q)]
    return (entropies[0] - entropies[1]).abs() < exit.threshold


class AdaptiveDecoder(LoopDecoder):
    """Sequential decoding with an exit, a warm start or both. Arguments as for `LoopDecoder`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.exit = None if self.options.exit is None else Exit.parse(self.options.exit)

    def prefill(self, rows: list[int]) -> Tensor:
        states_BTD, positions = super().prefill(rows), self.next_positions()
        if len(rows) == len(positions):
            self._state_BD = self.start_BSD[:, 0].clone()
            """Last state of each sequence, from which a warm start begins."""
        for row, states_TD in zip(rows, states_BTD, strict=True):
            self._state_BD[row] = states_TD[positions[row] - 1] if positions[row] else self.start_BSD[row, 0]
        return states_BTD

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self._state_BD = self._state_BD[rows]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        cache, model, batch = self.prepare_cache(), self.model, self.batch
        active = [sequence in batch.active for sequence in batch.rows]
        positions = [
            position if live else cache.dummy for position, live in zip(self.next_positions(), active, strict=True)
        ]
        visible = cache.pass_over(torch.tensor(positions)[:, None])
        tokens_B1 = torch.tensor([batch.ids[sequence][-1:] for sequence in batch.rows], device=cache.device)
        e_B1D = model.encode(tokens_B1, visible)
        cold_BD = self.start_BSD[list(range(len(positions))), positions]
        state_B1D = (self._state_BD if self.options.warm_start else cold_BD)[:, None].to(e_B1D.dtype)
        state_B1D, logits_BV, depths = self._iterate(state_B1D, e_B1D, visible, active)
        self._state_BD = state_B1D[:, 0]
        drawn, logits_BV = [], logits_BV.cpu()
        for row, sequence in enumerate(batch.rows):
            if active[row]:
                cache.fill_later_iterations(row, positions[row], depths[row])
                drawn.append((sequence, [self.draw(sequence, logits_BV[row], batch.ids[sequence])]))
                self.stats.positions += 1
                self.stats.iterations += depths[row]
        self.stats.steps += 1
        return drawn

    def _iterate(
        self, state_B1D: Tensor, e_B1D: Tensor, visible: Visible, active: list[bool]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Iterate until all sequences have stopped. Returns each sequence's state, logits and number of iterations."""

        def read_out(state_B1D: Tensor) -> Tensor:
            return self.logits(state_B1D, visible)[:, 0]

        if self.exit is None:
            state_B1D = self.model.iterate(state_B1D, e_B1D, self.k, visible=visible)
            return state_B1D, read_out(state_B1D), [self.k] * len(active)
        compares_states = self.exit.criterion == "latent"
        stopped_B = ~torch.tensor(active, device=state_B1D.device)
        depths_B, logits_BV = torch.zeros_like(stopped_B, dtype=torch.long), None
        for iteration in range(1, self.k + 1):
            old_B1D, old_BV = state_B1D, logits_BV
            new_B1D = self.model.iterate(state_B1D, e_B1D, visible=visible)
            state_B1D = torch.where(stopped_B[:, None, None], state_B1D, new_B1D)
            depths_B = depths_B.masked_fill(~stopped_B, iteration)
            if not compares_states:
                logits_BV = read_out(state_B1D)
            if iteration > 1:
                old, new = (old_B1D[:, 0], state_B1D[:, 0]) if compares_states else (old_BV, logits_BV)
                assert old is not None and new is not None
                stopped_B = stopped_B | settled(self.exit, old, new)
            if stopped_B.all():
                break
        # Reading out here also fills the coda's cache slots; with kl and entropy the last read-out has filled them.
        return state_B1D, read_out(state_B1D) if logits_BV is None else logits_BV, depths_B.tolist()
