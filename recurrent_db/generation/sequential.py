"""Sequential decoding: one token after another, K iterations each, for every model and cache policy.

Inference uses the same `Recurrence.hidden` as scoring, so tokens are sampled from the distribution that is scored with one
noise draw.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recurrent_db.accounting.flops import cached_cost
from recurrent_db.generation.cache import Cache
from recurrent_db.generation.decoder import Decoder, DecodingStats
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource

_LOGITS_AT_ONCE = 1 << 26
"""Largest number of logits in one pass over a prompt: 256 MiB in fp32. A walk reads out at every position."""


class _CachedPass(NamedTuple):
    """The shape of a pass over positions ``first`` to ``stop`` - 1 of a cache, for the FLOP count."""

    rows: int
    first: int
    stop: int
    read_out: bool
    """Whether the logits of the last position were computed."""


class SequentialDecoder(Decoder):
    """Sequential decoder with a `Cache`. Sequences are padded on the left to one length. Arguments as for `Decoder`.

    With a cache policy other than ``full``, a text may depend on its batch, because the batch changes how its context is
    divided into passes.
    """

    def __init__(
        self,
        model: LoopedLM,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        requests: Sequence[int] | None = None,
        stats: DecodingStats | None = None,
    ) -> None:
        super().__init__(model, prompts, options, requests, stats)
        self.cache: Cache | None = None
        self._recurrence = model.recurrence.ready(model)
        self._noise: dict[tuple[object, ...], tuple[int, Tensor]] = {}
        self._passes: list[_CachedPass] = []

    def step(self) -> list[tuple[int, list[int]]]:
        logits_BV = self.logits().cpu()
        drawn = [
            (sequence, [self.draw(sequence, logits_V, self.batch.ids[sequence])])
            for sequence, logits_V in zip(self.batch.active, logits_BV, strict=True)
        ]
        self.stats.steps += 1
        self.stats.positions += len(drawn)
        self.stats.iterations += self.k * len(drawn)
        return drawn

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits of the next token of each active sequence, in order, (B, V). Call again after appending these tokens."""
        batch, outgrown = self.batch, self.batch.slide()
        if self.cache is None or outgrown:
            self.cache, tokens = self._new_cache()
        else:
            # A full cache has a row without padding, whose sequence has ended (or outgrown the window: handled above).
            full = self.cache.length == self.cache.capacity and len(batch.active) < len(batch.rows)
            if full or batch.half_ended:
                self.cache, self._noise = self.cache.take(batch.drop_ended()), {}
            tokens = [batch.ids[sequence][-1:] for sequence in batch.rows]
        logits_BV = self._run(self.cache, torch.tensor(tokens, device=self.model.embedding.weight.device))
        if batch.rows == batch.active:
            return logits_BV
        return logits_BV[[batch.rows.index(sequence) for sequence in batch.active]]

    def _new_cache(self) -> tuple[Cache, list[list[int]]]:
        """An empty cache for the active sequences, and their contexts, padded."""
        self.batch.drop_ended()
        self._noise = {}
        contexts = [self.batch.context(sequence) for sequence in self.batch.rows]
        longest = max(map(len, contexts))
        padding = [longest - len(context) for context in contexts]
        capacity = min(self.batch.window, longest + self.options.max_new_tokens)
        cache = Cache(self.model, len(contexts), capacity, padding, self.options.cache_policy)
        return cache, [[0] * pad + context for pad, context in zip(padding, contexts, strict=True)]

    def _run(self, cache: Cache, tokens_BT: Tensor) -> Tensor:
        """Run the tokens that follow those in the cache. Returns the logits after the last token, (B, V)."""
        requests = torch.tensor([self.requests[sequence] for sequence in self.batch.rows])
        most = max(1, _LOGITS_AT_ONCE // (len(tokens_BT) * self.model.config.vocab_size))
        for part_BT in tokens_BT.split(most, dim=1):
            noise = NoiseSource(self.rng, requests, self.batch.window, offset=self._offsets(cache), kept=self._noise)
            first, visible = cache.length, cache.grow(part_BT.shape[1])
            e_BTD = self.model.encode(part_BT, visible)
            [(_, hidden_BTD)] = self._recurrence.hidden(self.model, part_BT, e_BTD, [self.k], noise, visible=visible)
            self._passes.append(_CachedPass(len(tokens_BT), first, cache.length, read_out=False))
        self._passes[-1] = self._passes[-1]._replace(read_out=True)
        return self.model.logits(hidden_BTD[:, -1])

    def _offsets(self, cache: Cache) -> int | tuple[int, ...]:
        """Position of the next token in the whole text: one number if it is the same for all rows."""
        in_context = cache.offset
        each = [in_context] * len(self.batch.rows) if isinstance(in_context, int) else in_context
        starts = [self.batch.starts[sequence] for sequence in self.batch.rows]
        offsets = tuple(start + offset for start, offset in zip(starts, each, strict=True))
        return offsets if len(set(offsets)) > 1 else offsets[0]

    @property
    def flops(self) -> float:
        config, passes = self.model.config, self.model.recurrence.passes(self.k)
        return sum(p.rows * cached_cost(config, passes, p.first, p.stop, p.read_out) for p in self._passes)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.bytes
