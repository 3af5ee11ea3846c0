"""Samplers that draft tokens at few iterations and give what K iterations give: `Speculative` and `Diagonal`.

Both rest on one fact: iteration n of a position depends on iterations up to n of it and of the positions before it, and on
nothing later. What was drafted is thus not thrown away but gone on with: a draft's iterations are the verification's first.

- `Speculative` drafts a block token by token at ``draft_k`` iterations, then runs the other K - draft_k of the whole block
  in one pass, a product of matrices where decoding has a product with a vector for each token. It keeps tokens up to the
  first that the K iterations do not confirm, and there takes theirs: under greedy decoding the very tokens of sequential
  decoding; else by rejection sampling (arXiv 2211.17192, 2302.01318), which has the same distribution.
- `Diagonal` (after arXiv 2510.14961) has a new position start each step, before the ones ahead of it are through: a step
  makes ``inner`` iterations of all positions in flight, each the next ones of its own, reads all of them out, and lets the
  newest read-out's token start. Where a later read-out of a position says another token than an earlier one did, what was
  built on that starts again. A token is final when its position has had K iterations, all of them over final tokens, so
  every draw is that of sequential decoding under the same seed, at any temperature. Unverified, as published, nothing
  starts again: states are kept when their tokens change. That takes one step a token whatever it says, and gives other
  text.

Shapes: B rows, T positions of a block, W stages along the diagonal, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurrent_db.generation.loop_decoder import LoopRows
from recurrent_db.generation.sampling import Sampling, pick


def picks(logits_NV: Tensor, sampling: Sampling) -> list[Any]:
    """The most likely tokens, in lists as logits (..., V) are, where these are what is asked for; else nothing."""
    return logits_NV.argmax(-1).tolist() if sampling.plainly_greedy else []


class Speculative(LoopRows):
    """Drafts ``block`` - 1 tokens at ``draft_k`` iterations and verifies them at K; other arguments as of `LoopRows`.

    A turn gives each row from one token to ``block`` of them.
    """

    def __init__(self, *args: Any, draft_k: int, block: int) -> None:
        super().__init__(*args)
        self.draft_k, self.block = min(draft_k, self.k), block

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        cache = self.ready()
        lengths = [len(self.ids[row]) - self._firsts[row] - 1 for row in self.rows]
        # A row's block ends with its window and with its text, whatever the others have.
        sizes = [
            min(self.block, self.room(row) - n) * (row in self.alive) for row, n in zip(self.rows, lengths, strict=True)
        ]
        length = max(sizes)
        places_BT = torch.full((len(self.rows), length), cache.capacity)
        for index, (n, size) in enumerate(zip(lengths, sizes, strict=True)):
            places_BT[index, :size] = torch.arange(n, n + size)
        drafts, wants, state_BTD, e_BTD = self._draft(places_BT)
        visible = cache.pass_over(places_BT, start=self.draft_k)
        state_BTD = self.model.iterate(state_BTD, e_BTD, self.k - self.draft_k, visible=visible)
        logits_BTV = self.logits(state_BTD, visible).cpu()
        out = []
        for index, row in enumerate(self.rows):
            if row in self.alive:
                taken = self._verified(row, drafts[index][: sizes[index] - 1], wants[index], logits_BTV[index])
                out.append((row, taken))
                self.stats.drafted += min(len(taken), sizes[index] - 1)
                self.stats.accepted += len(taken) - 1
                self.stats.read += len(taken)
                self.stats.iterations += self.k * len(taken)
        self.stats.steps += 1
        return out

    def _draft(self, places_BT: Tensor) -> tuple[list[list[int]], list[list[Tensor]], Tensor, Tensor]:
        """Each row's drafted tokens and the probabilities that they were drawn from (none where greedy); the block's states
        after the draft's iterations, and its contexts, (B, T, D)."""
        cache, model = self.cache, self.model
        assert cache is not None
        tokens = [[self.ids[row][-1]] for row in self.rows]
        wants: list[list[Tensor]] = [[] for _ in self.rows]
        states, contexts = [], []
        for place, places_B1 in enumerate(places_BT.split(1, dim=1)):
            visible = cache.pass_over(places_B1)
            e_B1D = model.encode(torch.tensor([row[-1:] for row in tokens], device=cache.device), visible)
            start_B1D = self.start_BSD[torch.arange(len(tokens))[:, None], places_B1].to(e_B1D.dtype)
            states.append(model.iterate(start_B1D, e_B1D, self.draft_k, visible=visible))
            contexts.append(e_B1D)
            if place + 1 == places_BT.shape[1]:
                break
            logits_BV = self.logits(states[-1], visible)[:, 0].cpu()
            best = picks(logits_BV, self.sampling)
            for index, row in enumerate(self.rows):
                if best:
                    tokens[index].append(best[index])
                    continue
                seen = self.ids[row] + tokens[index][1:]
                q_V = self.sampling.probabilities(logits_BV[index], seen)
                tokens[index].append(pick(q_V, self.uniform(row, "draft", len(seen))))
                wants[index].append(q_V)
        return [row[1:] for row in tokens], wants, torch.cat(states, dim=1), torch.cat(contexts, dim=1)

    def _verified(self, row: int, drafts: list[int], wants: list[Tensor], logits_TV: Tensor) -> list[int]:
        """The drafted tokens up to the first that is rejected, and another one: in its place, or after all of them.

        A token x drafted from q is kept with probability min(1, p(x) / q(x)), and else drawn from what p has over q.
        """
        taken: list[int] = []
        best = picks(logits_TV, self.sampling)
        for place, draft in enumerate(drafts):
            if best:
                taken.append(best[place])
                if best[place] != draft:
                    return taken
                continue
            seen = self.ids[row] + taken
            p_V, q_V = self.sampling.probabilities(logits_TV[place], seen), wants[place]
            kept = self.uniform(row, "accept", len(seen)) * q_V[draft] < p_V[draft]
            rest_V = (p_V - q_V).clamp(min=0)
            if kept or not rest_V.any():  # they are one distribution but for rounding
                taken.append(draft)
                continue
            return [*taken, pick(rest_V, self.uniform(row, "rest", len(seen)))]
        if best:
            return [*taken, best[len(drafts)]]
        seen = self.ids[row] + taken
        return [*taken, self.sampling.draw(logits_TV[len(drafts)], seen, self.uniform(row, "token", len(seen)))]


class Diagonal(LoopRows):
    """Starts a position each step and refines all that are in flight by ``inner`` iterations, W = ceil(K / inner) stages
    of them; other arguments as of `LoopRows`. ``verified``: what is final equals sequential decoding.

    A step gives each row one token or none.
    """

    def __init__(self, *args: Any, inner: int, verified: bool = True) -> None:
        super().__init__(*args)
        self._inner, self.verified, self.stages = inner, verified, -(-self.k // inner)
        self._tokens: list[list[int]] = [[] for _ in self.ids]
        """By position, of the cache's rows: a context and guesses that follow it, of which the last has not started."""
        self._started = [0] * len(self.ids)
        self._places: list[list[int]] = [[] for _ in self.ids]
        """Their positions by stage; nowhere, the cache's last slot, where a stage has none."""

    def read(self, indices: list[int]) -> Tensor:
        assert self.cache is not None
        if len(indices) == len(self.rows):
            self._state_WBD = self.start_BSD.new_zeros(self.stages, len(self.rows), self.start_BSD.shape[2])
        for index in indices:
            row = self.rows[index]
            self._tokens[index] = self.ids[row][self._firsts[row] :]
            self._started[index] = len(self._tokens[index]) - 1
            self._places[index] = [self.cache.capacity] * self.stages
        return super().read(indices)

    def keep(self, indices: list[int]) -> None:
        super().keep(indices)
        self._tokens = [self._tokens[index] for index in indices]
        self._started = [self._started[index] for index in indices]
        self._places = [self._places[index] for index in indices]
        self._state_WBD = self._state_WBD[:, indices]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        self.ready()
        self._start()
        logits_BWV = self._refine()
        self.stats.steps += 1
        best = picks(logits_BWV, self.sampling)
        out = []
        for index, row in enumerate(self.rows):
            if row in self.alive:
                final = self._read(index, logits_BWV[index], best[index] if best else None)
                out += [] if final is None else [(row, [final])]
        return out

    def _start(self) -> None:
        """All positions move on by one stage, and each row's newest guess takes the first."""
        assert self.cache is not None
        nowhere, new = self.cache.capacity, []
        for index, row in enumerate(self.rows):
            place = self._started[index]
            if row not in self.alive:
                self._places[index] = [nowhere] * self.stages
            starts = row in self.alive and place < min(len(self._tokens[index]), self.room(row))
            new.append(place if starts else nowhere)
            self._started[index] += starts
            self._places[index] = [new[-1], *self._places[index][:-1]]
        start_1BD = self.start_BSD[list(range(len(self.rows))), new][None].to(self._state_WBD.dtype)
        self._state_WBD = torch.cat((start_1BD, self._state_WBD[:-1]))

    def _refine(self) -> Tensor:
        """The next iterations of all that is in flight, and its read-outs, (B, W, V)."""
        cache, model, width = self.cache, self.model, self.stages
        assert cache is not None
        nowhere = cache.capacity
        ids = [
            [0 if place == nowhere else tokens[place] for place in places]
            for tokens, places in zip(self._tokens, self._places, strict=True)
        ]
        places_BW = torch.tensor(self._places)
        once = cache.pass_over(places_BW)  # prelude and coda have no stages
        e_BWD = model.encode(torch.tensor(ids, device=cache.device), once)
        e_ND, state_ND = e_BWD.transpose(0, 1).flatten(0, 1), self._state_WBD.flatten(0, 1).to(e_BWD.dtype)
        places_N1 = places_BW.T.flatten()[:, None]
        last = self.k - (width - 1) * cache.inner  # iterations of the last stage, which may be fewer
        for first, count, planes in ((0, last, width), (last, cache.inner - last, width - 1)):
            n = planes * len(self.rows)
            if count and n:
                visible = cache.pass_over(places_N1[:n], start=first, planes=planes)
                new_N1D = model.iterate(state_ND[:n, None], e_ND[:n, None], count, visible=visible)
                state_ND = torch.cat((new_N1D[:, 0], state_ND[n:]))
        self._state_WBD = state_ND.unflatten(0, (width, -1))
        return self.logits(self._state_WBD.transpose(0, 1), once).cpu()

    def _read(self, index: int, logits_WV: Tensor, best: list[int] | None) -> int | None:
        """Take a row's read-outs, the oldest position's first: guesses that they say otherwise are replaced. Returns the
        token that is final now, if any."""
        assert self.cache is not None
        row, tokens, places, final = self.rows[index], self._tokens[index], self._places[index], None
        before = self.ids[row][: self._firsts[row]]
        for stage in reversed(range(self.stages)):
            place = places[stage]
            if place == self.cache.capacity:
                continue
            if best is not None:
                token = best[stage]
            else:
                seen = before + tokens[: place + 1]
                token = self.sampling.draw(logits_WV[stage], seen, self.uniform(row, "token", len(seen)))
            guess = tokens[place + 1] if place + 1 < len(tokens) else None
            if stage == self.stages - 1:
                final = token
                self.stats.read += 1
                self.stats.iterations += self.k
            if guess is not None and self._started[index] > place + 1:
                wrong = guess != token
                if wrong or stage == self.stages - 1:
                    self.stats.drafted += 1
                    self.stats.accepted += not wrong
            if guess is None:
                tokens.append(token)
            elif guess != token and self.verified:
                del tokens[place + 1 :]
                tokens.append(token)
                self._started[index] = min(self._started[index], place + 1)
                places[:stage] = [self.cache.capacity] * stage
                break
            elif guess != token:
                tokens[place + 1] = token
        return final
