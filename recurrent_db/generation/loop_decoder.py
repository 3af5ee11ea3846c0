"""Rows of tokens under a plain loop that grow as each will: what samplers are made of, and what they count.

A sampler is a subclass of `LoopRows` with a `step`; `samplers` names them, and `generate.stream` asks them for tokens.
Whatever the sampler, a row's context starts where `generate` says, and its noise and its draws are a function of (seed,
request, position), so that a text does not depend on its batch but for rounding.

Shapes: B rows, T positions, S slots of a row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recurrent_db.accounting.flops import visited_cost
from recurrent_db.errors import UserError
from recurrent_db.generation.sampling import Sampling
from recurrent_db.generation.slot_cache import RaggedCache
from recurrent_db.model.attention import Visible
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.recurrence.loop import PlainLoop
from recurrent_db.rng import Rng


@dataclass
class Stats:
    """What a sampler did; filled while it runs. Of tokens that were drawn and not wanted (after a text's end) all counts
    but ``tokens`` have their share."""

    tokens: int = 0
    """New tokens, those that ended a text among them."""
    steps: int = 0
    """Turns: a token of each row; a block of each; a step along the diagonal."""
    drafted: int = 0
    """Tokens that were guessed before they were certain and that a verification has decided on; along an unverified
    diagonal, each change of one that was built on as well."""
    accepted: int = 0
    """Of these, how many held."""
    read: int = 0
    """Positions that a token was read from."""
    iterations: int = 0
    """The sum of the iterations that they had then."""

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that held; nan without any."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def mean_k(self) -> float:
        """Mean number of iterations behind a token; nan without any."""
        return self.iterations / self.read if self.read else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all rows for each turn; nan without any."""
        return self.tokens / self.steps if self.steps else float("nan")


class Sampler(Protocol):
    """What continues texts: asked for tokens, step by step."""

    @property
    def ids(self) -> list[list[int]]:
        """Prompts and new tokens; whoever asks for these appends them before the next step."""
        ...

    @property
    def alive(self) -> list[int]:
        """Rows that are not at their end; whoever asks for tokens takes them out."""
        ...

    def step(self) -> list[tuple[int, list[int]]]:
        """The next tokens of rows that are alive: (row, tokens), those of a row in one pair, rows without any left out."""
        ...


def plain_loop(model: LoopedLM) -> PlainLoop:
    """What a model that samplers besides the plain sequential one serve does at inference. Raises `UserError` for others."""
    if not isinstance(model.recurrence, PlainLoop):
        raise UserError(
            "the speculative and the diagonal sampler, exits and warm starts are for models whose inference is a plain loop"
            " (next_token, unrolled): the noise levels of a denoiser's walk depend on how many there are"
        )
    return model.recurrence


class LoopRows:
    """Rows of tokens under a plain loop, each at its own length; a `Sampler` but for its `step`.

    Args:
        prompts: token ids, one or more a row.
        k: core iterations.
        max_new_tokens: the most tokens that will be added to a row.
        sampling: how tokens are drawn.
        rng, requests: key the noise and the draws.
        stats: is filled.
    """

    def __init__(
        self,
        model: LoopedLM,
        prompts: Sequence[Sequence[int]],
        k: int,
        max_new_tokens: int,
        sampling: Sampling,
        rng: Rng,
        requests: Sequence[int],
        stats: Stats,
    ) -> None:
        if not all(prompts):
            raise UserError("a prompt needs at least one token")
        self.model, self.k, self.sampling, self.rng, self.stats = model, k, sampling, rng, stats
        self.requests, self.window = list(requests), model.config.max_seq_len
        self._recurrence = plain_loop(model)
        self.ids = [list(prompt) for prompt in prompts]
        self.alive = list(range(len(prompts)))
        self.rows: list[int] = []
        """Which row each of the cache's is."""
        self._ends = [len(prompt) + max_new_tokens for prompt in prompts]
        self._firsts = [max(0, len(prompt) - self.window) for prompt in prompts]
        """Where each row's context starts."""
        self.cache: RaggedCache | None = None
        self._inner = k
        """As of `RaggedCache`."""
        self._reads = 0
        """Positions whose logits were made."""

    def step(self) -> list[tuple[int, list[int]]]:
        """As of `Sampler`."""
        raise NotImplementedError

    def ready(self) -> RaggedCache:
        """The cache for rows that are alive; those that have grown out of their window are read anew, and where half have
        ended the others go on without them."""
        grown = [row for row in self.alive if len(self.ids[row]) - self._firsts[row] > self.window]
        for row in grown:
            self._firsts[row] += max(1, self.window // 2)
        if self.cache is None:
            self.rows = list(self.alive)
            most = max(self.room(row) for row in self.rows)
            self.cache = RaggedCache(self.model, len(self.rows), most, self.k, self._inner)
            weight = self.model.embedding.weight
            self.start_BSD = weight.new_zeros(len(self.rows), most + 1, weight.shape[1])
            """Initial states of all slots."""
            self.read(list(range(len(self.rows))))
        elif 2 * len(self.alive) <= len(self.rows):
            self.keep([index for index, row in enumerate(self.rows) if row in self.alive])
        if anew := [index for index, row in enumerate(self.rows) if row in grown]:
            self.read(anew)
        return self.cache

    def read(self, indices: list[int]) -> Tensor:
        """Read the contexts of these rows of the cache, all but their last tokens. Returns states after K iterations, (B, T,
        D); a shorter context's are its first ones."""
        cache = self.cache
        assert cache is not None
        rows = [self.rows[index] for index in indices]
        contexts = [self.ids[row][self._firsts[row] :] for row in rows]
        offsets = tuple(self._firsts[row] for row in rows)
        requests = torch.tensor([self.requests[row] for row in rows])
        noise = NoiseSource(self.rng, requests, self.window, offset=offsets if any(offsets) else 0)
        start_BSD = self._recurrence.start(self.start_BSD[indices, : cache.capacity], noise)
        self.start_BSD[indices, : cache.capacity] = start_BSD
        longest = max(map(len, contexts)) - 1
        if not longest:
            return start_BSD[:, :0]
        tokens = [context[:-1] + [0] * (longest + 1 - len(context)) for context in contexts]
        visible, tokens_BT = cache.first(longest, indices), torch.tensor(tokens, device=start_BSD.device)
        e_BTD = self.model.encode(tokens_BT, visible)
        state_BTD = self.model.iterate(start_BSD[:, :longest].to(e_BTD.dtype), e_BTD, self.k, visible=visible)
        self.model.decode(state_BTD, visible=visible)
        return state_BTD

    def logits(self, state_BTD: Tensor, visible: Visible) -> Tensor:
        """What states are read out to, (B, T, V)."""
        self._reads += state_BTD.shape[0] * state_BTD.shape[1]
        return self.model.logits(self.model.decode(state_BTD, visible=visible))

    @property
    def flops(self) -> float:
        """FLOPs of all that was computed so far, drafts that did not hold and rows at their end among them."""
        return 0.0 if self.cache is None else visited_cost(self.model.config, self.cache.visits, self._reads)

    def keep(self, indices: list[int]) -> None:
        """Drop the cache's other rows."""
        assert self.cache is not None
        self.rows = [self.rows[index] for index in indices]
        self.cache.take(indices)
        self.start_BSD = self.start_BSD[indices]

    def room(self, row: int) -> int:
        """How many positions a row's context can have: its window, or what its last token is read from."""
        return min(self.window, self._ends[row] - 1 - self._firsts[row])

    def uniform(self, row: int, stream: str, place: int) -> float:
        """The draw for the token at ``place`` of a row's text."""
        return self.rng.uniform([self.requests[row]], (1,), f"{stream}/{place}").item()
