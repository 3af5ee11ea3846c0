"""Registry of decoding strategies, which the option ``sampler`` names.

- ``sequential``: one token after another. With an exit or a warm start `adaptive.AdaptiveDecoder`, else
  `sequential.SequentialDecoder`, which alone serves every objective and cache policy.
- ``speculative[:DRAFT_K[:BLOCK]]``: a block of up to BLOCK (8) tokens in one pass, drafted at DRAFT_K (2) iterations. The
  same greedy text as sequential, and the same distribution.
- ``diagonal[:INNER]``: a new token starts every INNER iterations (an eighth of K, at least 2), before earlier ones have had
  all of theirs. The same text as sequential for the same seed.
- ``diagonal-unverified[:INNER]``: the same without taking anything back; another text.
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
    """Raises `UserError` where no decoder serves the model with these options."""
    if not options.plain:
        plain_loop(model)


def make_decoder(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    requests: Sequence[int] | None = None,
    stats: DecodingStats | None = None,
) -> Decoder:
    """The decoder that the options ask for. Arguments as of `Decoder`.

    Raises:
        UserError: a prompt is empty, or the decoder does not serve the model.
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
