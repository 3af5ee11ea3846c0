"""Generating text: prompts are read once, then each token is run once, for K iterations, with what came before in a cache.

- `Decoder`: the engine. Rows of tokens, and the logits of the token after each.
- `stream`: tokens of many prompts as they are drawn; `generate_tokens`: of one.
- `generate`, `generate_texts`: from text to text.

Inference goes through the same `recurrence` as scoring, so the distribution that is sampled is the one that is scored (with
one noise draw). Draws, of noise and of tokens, are a function of (seed, request, position), so what a prompt is batched
with changes its text by no more than rounding can.

The window. A context holds at most the model's ``max_seq_len`` tokens. Of a longer prompt its last so many are read. Where a
text grows out of the window, the older half of the context is forgotten and the rest read anew, so a context always holds
what it would if the text had started there: from half a window (and one token) to a whole one.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recurrent_db.data.tokenizer import Tokenizer, replace_surrogates
from recurrent_db.errors import UserError
from recurrent_db.generation.cache import Cache
from recurrent_db.generation.loop_decoder import LoopRows, Sampler, Stats
from recurrent_db.generation.samplers import Method
from recurrent_db.generation.sampling import Sampling
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

_LOGITS_AT_ONCE = 1 << 26
"""Positions times vocabulary that a prompt is read by, since a walk's bridges read out at each: 256 MiB in fp32."""

ROWS_AT_ONCE = 16
"""Texts that `generate_texts` and others run together."""


class Work(NamedTuple):
    """A pass over a cache."""

    rows: int
    """Texts, one position each where ``stop`` is ``first`` + 1; padded ones count whole."""
    first: int
    stop: int
    """Of the positions, the first and the one after the last."""
    read: bool
    """Whether a token was drawn from the last of them."""


class Decoder:
    """Rows of tokens that grow at the end, and the cache of their contexts.

    Args:
        prompts: token ids, one or more a row.
        k: core iterations.
        max_new_tokens: the most tokens that will be added to a row.
        rng, requests: key the noise.
        cache_policy: what the cache keeps (see `cache`); of policies other than `full` a text depends on its batch, where
            that changes in which parts its context is read.
    """

    def __init__(
        self,
        model: LoopedLM,
        prompts: Sequence[Sequence[int]],
        k: int,
        max_new_tokens: int,
        rng: Rng,
        requests: Sequence[int],
        cache_policy: str = "full",
    ) -> None:
        if not all(prompts):
            raise UserError("a prompt needs at least one token")
        self.model, self.k, self.rng, self.requests, self.cache_policy = model, k, rng, list(requests), cache_policy
        self.window, self._recurrence = model.config.max_seq_len, model.recurrence.ready(model)
        self.ids = [list(prompt) for prompt in prompts]
        self.alive = list(range(len(prompts)))
        """Rows that are not at their end."""
        self.cache: Cache | None = None
        self.work: list[Work] = []
        """What has been computed: for counts of FLOPs."""
        self._room = max_new_tokens
        self._rows: list[int] = []
        """Which row each of the cache's is."""
        self._firsts = [max(0, len(prompt) - self.window) for prompt in prompts]
        """Where each row's context starts."""
        self._noise: dict[tuple[object, ...], tuple[int, Tensor]] = {}

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits of the next token of each row that is alive, in the order of `alive`, (rows, V). To be called again when
        each of them has got that token."""
        # A full cache has a row without padding, which is at its end or grows out of the window now.
        grown = [row for row in self.alive if len(self.ids[row]) - self._firsts[row] > self.window]
        for row in grown:
            self._firsts[row] += max(1, self.window // 2)
        if self.cache is None or grown:
            tokens = self._begin()
        else:
            full, half = self.cache.length == self.cache.capacity, 2 * len(self.alive) <= len(self._rows)
            if len(self.alive) < len(self._rows) and (full or half):
                self.cache = self.cache.take([self._rows.index(row) for row in self.alive])
                self._rows, self._noise = list(self.alive), {}
            tokens = [[self.ids[row][-1]] for row in self._rows]
        assert self.cache is not None
        logits = self._run(self.cache, torch.tensor(tokens, device=self.model.embedding.weight.device))
        return logits if self._rows == self.alive else logits[[self._rows.index(row) for row in self.alive]]

    def _begin(self) -> list[list[int]]:
        """An empty cache for the contexts of the rows that are alive, and these, padded."""
        self._rows, self._noise = list(self.alive), {}
        contexts = [self.ids[row][self._firsts[row] :] for row in self._rows]
        longest = max(map(len, contexts))
        padding = [longest - len(context) for context in contexts]
        capacity = min(self.window, longest + self._room)
        self.cache = Cache(self.model, len(self._rows), capacity, padding, self.cache_policy)
        return [[0] * pad + context for pad, context in zip(padding, contexts, strict=True)]

    def _run(self, cache: Cache, tokens_BT: Tensor) -> Tensor:
        """Logits after the last of the tokens that follow the cache's, (B, V)."""
        requests = torch.tensor([self.requests[row] for row in self._rows])
        most = max(1, _LOGITS_AT_ONCE // (len(tokens_BT) * self.model.config.vocab_size))
        for part_BT in tokens_BT.split(most, dim=1):
            noise = NoiseSource(self.rng, requests, self.window, offset=self._offsets(cache), kept=self._noise)
            first, visible = cache.length, cache.grow(part_BT.shape[1])
            e_BTD = self.model.encode(part_BT, visible)
            [(_, hidden_BTD)] = self._recurrence.hidden(self.model, part_BT, e_BTD, [self.k], noise, visible=visible)
            self.work.append(Work(len(self._rows), first, cache.length, read=False))
        self.work[-1] = self.work[-1]._replace(read=True)
        return self.model.logits(hidden_BTD[:, -1])

    def _offsets(self, cache: Cache) -> int | tuple[int, ...]:
        """Position of the next token in each row's whole text."""
        here = cache.offset
        inside = [here] * len(self._rows) if isinstance(here, int) else here
        offsets = tuple(self._firsts[row] + offset for row, offset in zip(self._rows, inside, strict=True))
        return offsets if len(set(offsets)) > 1 else offsets[0]


class _Sequential:
    """A decoder as a sampler: every step draws the next token of each row that is alive."""

    def __init__(self, decoder: Decoder, sampling: Sampling, stats: Stats) -> None:
        self.ids, self.alive = decoder.ids, decoder.alive
        self._decoder, self._sampling, self._stats = decoder, sampling, stats

    def step(self) -> list[tuple[int, list[int]]]:
        out = []
        for row, logits_V in zip(self.alive, self._decoder.logits().cpu(), strict=True):
            ids = self.ids[row]
            u = self._decoder.rng.uniform([self._decoder.requests[row]], (1,), f"token/{len(ids)}").item()
            out.append((row, [self._sampling.draw(logits_V, ids, u)]))
        self._stats.steps += 1
        self._stats.read += len(out)
        self._stats.iterations += self._decoder.k * len(out)
        return out


def _never(row: int, token: int) -> bool:
    return False


def stream(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    k: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    over: Callable[[int, int], bool] = _never,
    cache_policy: str = "full",
    sampler: str = "sequential",
    exit: str | None = None,
    warm_start: bool = False,
    stats: Stats | None = None,
    watch: Callable[[Decoder | LoopRows], object] = lambda rows: None,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as tokens of several texts are drawn, in turns.

    Args:
        prompts: token ids, one or more each.
        k: core iterations, 1 or more.
        max_new_tokens: of each text.
        requests: keys of the draws, one a prompt; 0, 1, ... where not given.
        over: called with each row and its new token; whether that token ends the row's text. It is not yielded then.
        cache_policy: as of `Decoder`.
        sampler, exit, warm_start: as in `generate`.
        stats: filled while tokens are drawn.
        watch: is given what computes the tokens, before the first one.
    """
    rng, stats = Rng(seed, EVALUATION_STEP), Stats() if stats is None else stats
    keys = list(range(len(prompts))) if requests is None else list(requests)
    method = Method.parse(sampler, exit, warm_start)
    method.check(model, cache_policy)
    engine: Sampler
    if method.plain:
        decoder = Decoder(model, prompts, k, max_new_tokens, rng, keys, cache_policy)
        watch(decoder)
        engine = _Sequential(decoder, sampling, stats)
    else:
        rows = method.rows(model, prompts, k, max_new_tokens, sampling, rng, keys, stats)
        watch(rows)
        engine = rows
    left = [max_new_tokens] * len(prompts)
    while engine.alive and max_new_tokens:
        for row, tokens in engine.step():
            for token in tokens:
                left[row] -= 1
                stats.tokens += 1
                ended = over(row, token)
                if ended or not left[row]:
                    engine.alive.remove(row)
                if not ended:
                    engine.ids[row].append(token)
                    yield row, token
                if row not in engine.alive:
                    break


def generate_tokens(
    model: LoopedLM,
    prompt_ids: list[int],
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    request: int = 0,
    stop_id: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """Yield new token ids one by one; ``stop_id`` ends the text and is not yielded. Arguments as in `generate`."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    new = stream(
        model, [prompt_ids], k, max_new_tokens, sampling, seed, [request], lambda _, token: token == stop_id
    )  # fmt: skip
    return (token for _, token in new)


class Text:
    """A text that grows by tokens, up to the end of the document or the first of its stop strings.

    Stop strings are looked for in bytes: one may begin and end inside tokens, and a token inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [replace_surrogates(stop).encode() for stop in stops if stop]
        self._overlap = max(map(len, self._stops), default=1) - 1
        self.ids: list[int] = []
        """The tokens, with those that hold a stop string and without the end of the document."""
        self.bytes = bytearray()
        """The text in UTF-8, without the stop string and what comes after it."""

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
    k: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    stops: Sequence[str] = (),
    rows: int = ROWS_AT_ONCE,
    progress: Callable[[int], object] = lambda n: None,
    cache_policy: str = "full",
    sampler: str = "sequential",
    exit: str | None = None,
    warm_start: bool = False,
    stats: Stats | None = None,
) -> list[Text]:
    """Continue prompts of token ids (an empty one starts a document), ``rows`` at a time, those of like length together.

    Arguments as in `stream` and `generate`; ``progress`` is told of every batch how many texts it finished.
    """
    # What precedes a document in training is the end of another.
    started = [list(prompt) or [tokenizer.eos_id] for prompt in prompts]
    keys = list(range(len(started))) if requests is None else list(requests)
    texts = [Text(tokenizer, stops) for _ in started]
    order = sorted(range(len(started)), key=lambda i: -len(started[i]))
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        together, these = [started[i] for i in batch], [keys[i] for i in batch]
        over = lambda row, token, batch=batch: texts[batch[row]].add(token)  # noqa: E731
        method = sampler, exit, warm_start, stats
        for _ in stream(model, together, k, max_new_tokens, sampling, seed, these, over, cache_policy, *method):
            pass
        progress(len(batch))
    return texts


def generate_texts(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    k: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    cache_policy: str = "full",
    sampler: str = "sequential",
    exit: str | None = None,
    warm_start: bool = False,
    stats: Stats | None = None,
    requests: Sequence[int] | None = None,
) -> list[str]:
    """`generate` of several prompts together; the i-th draws as request i, or as request ``requests[i]``."""
    for ok, message in (
        (isinstance(k, int), f"k must be a whole number, got {k!r}"),
        (isinstance(k, int) and k >= 1, f"k must be 1 or more, got {k}"),
        (requests is None or len(requests) == len(prompts), "requests must be as many as prompts"),
        (max_new_tokens >= 0, f"max_new_tokens must be 0 or more, got {max_new_tokens}"),
    ):
        if not ok:
            raise UserError(message)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    texts = complete(
        model, tokenizer, ids, k, max_new_tokens, sampling, seed, requests, stop, cache_policy=cache_policy,
        sampler=sampler, exit=exit, warm_start=warm_start, stats=stats,
    )  # fmt: skip
    return [str(text) for text in texts]


def generate(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompt: str,
    k: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    cache_policy: str = "full",
    sampler: str = "sequential",
    exit: str | None = None,
    warm_start: bool = False,
    stats: Stats | None = None,
    request: int = 0,
) -> str:
    """Continue ``prompt`` with ``k`` core iterations for each token.

    Args:
        k: core iterations, 1 or more.
        max_new_tokens: the most tokens to add; the end-of-document token ends the text earlier.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: sample among this many most likely tokens; 0 means all.
        top_p: sample among the fewest tokens whose probability reaches this; 1 means all.
        seed: the same seed gives the same text.
        min_p: sample among tokens at least this times as likely as the most likely one.
        repetition_penalty: above 1 makes tokens that are there already less likely (see `Sampling`); 1 is none.
        stop: strings that end the text and are not part of it.
        cache_policy: full; or last or modulo-S, which keep the last or S of the K iterations of earlier positions, for less
            memory and another distribution (see `recurrent_db.generation.cache`).
        sampler: sequential; or, for models without noise levels, several times faster at many iterations: speculative or
            diagonal, with the same greedy text (see `recurrent_db.generation.samplers`).
        exit: kl, entropy or latent, each with a threshold as in kl:1e-3: a token's iterations end when they change it no
            more, and ``k`` is the most (see `recurrent_db.generation.adaptive`).
        warm_start: begin each token's iterations at the state of the one before it.
        stats: is filled with counts: the share of drafted tokens that held, the mean number of iterations.
        request: with the seed, what the draws are a function of: row i of `generate_texts` is request i.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError: for an argument out of its range.
    """
    return generate_texts(
        model, tokenizer, [prompt], k, max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty, stop,
        cache_policy, sampler, exit, warm_start, stats, [request],
    )[0]  # fmt: skip
