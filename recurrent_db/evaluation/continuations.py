"""Prompts from held-out text, and their continuations: real ones, generated ones, and those of baselines.

A held-out document is cut into windows of P + N tokens. The first P tokens are a prompt. The others are its real
continuation, which is shorter than N at the end of the document. Generated text ends by the same rule: after N tokens, or
when the model ends the document. A keyed permutation of the seed and the split chooses the windows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recurrent_db.data import TokenData, document, permute
from recurrent_db.data.shards import PIECE
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import BATCH_SIZE, complete
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import Recurrence
from recurrent_db.rng import key


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt and its real continuation, in the data's tokens."""

    ids: list[int]
    real_ids: list[int]
    """The real continuation."""
    source: str
    number: int
    """The document's number within its source."""


def choose_prompts(
    data: TokenData, count: int, prompt_tokens: int, continuation_tokens: int, seed: int = 0
) -> list[Prompt]:
    """Choose ``count`` windows of a split that do not overlap. Each has at least one token after its prompt.

    Raises:
        UserError: the split has fewer windows.
    """
    window = prompt_tokens + continuation_tokens
    places: list[tuple[str, int, NDArray[np.int64]]] = []
    for name, source in data.sources.items():
        lengths = np.concatenate([np.diff(offsets[:]) for offsets in source.offsets] or [np.empty(0, dtype=np.int64)])
        # A document's last token is its separator. A window needs a prompt and one more token before it.
        windows = np.maximum(0, (lengths - 1 - (prompt_tokens + 1)) // window + 1)
        places.append((name, len(lengths), windows))
    before = np.cumsum([0, *(number for _, _, windows in places for number in windows)])
    if before[-1] < count:
        raise UserError(
            f"{data.where} has {before[-1]} windows of {prompt_tokens} + {continuation_tokens} tokens, but {count} are"
            f" needed (half of them to compare real text with real text): lower --prompts, or make them shorter"
        )
    names = [(name, number) for name, documents, _ in places for number in range(documents)]
    prompts = []
    for index in permute(np.arange(count), int(before[-1]), key("prompts", seed)).tolist():
        place = int(np.searchsorted(before, index, side="right")) - 1
        name, number = names[place]
        ids = document(data.sources[name], number)[:-1].tolist()
        start = (index - int(before[place])) * window
        middle = start + prompt_tokens
        prompts.append(Prompt(ids[start:middle], ids[middle : start + window], name, number))
    return prompts


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def parse_decoding(word: str) -> GenerationOptions:
    """Options for a decoding: ``greedy``, ``t=0.8`` (temperature), ``p=0.95`` (top-p), or both, ``t=0.8:p=0.95``.

    Raises:
        UserError: ``word`` has another form, or a value is out of range.
    """
    if word == "greedy":
        return GenerationOptions(temperature=0.0)
    values = {"t": 1.0, "p": 1.0}
    for part in word.split(":"):
        match = re.fullmatch(r"([tp])=([0-9.]+)", part)
        try:
            if match is None:
                raise ValueError
            values[match[1]] = float(match[2])
        except ValueError:
            raise UserError(f"a decoding is greedy, t=0.8, p=0.95 or t=0.8:p=0.95, got {word!r}") from None
    if values["t"] <= 0 or not 0 < values["p"] <= 1:
        raise UserError(f"decoding {word}: t must be above 0, p above 0 and at most 1")
    return GenerationOptions(temperature=values["t"], top_p=values["p"])


def with_walk(recurrence: Recurrence, choices: Mapping[str, str]) -> Recurrence:
    """A denoiser's walk with another ``bridge`` or ``sampler``. Other recurrences are returned unchanged."""
    walk = recurrence.walk
    if walk is None:
        return recurrence
    chosen: dict[str, Any] = dict(choices)
    changed: Recurrence = dataclasses.replace(walk, config=dataclasses.replace(walk.config, **chosen))
    return changed


def continue_prompts(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    options: GenerationOptions,
    draws: int,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], object] = lambda count: None,
) -> list[list[list[int]]]:
    """Continue every prompt several times.

    Draw j of prompt i is request ``i * draws + j``. Greedy decoding makes one draw if the model starts from no noise.

    Returns:
        Token ids without the separator, indexed by draw and prompt.
    """
    if options.temperature == 0 and not model.recurrence.stochastic:
        draws = 1
    sets = []
    for draw in range(draws):
        requests = [number * draws + draw for number in range(len(prompts))]
        texts = complete(model, tokenizer, prompts, options, requests, batch_size=batch_size, progress=progress)
        sets.append([text.ids for text in texts])
    return sets


def frequencies(data: TokenData) -> NDArray[np.float64]:
    """Share of each token in a split, (V,)."""
    counts = np.zeros(data.vocab_size)
    for source in data.sources.values():
        for start in range(0, source.tokens, PIECE):
            piece = source.read(start, min(PIECE, source.tokens - start))
            counts += np.bincount(piece, minlength=data.vocab_size)
    return counts / counts.sum()


def independent_texts(
    shares_V: NDArray[np.float64], eos_id: int, count: int, tokens: int, seed: int = 0
) -> list[list[int]]:
    """Texts of independent tokens with these frequencies. The separator ends a text and is not part of it."""
    rng = np.random.default_rng(key("independent", seed))
    drawn = rng.choice(len(shares_V), size=(count, tokens), p=shares_V).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in drawn]
