"""Options of text generation, in one object that every function and command takes."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from recurrent_db.accounting.flops import visits_kept
from recurrent_db.errors import UserError
from recurrent_db.schema import MOST_INTEGER

SAMPLERS = {"sequential": (), "speculative": (2, 8), "diagonal": (0,), "diagonal-unverified": (0,)}
"""Each sampler's name and the defaults of the numbers that may follow it. 0 means a value derived from K."""
THRESHOLDS = {"kl": 5e-4, "entropy": 1e-3, "latent": 0.03}
"""Each exit criterion's name and default threshold."""


@dataclass(frozen=True)
class Sampler:
    """A decoding strategy: its name and its numbers. `samplers` explains them."""

    name: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, word: str) -> Sampler:
        """Read ``NAME`` or ``NAME:NUMBER:NUMBER``. Missing numbers get their defaults. Raises `UserError`."""
        name, *numbers = word.split(":")
        defaults = SAMPLERS.get(name)
        if (
            defaults is None
            or len(numbers) > len(defaults)
            or not all(re.fullmatch("[1-9][0-9]{0,17}", n) for n in numbers)
        ):
            raise UserError(
                "the sampler must be sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or"
                f" diagonal-unverified[:INNER], got {word!r}"
            )
        given = tuple(map(int, numbers))
        return cls(name, given + defaults[len(given) :])


@dataclass(frozen=True)
class Exit:
    """When to stop the iterations of a token early. `adaptive` explains the criteria."""

    criterion: str
    threshold: float

    @classmethod
    def parse(cls, word: str) -> Exit:
        """Read ``CRITERION`` or ``CRITERION:THRESHOLD``, such as ``kl:1e-3``. Raises `UserError`."""
        name, colon, number = word.partition(":")
        try:
            threshold = float(number) if colon else THRESHOLDS[name]
            if name in THRESHOLDS and 0 <= threshold < math.inf:
                return cls(name, threshold)
        except (KeyError, ValueError):
            pass
        raise UserError(
            f"exit must be kl, entropy or latent, with a threshold of 0 or more as in kl:1e-3, got {word!r}"
        )


@dataclass(frozen=True)
class GenerationOptions:
    """Options of text generation. Raises `UserError` if a value has the wrong type or is out of range."""

    k: int = 8
    """Number of core iterations per token, 1 or more. For a denoiser, number of noise levels."""
    temperature: float = 1.0
    """Divides the logits, 0 or more. 0 is greedy decoding (the first of equally likely tokens); 1 is the model's
    distribution."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose total probability reaches this; 1 means all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one (arXiv 2407.01082); 0 means all."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens of the prompt and of the text so far less likely: positive logits are divided by it,
    negative ones multiplied (CTRL, arXiv 1909.05858). 1 means no penalty."""
    max_new_tokens: int = 64
    """Largest number of tokens to generate. The end-of-document token ends a text earlier."""
    seed: int = 0
    """Seed of the noise and of the sampled tokens. The same seed gives the same text."""
    stop: Sequence[str] = ()
    """Strings that end the text. They are not part of it."""
    sampler: str = "sequential"
    """Decoding strategy: sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or diagonal-unverified[:INNER]; see
    `recurrent_db.generation.samplers`. All but sequential need a model without noise levels."""
    exit: str | None = None
    """Stop a token's iterations early, after at most K, when they no longer change its prediction: kl, entropy or latent,
    with an optional threshold as in kl:1e-3; see `recurrent_db.generation.adaptive`. Needs the sequential sampler and a
    model without noise levels."""
    warm_start: bool = False
    """Start each token's iterations from the last state of the token before it. Has the same requirements as `exit`."""
    cache_policy: str = "full"
    """Which iterations of earlier tokens the key-value cache keeps. full: all. last, modulo-S: fewer, which needs less
    memory and changes the distribution; see `recurrent_db.generation.cache`. Policies other than full need the sequential
    sampler without exit and warm start."""

    def __post_init__(self) -> None:
        for name in ("k", "top_k", "max_new_tokens", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name} must be a whole number, got {getattr(self, name)!r}")
            if abs(getattr(self, name)) > MOST_INTEGER:
                raise UserError(f"{name} must fit into 64 bits")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("sampler", "exit", "cache_policy"):
            if not isinstance(getattr(self, name), str) and not (name == "exit" and self.exit is None):
                raise UserError(f"{name} must be a string, got {getattr(self, name)!r}")
        for ok, message in (
            (self.k >= 1, f"k must be 1 or more, got {self.k}"),
            (0 <= self.temperature < math.inf, f"temperature must be 0 or more, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (all) or more, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (0 <= self.min_p <= 1, f"min_p must be between 0 and 1, got {self.min_p}"),
            (0 < self.repetition_penalty < math.inf,
             f"repetition_penalty must be above 0, got {self.repetition_penalty}"),
            (self.max_new_tokens >= 0, f"max_new_tokens must be 0 or more, got {self.max_new_tokens}"),
            (not isinstance(self.stop, str), f"stop must be a list of strings, got {self.stop!r}"),
        ):  # fmt: skip
            if not ok:
                raise UserError(message)
        name = Sampler.parse(self.sampler).name
        if self.exit is not None:
            Exit.parse(self.exit)
        visits_kept(self.cache_policy)
        if name != "sequential" and (self.exit is not None or self.warm_start):
            raise UserError(f"exits and warm starts need the sequential sampler, got {name}")
        if self.cache_policy != "full" and not self.plain:
            raise UserError(
                f"the cache policy {self.cache_policy!r} needs the sequential sampler without exit and warm start;"
                " otherwise the cache keeps all iterations"
            )

    @property
    def plain(self) -> bool:
        """Whether decoding is sequential with exactly K iterations per token. Every model supports this."""
        return self.sampler == "sequential" and self.exit is None and not self.warm_start

    @property
    def argmax(self) -> bool:
        """Whether the next token is always the most likely one: greedy decoding without a repetition penalty."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def changed(self, **changes: Any) -> GenerationOptions:
        """A copy with other values. Raises `UserError` for an unknown name or an invalid value."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known options: {', '.join(known)}"
                raise UserError(f"unknown generation option {name!r}; {hint}")
        return dataclasses.replace(self, **changes)
