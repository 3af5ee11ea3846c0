"""Base class of the decoders for models whose inference is a plain loop. A subclass adds `step`.

A row is the place of one sequence in the cache. Each row has its own length. All subclasses use the same contexts and random
numbers for a sequence.

Shapes: B rows, T positions, S slots of a row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_db.accounting.flops import visited_cost
from recurrent_db.errors import UserError
from recurrent_db.generation.decoder import Decoder, DecodingStats
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.slot_cache import SlotCache
from recurrent_db.model.attention import Visible
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.recurrence.loop import PlainLoop


def plain_loop(model: LoopedLM) -> PlainLoop:
    """The model's recurrence, which must be a plain loop. Raises `UserError` if it is not."""
    loop: PlainLoop | None = model.recurrence.loop
    if loop is None:
        raise UserError(
            "the speculative and diagonal samplers, exits and warm starts need a model whose inference is a plain loop; the"
            " noise levels of a denoiser depend on K"
        )
    return loop


class LoopDecoder(Decoder):
    """Decoder with a `SlotCache`. Arguments as for `Decoder`.

    Raises:
        UserError: the model's inference is not a plain loop, or a prompt is empty.
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
        self._recurrence = plain_loop(model)
        self.cache: SlotCache | None = None
        self._inner = self.k
        """Argument ``inner`` of `SlotCache`."""
        self._readouts = 0
        """Number of positions whose logits were computed."""

    def prepare_cache(self) -> SlotCache:
        """Prepare the cache for the next step.

        Contexts that have outgrown the window are shortened and run again. When half of the rows have ended, they are
        removed.
        """
        batch, outgrown = self.batch, self.batch.slide()
        if self.cache is None:
            batch.drop_ended()
            longest = max(map(batch.context_limit, batch.rows))
            self.cache = SlotCache(self.model, len(batch.rows), longest, self.k, self._inner)
            weight = self.model.embedding.weight
            self.start_BSD = weight.new_zeros(len(batch.rows), longest + 1, weight.shape[1])
            """Initial state of each position."""
            self.prefill(list(range(len(batch.rows))))
        elif batch.half_ended:
            self.keep(batch.drop_ended())
        if stale := [row for row, sequence in enumerate(batch.rows) if sequence in outgrown]:
            self.prefill(stale)
        return self.cache

    def prefill(self, rows: list[int]) -> Tensor:
        """Run the contexts of these rows, without their last tokens.

        Returns:
            States after K iterations, (B, T, D), aligned at the first position. Shorter contexts have meaningless states at
            the end.
        """
        cache = self.cache
        assert cache is not None
        sequences = [self.batch.rows[row] for row in rows]
        contexts = [self.batch.context(sequence) for sequence in sequences]
        offsets = tuple(self.batch.starts[sequence] for sequence in sequences)
        requests = torch.tensor([self.requests[sequence] for sequence in sequences])
        noise = NoiseSource(self.rng, requests, self.batch.window, offset=offsets if any(offsets) else 0)
        start_BSD = self._recurrence.start(self.start_BSD[rows, : cache.capacity], noise)
        self.start_BSD[rows, : cache.capacity] = start_BSD
        longest = max(map(len, contexts)) - 1
        if not longest:
            return start_BSD[:, :0]
        tokens = [context[:-1] + [0] * (longest + 1 - len(context)) for context in contexts]
        visible, tokens_BT = cache.prefill(longest, rows), torch.tensor(tokens, device=start_BSD.device)
        e_BTD = self.model.encode(tokens_BT, visible)
        state_BTD = self.model.iterate(start_BSD[:, :longest].to(e_BTD.dtype), e_BTD, self.k, visible=visible)
        self.model.decode(state_BTD, visible=visible)
        return state_BTD

    def keep(self, rows: list[int]) -> None:
        """Remove all other rows from the cache, as the batch has done before."""
        assert self.cache is not None
        self.cache.keep(rows)
        self.start_BSD = self.start_BSD[rows]

    def next_positions(self) -> list[int]:
        """Position of each row's last token in its context. This token has not been run yet."""
        return [len(self.batch.context(sequence)) - 1 for sequence in self.batch.rows]

    def logits(self, state_BTD: Tensor, visible: Visible) -> Tensor:
        """Read out states (B, T, D) to logits (B, T, V)."""
        self._readouts += state_BTD.shape[0] * state_BTD.shape[1]
        return self.model.logits(self.model.decode(state_BTD, visible=visible))

    @property
    def flops(self) -> float:
        return 0.0 if self.cache is None else visited_cost(self.model.config, self.cache.visits, self._readouts)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.bytes
