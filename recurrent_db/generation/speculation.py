"""Decoders that draft tokens at few iterations and then verify them at K iterations.

Both use the same fact: iteration n of a position depends only on iterations up to n of this and earlier positions. So the
iterations of a draft are not lost: they are the first iterations of its verification.

- `SpeculativeDecoder` drafts a block of tokens, one by one, at ``draft_k`` iterations. It then runs the other K - draft_k
  iterations of the whole block in one pass, which multiplies matrices instead of one vector per token. It accepts tokens up
  to the first that K iterations do not confirm, and replaces that one. Greedy text equals that of sequential decoding.
  Sampling uses rejection (arXiv 2211.17192, 2302.01318) and has the same distribution.
- `DiagonalDecoder` (after arXiv 2510.14961) starts a new position each step, before earlier positions have finished. A step
  runs the next ``inner`` iterations of each position in flight, reads all of them out, and starts a position for the token
  of the newest read-out. If a later read-out of a position gives another token than before, all later positions start again.
  A token is final when its position has had K iterations over final tokens. So every token equals that of sequential
  decoding with the same seed, at any temperature. Unverified, as in the paper, positions do not start again when tokens
  change. That takes one step per token and gives another text.

Shapes: B rows (sequences in the cache), T positions of a block, W stages along the diagonal, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurrent_db.generation.loop_decoder import LoopDecoder
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sampling import pick, probabilities


def most_likely(logits_NV: Tensor, options: GenerationOptions) -> list[Any]:
    """The most likely tokens of logits (..., V), as nested lists. An empty list if decoding is not plain greedy."""
    return logits_NV.argmax(-1).tolist() if options.argmax else []


class SpeculativeDecoder(LoopDecoder):
    """Drafts ``block`` - 1 tokens at ``draft_k`` iterations and verifies them at K. Other arguments as for `LoopDecoder`.

    A step returns one to ``block`` tokens for each row.
    """

    def __init__(self, *args: Any, draft_k: int, block: int) -> None:
        super().__init__(*args)
        self.draft_k, self.block = min(draft_k, self.k), block

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        cache, batch = self.prepare_cache(), self.batch
        firsts = self.next_positions()
        # Each row's block ends where its own window or text ends, independently of other rows.
        sizes = [
            min(self.block, batch.context_limit(sequence) - first) * (sequence in batch.active)
            for sequence, first in zip(batch.rows, firsts, strict=True)
        ]
        positions_BT = torch.full((len(batch.rows), max(sizes)), cache.dummy)
        for row, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
            positions_BT[row, :size] = torch.arange(first, first + size)
        drafts, draft_probabilities, state_BTD, e_BTD = self._draft(positions_BT)
        visible = cache.pass_over(positions_BT, start=self.draft_k)
        state_BTD = self.model.iterate(state_BTD, e_BTD, self.k - self.draft_k, visible=visible)
        logits_BTV = self.logits(state_BTD, visible).cpu()
        drawn = []
        for row, sequence in enumerate(batch.rows):
            if sequence in batch.active:
                draft = drafts[row][: sizes[row] - 1]
                tokens = self._verified(sequence, draft, draft_probabilities[row], logits_BTV[row])
                drawn.append((sequence, tokens))
                self.stats.drafted += min(len(tokens), sizes[row] - 1)
                self.stats.accepted += len(tokens) - 1
                self.stats.positions += len(tokens)
                self.stats.iterations += self.k * len(tokens)
        self.stats.steps += 1
        return drawn

    def _draft(self, positions_BT: Tensor) -> tuple[list[list[int]], list[list[Tensor]], Tensor, Tensor]:
        """Draft a block at the given positions, int64 (B, T).

        Returns:
            The drafted tokens of each row; the distributions they were drawn from (empty if greedy); the block's states
            after ``draft_k`` iterations, (B, T, D); its context e, (B, T, D).
        """
        cache, model, batch = self.cache, self.model, self.batch
        assert cache is not None
        tokens = [batch.ids[sequence][-1:] for sequence in batch.rows]
        draft_probabilities: list[list[Tensor]] = [[] for _ in batch.rows]
        states, contexts = [], []
        for index, positions_B1 in enumerate(positions_BT.split(1, dim=1)):
            visible = cache.pass_over(positions_B1)
            e_B1D = model.encode(torch.tensor([ids[-1:] for ids in tokens], device=cache.device), visible)
            start_B1D = self.start_BSD[torch.arange(len(tokens))[:, None], positions_B1].to(e_B1D.dtype)
            states.append(model.iterate(start_B1D, e_B1D, self.draft_k, visible=visible))
            contexts.append(e_B1D)
            if index + 1 == positions_BT.shape[1]:
                break
            logits_BV = self.logits(states[-1], visible)[:, 0].cpu()
            best = most_likely(logits_BV, self.options)
            for row, sequence in enumerate(batch.rows):
                if best:
                    tokens[row].append(best[row])
                    continue
                ids = batch.ids[sequence] + tokens[row][1:]
                q_V = probabilities(logits_BV[row], self.options, ids)
                tokens[row].append(pick(q_V, self.uniform(sequence, "draft", len(ids))))
                draft_probabilities[row].append(q_V)
        return [ids[1:] for ids in tokens], draft_probabilities, torch.cat(states, dim=1), torch.cat(contexts, dim=1)

    def _verified(
        self, sequence: int, draft: list[int], draft_probabilities: list[Tensor], logits_TV: Tensor
    ) -> list[int]:
        """The accepted draft tokens, followed by one new token: the replacement of the first rejected token, or the token
        after the draft.

        A token x drafted from q is accepted with probability min(1, p(x) / q(x)). Otherwise its replacement is drawn from
        the positive part of p - q (arXiv 2211.17192).
        """
        accepted: list[int] = []
        best = most_likely(logits_TV, self.options)
        for index, token in enumerate(draft):
            if best:
                accepted.append(best[index])
                if best[index] != token:
                    return accepted
                continue
            ids = self.batch.ids[sequence] + accepted
            p_V, q_V = probabilities(logits_TV[index], self.options, ids), draft_probabilities[index]
            holds = self.uniform(sequence, "accept", len(ids)) * q_V[token] < p_V[token]
            rest_V = (p_V - q_V).clamp(min=0)
            if holds or not rest_V.any():  # without a rest p equals q up to rounding
                accepted.append(token)
                continue
            return [*accepted, pick(rest_V, self.uniform(sequence, "rest", len(ids)))]
        if best:
            return [*accepted, best[len(draft)]]
        return [*accepted, self.draw(sequence, logits_TV[len(draft)], self.batch.ids[sequence] + accepted)]


class DiagonalDecoder(LoopDecoder):
    """Starts one position per step and runs ``inner`` iterations of all W = ceil(K / inner) positions in flight.

    If ``verified``, the text equals that of sequential decoding. Other arguments as for `LoopDecoder`. A step returns at
    most one token for each row.
    """

    def __init__(self, *args: Any, inner: int, verified: bool = True) -> None:
        super().__init__(*args)
        self._inner, self.verified, self.stages = inner, verified, -(-self.k // inner)
        self._tokens: list[list[int]] = [[] for _ in self.batch.ids]
        """Each row's context, followed by guessed tokens. The last guess has not started."""
        self._started = [0] * len(self.batch.ids)
        """Number of these tokens that have started."""
        self._positions: list[list[int]] = [[] for _ in self.batch.ids]
        """Each row's position in flight at each stage; the dummy position if a stage is empty."""

    def prefill(self, rows: list[int]) -> Tensor:
        assert self.cache is not None
        batch = self.batch
        if len(rows) == len(batch.rows):
            self._state_WBD = self.start_BSD.new_zeros(self.stages, len(batch.rows), self.start_BSD.shape[2])
        for row in rows:
            self._tokens[row] = batch.context(batch.rows[row])
            self._started[row] = len(self._tokens[row]) - 1
            self._positions[row] = [self.cache.dummy] * self.stages
        return super().prefill(rows)

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self._tokens = [self._tokens[row] for row in rows]
        self._started = [self._started[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._state_WBD = self._state_WBD[:, rows]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        self.prepare_cache()
        self._start()
        logits_BWV = self._refine()
        self.stats.steps += 1
        best = most_likely(logits_BWV, self.options)
        drawn = []
        for row, sequence in enumerate(self.batch.rows):
            if sequence in self.batch.active:
                final = self._revise(row, logits_BWV[row], best[row] if best else None)
                drawn += [] if final is None else [(sequence, [final])]
        return drawn

    def _start(self) -> None:
        """Move all positions to their next stage, and start each row's newest guess at the first stage."""
        assert self.cache is not None
        dummy, new = self.cache.dummy, []
        for row, sequence in enumerate(self.batch.rows):
            position, active = self._started[row], sequence in self.batch.active
            if not active:
                self._positions[row] = [dummy] * self.stages
            starts = active and position < min(len(self._tokens[row]), self.batch.context_limit(sequence))
            new.append(position if starts else dummy)
            self._started[row] += starts
            self._positions[row] = [new[-1], *self._positions[row][:-1]]
        start_1BD = self.start_BSD[list(range(len(new))), new][None].to(self._state_WBD.dtype)
        self._state_WBD = torch.cat((start_1BD, self._state_WBD[:-1]))

    def _refine(self) -> Tensor:
        """Run the next ``inner`` iterations of all positions in flight. Returns their logits, (B, W, V)."""
        cache, model, width, rows = self.cache, self.model, self.stages, len(self.batch.rows)
        assert cache is not None
        ids = [
            [0 if position == cache.dummy else tokens[position] for position in positions]
            for tokens, positions in zip(self._tokens, self._positions, strict=True)
        ]
        positions_BW = torch.tensor(self._positions)
        once = cache.pass_over(positions_BW)  # prelude and coda have no stages
        e_BWD = model.encode(torch.tensor(ids, device=cache.device), once)
        e_ND, state_ND = e_BWD.transpose(0, 1).flatten(0, 1), self._state_WBD.flatten(0, 1).to(e_BWD.dtype)
        positions_N1 = positions_BW.T.flatten()[:, None]
        last = self.k - (width - 1) * cache.inner  # iterations of the last stage, which may be fewer
        for first, count, planes in ((0, last, width), (last, cache.inner - last, width - 1)):
            n = planes * rows
            if count and n:
                visible = cache.pass_over(positions_N1[:n], start=first, planes=planes)
                new_N1D = model.iterate(state_ND[:n, None], e_ND[:n, None], count, visible=visible)
                state_ND = torch.cat((new_N1D[:, 0], state_ND[n:]))
        self._state_WBD = state_ND.unflatten(0, (width, -1))
        return self.logits(self._state_WBD.transpose(0, 1), once).cpu()

    def _revise(self, row: int, logits_WV: Tensor, best: list[int] | None) -> int | None:
        """Replace a row's guesses that differ from its read-outs, starting with the oldest position. Returns the token that
        became final, or None."""
        assert self.cache is not None
        sequence, tokens, positions, final = self.batch.rows[row], self._tokens[row], self._positions[row], None
        forgotten = self.batch.ids[sequence][: self.batch.starts[sequence]]
        for stage in reversed(range(self.stages)):
            position, is_final = positions[stage], stage == self.stages - 1
            if position == self.cache.dummy:
                continue
            if best is not None:
                token = best[stage]
            else:
                token = self.draw(sequence, logits_WV[stage], forgotten + tokens[: position + 1])
            if is_final:
                final = token
                self.stats.positions += 1
                self.stats.iterations += self.k
            guess = tokens[position + 1] if position + 1 < len(tokens) else None
            if guess is not None and self._started[row] > position + 1 and (is_final or guess != token):
                self.stats.drafted += 1
                self.stats.accepted += guess == token
            if guess is None:
                tokens.append(token)
            elif guess != token and self.verified:
                del tokens[position + 1 :]
                tokens.append(token)
                self._started[row] = min(self._started[row], position + 1)
                positions[:stage] = [self.cache.dummy] * stage
                break
            elif guess != token:
                tokens[position + 1] = token
        return final
