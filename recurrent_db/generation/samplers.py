"""Samplers by name: how the tokens of K iterations are come by.

- `sequential`: one token after another. With an exit or a warm start by `adaptive.Adaptive`, else by `generate.Decoder`,
  which alone serves every objective and cache policy.
- `speculative[:DRAFT_K[:BLOCK]]`: a block of up to BLOCK (8) tokens a pass, drafted at DRAFT_K (2) iterations. The same
  greedy text as sequential, and the same distribution.
- `diagonal[:INNER]`: a new token starts every INNER iterations (an eighth of K, at least 2), before the ones ahead of it
  have had all of theirs. The same text as sequential for the same seed.
- `diagonal-unverified[:INNER]`: the same without taking anything back; another text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_db.errors import UserError
from recurrent_db.generation.adaptive import Adaptive, Exit
from recurrent_db.generation.loop_decoder import LoopRows, Stats, plain_loop
from recurrent_db.generation.sampling import Sampling
from recurrent_db.generation.speculation import Diagonal, Speculative
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import Rng

SAMPLERS = {"sequential": (), "speculative": (2, 8), "diagonal": (0,), "diagonal-unverified": (0,)}
"""Names and the numbers that may follow them, as they are where not given; 0 is by K."""


@dataclass(frozen=True)
class Method:
    """A sampler's name and numbers, and what sequential decoding may add."""

    name: str = "sequential"
    numbers: tuple[int, ...] = ()
    exit: Exit | None = None
    warm_start: bool = False

    @classmethod
    def parse(cls, sampler: str, exit: str | None = None, warm_start: bool = False) -> Method:
        """From words as in this module's text and `adaptive.Exit.parse`. Raises `UserError`."""
        name, *numbers = sampler.split(":")
        usual = SAMPLERS.get(name)
        if usual is None or len(numbers) > len(usual) or not all(re.fullmatch("[1-9][0-9]*", n) for n in numbers):
            raise UserError(
                "a sampler is sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or diagonal-unverified[:INNER],"
                f" not {sampler!r}"
            )
        if name != "sequential" and (exit is not None or warm_start):
            raise UserError(f"exits and warm starts are for the sequential sampler, not for {name}")
        given = tuple(map(int, numbers))
        return cls(name, given + usual[len(given) :], None if exit is None else Exit.parse(exit), warm_start)

    @property
    def plain(self) -> bool:
        """Whether it is `generate.Decoder`'s."""
        return self.name == "sequential" and self.exit is None and not self.warm_start

    def check(self, model: LoopedLM, cache_policy: str) -> None:
        """Raises `UserError` where the model or the cache policy does not go with it."""
        if self.plain:
            return
        plain_loop(model)
        if cache_policy != "full":
            raise UserError(
                f"the cache policy {cache_policy!r} is for plain sequential decoding: other samplers keep all iterations"
            )

    def rows(
        self,
        model: LoopedLM,
        prompts: Sequence[Sequence[int]],
        k: int,
        max_new_tokens: int,
        sampling: Sampling,
        rng: Rng,
        requests: Sequence[int],
        stats: Stats,
    ) -> LoopRows:
        """The sampler, of those that are not plain; arguments as of `LoopRows`."""
        arguments = model, prompts, k, max_new_tokens, sampling, rng, requests, stats
        if self.name == "sequential":
            return Adaptive(*arguments, exit=self.exit, warm_start=self.warm_start)
        if self.name == "speculative":
            return Speculative(*arguments, draft_k=self.numbers[0], block=self.numbers[1])
        inner = min(k, self.numbers[0] or max(2, -(-k // 8)))
        return Diagonal(*arguments, inner=inner, verified=self.name == "diagonal")
