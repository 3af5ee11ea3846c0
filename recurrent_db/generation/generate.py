"""Text generation from prompts.

- `generate` and `generate_texts` take prompts as text and return text.
- `complete` takes token ids and returns texts, in batches.
- `stream` takes token ids and yields tokens as they are sampled.

All of them take `options.GenerationOptions`. `samplers` describes the decoding strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from recurrent_db.data.tokenizer import Tokenizer, replace_surrogates
from recurrent_db.errors import UserError
from recurrent_db.generation.decoder import DecodingStats, EndsText, never
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.samplers import make_decoder
from recurrent_db.model.looped import LoopedLM

BATCH_SIZE = 16
"""Default number of prompts that `complete` runs together."""


def stream(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    requests: Sequence[int] | None = None,
    ends_text: EndsText = never,
    stats: DecodingStats | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue several prompts together, and yield (index of the prompt, token) for each new token.

    Args:
        model: the model.
        prompts: token ids, at least one per prompt.
        options: options of the generation.
        requests: one number per prompt, which with the seed keys its random stream; 0, 1, ... by default.
        ends_text: called with index and token; returns whether the token ends the text. Such a token is not yielded.
        stats: counts, filled while tokens are generated.

    Raises:
        UserError: a prompt is empty, or the model does not support these options.
    """
    return make_decoder(model, prompts, options, requests, stats).stream(ends_text)


class Completion:
    """A text that grows token by token, up to the end of the document or the first stop string.

    Stop strings are searched for in bytes, because they may begin or end within a token, and a token may begin or end within
    a character.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [replace_surrogates(word).encode() for word in stop if word]
        self._overlap = max(map(len, self._stops), default=1) - 1
        self.ids: list[int] = []
        """The tokens, including those of the stop string, without the end-of-document token."""
        self.bytes = bytearray()
        """The text in UTF-8, without the stop string."""

    def add(self, token: int) -> bool:
        """Add a token. Returns whether it completes the text."""
        if token == self._tokenizer.eos_id:
            return True
        self.ids.append(token)
        searched = max(0, len(self.bytes) - self._overlap)
        self.bytes += self._tokenizer.decode_bytes([token])
        found = [place for stop in self._stops if (place := self.bytes.find(stop, searched)) >= 0]
        if found:
            del self.bytes[min(found) :]
        return bool(found)

    def __str__(self) -> str:
        return self.bytes.decode("utf-8", errors="replace")


def complete(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    requests: Sequence[int] | None = None,
    stats: DecodingStats | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Completion]:
    """Continue prompts in batches of prompts with similar length.

    Args:
        model, options, requests, stats: as in `stream`.
        tokenizer: decodes the new tokens.
        prompts: token ids; an empty prompt starts a new document.
        batch_size: number of prompts to run together.
        progress: called after each batch with its number of prompts.

    Returns:
        One completion per prompt, in the order of the prompts.
    """
    # In training each document follows the end-of-document token of another.
    started = [list(prompt) or [tokenizer.eos_id] for prompt in prompts]
    keys = list(range(len(started))) if requests is None else list(requests)
    texts = [Completion(tokenizer, options.stop) for _ in started]
    order = sorted(range(len(started)), key=lambda i: -len(started[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ends_text = lambda index, token, batch=batch: texts[batch[index]].add(token)  # noqa: E731
        for _ in stream(model, [started[i] for i in batch], options, [keys[i] for i in batch], ends_text, stats):
            pass
        progress(len(batch))
    return texts


def generate_texts(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: GenerationOptions | None = None,
    *,
    requests: Sequence[int] | None = None,
    stats: DecodingStats | None = None,
    **changes: Any,
) -> list[str]:
    """Continue several prompts together. Like `generate`, for a list.

    Each prompt has its own random stream, so its text does not depend on the batch. The stream is keyed by the seed and by
    ``requests[i]``, which is i by default.
    """
    options = (options or GenerationOptions()).changed(**changes)
    if requests is not None and len(requests) != len(prompts):
        raise UserError(f"requests must have one number per prompt, got {len(requests)} for {len(prompts)} prompts")
    texts = complete(model, tokenizer, [tokenizer.encode(prompt) for prompt in prompts], options, requests, stats)
    return [str(text) for text in texts]


def generate(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompt: str,
    options: GenerationOptions | None = None,
    *,
    request: int = 0,
    stats: DecodingStats | None = None,
    **changes: Any,
) -> str:
    """Continue a prompt.

    >>> generate(model, tokenizer, "def main(", k=4, temperature=0.7)      # doctest: +SKIP

    Args:
        model: the model, from `recurrent_db.load`.
        tokenizer: the model's tokenizer.
        prompt: the text to continue; an empty prompt starts a new document.
        options: options of the generation; None uses the defaults of `GenerationOptions`.
        request: keys the random stream together with the seed. Prompt i of `generate_texts` has request i by default.
        stats: filled with counts, such as the share of accepted draft tokens and the mean number of iterations.
        changes: options by name, which replace those in ``options``.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError: an option is unknown or invalid, or the model does not support it.
    """
    return generate_texts(model, tokenizer, [prompt], options, requests=[request], stats=stats, **changes)[0]
