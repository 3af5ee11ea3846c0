"""Generating text from prompts.

- `generate` and `generate_texts`: from text to text.
- `complete`: from token ids to texts, in batches.
- `stream`: from token ids to tokens, as they are drawn.

`samplers` lists the decoders; `options.GenerationOptions` holds what all of these functions take.
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
"""Texts that `complete` makes together by default."""


def stream(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    requests: Sequence[int] | None = None,
    ends_text: EndsText = never,
    stats: DecodingStats | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (prompt's index, token) as the tokens of several texts are drawn, in turns.

    Args:
        prompts: token ids, one or more each.
        requests: keys of the draws, one for each prompt; 0, 1, ... by default.
        ends_text: called with each index and token; whether the token ends the text. It is not yielded then.
        stats: filled while tokens are drawn.

    Raises:
        UserError: a prompt is empty, or the model cannot be run with these options.
    """
    return make_decoder(model, prompts, options, requests, stats).stream(ends_text)


class Completion:
    """A text that grows by tokens, up to the end of the document or the first of its stop strings.

    Stop strings are searched for in bytes: one may begin and end inside tokens, and a token inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [replace_surrogates(word).encode() for word in stop if word]
        self._overlap = max(map(len, self._stops), default=1) - 1
        self.ids: list[int] = []
        """The tokens, with those that hold a stop string and without the end of the document."""
        self.bytes = bytearray()
        """The text in UTF-8, up to the stop string."""

    def add(self, token: int) -> bool:
        """Add a token; whether the text is complete with it."""
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
    """Continue prompts of token ids, ``batch_size`` at a time, those of like length together.

    An empty prompt starts a document. ``progress`` is called after each batch with its number of texts. Other arguments as
    of `stream`.
    """
    # What precedes a document in training is the end of another.
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
    """`generate` for several prompts together.

    Each prompt has its own random stream, so its text does not depend on the batch: prompt i draws as request i, or as
    request ``requests[i]``.
    """
    options = (options or GenerationOptions()).changed(**changes)
    if requests is not None and len(requests) != len(prompts):
        raise UserError("requests must be as many as prompts")
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
        options: the defaults of `GenerationOptions` where not given.
        request: with the seed, the key of the draws. Text i of `generate_texts` is request i.
        stats: filled with counts, such as the share of drafted tokens that held and the mean number of iterations.
        changes: options by name, in place of those of ``options``.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError: an option is unknown or out of its range, or the model cannot be run with it.
    """
    return generate_texts(model, tokenizer, [prompt], options, requests=[request], stats=stats, **changes)[0]
