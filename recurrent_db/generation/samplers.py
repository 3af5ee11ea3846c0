"""Registry of decoding strategies, selected by the option ``sampler``.

- ``sequential``: one token after another. `sequential.SequentialDecoder` supports every objective and cache policy. With an
  exit or a warm start, `adaptive.AdaptiveDecoder` is used instead.
- ``speculative[:DRAFT_K[:BLOCK]]``: drafts up to BLOCK (default 8) tokens at DRAFT_K (default 2) iterations and verifies
  them in one pass at K. Gives the same greedy text as sequential, and the same distribution.
- ``diagonal[:INNER]``: starts a new token every INNER iterations (default an eighth of K, at least 2), before earlier tokens
  have finished. Gives the same text as sequential for the same seed.
- ``diagonal-unverified[:INNER]``: the same without corrections. Gives another text.
"""

from __future__ import annotations

from collections.abc import Sequence

from recurrent_db.generation.adaptive import AdaptiveDecoder
from recurrent_db.generation.decoder import Decoder, DecodingStats
from recurrent_db.generation.loop_decoder import plain_loop
from recurrent_db.generation.options import GenerationOptions, Sampler
from recurrent_db.generation.sequential import SequentialDecoder
from recurrent_db.generation.speculation import DiagonalDecoder, SpeculativeDecoder
from recurrent_db.model.looped import LoopedLM


def check_served(model: LoopedLM, options: GenerationOptions) -> None:
    """Raise `UserError` if no decoder supports the model with these options."""
    if not options.plain:
        plain_loop(model)


def make_decoder(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    requests: Sequence[int] | None = None,
    stats: DecodingStats | None = None,
) -> Decoder:
    """Build the decoder that the options select. Arguments as for `Decoder`.

    Raises:
        UserError: a prompt is empty, or the decoder does not support the model.
    """
    arguments = model, prompts, options, requests, stats
    if options.plain:
        return SequentialDecoder(*arguments)
    sampler = Sampler.parse(options.sampler)
    if sampler.name == "sequential":
        return AdaptiveDecoder(*arguments)
    if sampler.name == "speculative":
        draft_k, block = sampler.numbers
        return SpeculativeDecoder(*arguments, draft_k=draft_k, block=block)
    inner = min(options.k, sampler.numbers[0] or max(2, -(-options.k // 8)))
    return DiagonalDecoder(*arguments, inner=inner, verified=sampler.name == "diagonal")
