"""How texts are generated: one object for every function and command that generates."""

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

SAMPLERS = {"sequential": (), "speculative": (2, 8), "diagonal": (0,), "diagonal-unverified": (0,)}
"""Names of the samplers, and the defaults of the numbers that may follow each name. 0 means: chosen from K."""
THRESHOLDS = {"kl": 5e-4, "entropy": 1e-3, "latent": 0.03}
"""Names of the exit criteria and their default thresholds."""


@dataclass(frozen=True)
class Sampler:
    """A decoding strategy by name, with its numbers; `samplers` explains them."""

    name: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, word: str) -> Sampler:
        """From ``NAME`` or ``NAME:NUMBER:NUMBER``. Raises `UserError`."""
        name, *numbers = word.split(":")
        defaults = SAMPLERS.get(name)
        if defaults is None or len(numbers) > len(defaults) or not all(re.fullmatch("[1-9][0-9]*", n) for n in numbers):
            raise UserError(
                "a sampler is sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or diagonal-unverified[:INNER],"
                f" not {word!r}"
            )
        given = tuple(map(int, numbers))
        return cls(name, given + defaults[len(given) :])


@dataclass(frozen=True)
class Exit:
    """When a token needs no further iterations; `adaptive` explains the criteria."""

    criterion: str
    threshold: float

    @classmethod
    def parse(cls, word: str) -> Exit:
        """From ``CRITERION`` or ``CRITERION:THRESHOLD``, as in ``kl:1e-3``. Raises `UserError`."""
        name, colon, number = word.partition(":")
        try:
            threshold = float(number) if colon else THRESHOLDS[name]
            if name in THRESHOLDS and 0 <= threshold < math.inf:
                return cls(name, threshold)
        except (KeyError, ValueError):
            pass
        raise UserError(f"an exit is kl, entropy or latent, with a threshold of 0 or more as in kl:1e-3, not {word!r}")


@dataclass(frozen=True)
class GenerationOptions:
    """How a text is generated. Raises `UserError` for a value out of its range."""

    k: int = 8
    """Core iterations for each token, 1 or more; of a denoiser, noise levels."""
    temperature: float = 1.0
    """0 is greedy (the first of the most likely tokens), 1 the model's own distribution."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens whose probability reaches this; 1 means all."""
    min_p: float = 0.0
    """Draw among tokens at least this times as likely as the most likely one (arXiv 2407.01082); 0 means all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the text so far less likely: divides positive logits and multiplies negative
    ones (CTRL, arXiv 1909.05858). 1 is none."""
    max_new_tokens: int = 64
    """The most tokens to add; the end-of-document token ends a text earlier."""
    seed: int = 0
    """Seed of the noise and of the draws. The same seed gives the same text."""
    stop: Sequence[str] = ()
    """Strings that end the text and are not part of it."""
    sampler: str = "sequential"
    """The decoding strategy: sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or diagonal-unverified[:INNER]
    (`recurrent_db.generation.samplers`). The last three serve models without noise levels."""
    exit: str | None = None
    """kl, entropy or latent, each with a threshold as in kl:1e-3: a token's iterations end when they change it no more, and
    K is the most (`recurrent_db.generation.adaptive`). For the sequential sampler and models without noise levels."""
    warm_start: bool = False
    """Start each token's iterations from the last state of the token before it. Needs what `exit` needs."""
    cache_policy: str = "full"
    """What the key-value cache keeps of earlier tokens' iterations: full; or last or modulo-S, for less memory and another
    distribution (`recurrent_db.generation.cache`). For the sequential sampler without exit and warm start."""

    def __post_init__(self) -> None:
        for name in ("k", "top_k", "max_new_tokens", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("sampler", "exit", "cache_policy"):
            if not isinstance(getattr(self, name), str) and not (name == "exit" and self.exit is None):
                raise UserError(f"{name} must be a word, got {getattr(self, name)!r}")
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
            raise UserError(f"exits and warm starts are for the sequential sampler, not for {name}")
        if self.cache_policy != "full" and not self.plain:
            raise UserError(
                f"the cache policy {self.cache_policy!r} is for plain sequential decoding: other samplers keep all"
                " iterations"
            )

    @property
    def plain(self) -> bool:
        """Whether decoding is sequential with K iterations for each token, which serves every model."""
        return self.sampler == "sequential" and self.exit is None and not self.warm_start

    @property
    def argmax(self) -> bool:
        """Whether the next token is the most likely one, whatever the text so far holds."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def changed(self, **changes: Any) -> GenerationOptions:
        """A copy with other values. Raises `UserError` for a name that is no option."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise UserError(f"unknown generation option {name!r}; {hint}")
        return dataclasses.replace(self, **changes)
