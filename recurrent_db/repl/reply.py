"""A text made for somebody who watches: settings, the call of the engine, the text as it grows, and what it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from recurrent_db.accounting.flops import cache_numbers_per_token, cached_cost, visits_kept
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import Decoder, stream
from recurrent_db.generation.loop_decoder import LoopRows
from recurrent_db.generation.samplers import Method
from recurrent_db.generation.sampling import Sampling
from recurrent_db.model.looped import LoopedLM


def shown(value: object) -> str:
    """A setting's value, as a user would type it."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def bytes_shown(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


@dataclass(frozen=True)
class Settings:
    """How a text is made. Raises `UserError` for a value out of its range."""

    k: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    sampler: str = "sequential"
    cache: str = "full"
    adaptive: str = "off"
    """When a token needs no further iterations (`adaptive.Exit`), or off."""
    warm_start: str = "off"
    """On: a token's iterations begin at the state of the one before it."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k must be 1 or more, got {self.k}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.warm_start not in ("on", "off"):
            raise UserError(f"warm_start is on or off, not {self.warm_start!r}")
        self.method()
        visits_kept(self.cache)
        self.sampling()

    def check(self, model: LoopedLM) -> None:
        """Raises `UserError` where the model cannot be run so."""
        self.method().check(model, self.cache)

    def method(self) -> Method:
        return Method.parse(self.sampler, self.exit, self.warm_start == "on")

    @property
    def exit(self) -> str | None:
        return None if self.adaptive == "off" else self.adaptive

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def __str__(self) -> str:
        return ", ".join(f"{name} {shown(value)}" for name, value in asdict(self).items())


Engine = Decoder | LoopRows


def engine_tokens(
    model: LoopedLM,
    ids: list[int],
    settings: Settings,
    over: Callable[[int], bool],
    watch: Callable[[Engine], object],
) -> Iterator[int]:
    """From a prompt's tokens to new ones. ``over`` is told of each and says whether that ends the text (it is not yielded
    then); ``watch`` gets what computes them, for the figures of `/stats`."""
    new = stream(
        model, [ids], settings.k, settings.max_new_tokens, settings.sampling(), settings.seed,
        over=lambda _, token: over(token), cache_policy=settings.cache, sampler=settings.sampler, exit=settings.exit,
        warm_start=settings.warm_start == "on", watch=watch,
    )  # fmt: skip
    return (token for _, token in new)


ABOUT = {
    "sequential": "one token after another, K iterations each",
    "speculative": "[:DRAFT_K[:BLOCK]] blocks drafted at DRAFT_K (2) iterations; the same distribution, faster",
    "diagonal": "[:INNER] a new token every INNER iterations; the same text, faster",
    "diagonal-unverified": "[:INNER] the same without taking anything back; another text",
}
"""What `/sampler` says of each."""


@dataclass
class Reply:
    """A text and how it came about."""

    prompt: str
    prompt_ids: list[int]
    settings: Settings
    ids: list[int] = field(default_factory=list)
    ended: str = "length"
    """``length``, ``document`` (the model ended it) or ``stopped``."""
    text: str = ""
    first_seconds: float = 0.0
    """Until the first token was there."""
    seconds: float = 0.0
    flops: float = 0.0
    cache_bytes: int = 0
    mean_k: float = float("nan")
    """Iterations behind a token."""
    acceptance: float | None = None
    """Share of drafted tokens that held; None where nothing was drafted."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; NaN without any."""
        later = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / later if len(self.ids) > 1 and later > 0 else float("nan")

    def to_json(self) -> dict[str, Any]:
        settings = {("cache_policy" if name == "cache" else name): v for name, v in asdict(self.settings).items()}
        figures = {name: getattr(self, name) for name in ("ended", "seconds", "flops", "cache_bytes", "acceptance")}
        figures["mean_k"] = self.mean_k if self.mean_k == self.mean_k else None
        return {"prompt": self.prompt, "text": self.text, **settings, "tokens": len(self.ids), **figures}


def check_memory(model: LoopedLM, prompt: int, settings: Settings) -> None:
    """Refuse a cache that is larger than the machine's memory: the system would end the program, not the text.

    Raises:
        UserError: saying how much it takes and how much there is.
    """
    weight = model.embedding.weight
    positions = min(model.config.max_seq_len, prompt + settings.max_new_tokens)
    numbers = cache_numbers_per_token(model.config, model.recurrence.passes(settings.k), settings.cache)
    needed = positions * numbers * weight.element_size()
    if weight.device.type == "cuda":
        there = torch.cuda.mem_get_info(weight.device)[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > there:
        raise UserError(
            f"at k = {settings.k} the cache of {positions} tokens takes {bytes_shown(needed)}, and there are"
            f" {bytes_shown(there)}: choose a lower /k, or /cache last"
        )


def make_reply(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompt: str,
    ids: list[int],
    settings: Settings,
    show: Callable[[bytes], object],
) -> Reply:
    """Make a text, telling ``show`` of each token's bytes. Ctrl-C (KeyboardInterrupt) ends it.

    Raises:
        UserError: the cache does not fit into memory.
    """
    check_memory(model, len(ids), settings)
    reply, engines = Reply(prompt, ids, settings), list[Engine]()

    def over(token: int) -> bool:
        if token == tokenizer.eos_id:
            reply.ended = "document"
        return token == tokenizer.eos_id

    start = time.perf_counter()
    try:
        for token in engine_tokens(model, ids, settings, over, engines.append):
            reply.ids.append(token)
            reply.first_seconds = reply.first_seconds or time.perf_counter() - start
            show(tokenizer.decode_bytes([token]))
    except KeyboardInterrupt:
        reply.ended = "stopped"
    reply.seconds = time.perf_counter() - start
    reply.text = tokenizer.decode(reply.ids)
    passes = model.recurrence.passes(settings.k)
    for engine in engines:
        reply.cache_bytes = engine.cache.bytes if engine.cache is not None else 0
        if isinstance(engine, Decoder):
            costs = (w.rows * cached_cost(model.config, passes, w.first, w.stop, w.read) for w in engine.work)
            reply.flops, reply.mean_k = sum(costs), settings.k
        else:
            reply.flops, reply.mean_k = engine.flops, engine.stats.mean_k
            reply.acceptance = engine.stats.acceptance if engine.stats.drafted else None
    return reply
