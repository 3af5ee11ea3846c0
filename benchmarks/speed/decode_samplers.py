"""Compares samplers and exits of a checkpoint with sequential decoding at the same K, for `decode.py --run RUN`.

Prompts are held-out text. All candidates continue each prompt in turn, so that changes of the machine's speed affect all
alike. A ratio is sequential decoding's time divided by the candidate's, for the same text length; the median over prompts is
reported. At the end several texts are continued together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recurrent_db.data import open_data, validation_batches
from recurrent_db.errors import UserError
from recurrent_db.generation.decoder import DecodingStats
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import SAMPLERS, GenerationOptions
from recurrent_db.model import LoopedLM


@dataclass
class Candidate:
    """A measured method: a sampler, or sequential decoding with an exit and perhaps a warm start."""

    name: str
    options: GenerationOptions
    seconds: list[float] = field(default_factory=list)
    """Time for each prompt."""
    texts: list[list[int]] = field(default_factory=list)
    stats: DecodingStats = field(default_factory=DecodingStats)
    rate_together: float = 0.0
    """Tokens per second when several texts are continued together."""

    @classmethod
    def parse(cls, word: str, options: GenerationOptions) -> Candidate:
        """Parse the name of a sampler, or of an exit with an optional ``+warm``. Raises `UserError` for other words."""
        if word.split(":")[0] in SAMPLERS:
            return cls(word, replace(options, sampler=word))
        name, plus, warm = word.partition("+")
        if plus and warm != "warm":
            raise UserError(f"--methods: only warm can follow a +, got {warm!r}")
        return cls(word, replace(options, exit=name, warm_start=bool(plus)))


def prompts_of(data: str, tokenizer_hash: str, window: int, count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out windows, spread evenly over the split."""
    held_out = open_data(data, "validation", expect_tokenizer_hash=tokenizer_hash)
    batches = validation_batches(held_out, window, count, count * window)
    prompts = [row[:length].tolist() for batch in batches for row in batch.tokens_BT][:count]
    if len(prompts) < count:
        raise UserError(f"{data} holds {len(prompts)} held-out windows of {window} tokens, fewer than {count}")
    return prompts


def compare(
    model: LoopedLM,
    prompts: Sequence[list[int]],
    alone: int,
    together: int,
    candidates: Sequence[Candidate],
    options: GenerationOptions,
    now: Callable[[], float],
) -> list[dict[str, Any]]:
    """Continue ``alone`` prompts one by one, then ``together`` prompts at once, with sequential decoding and all others."""
    candidates = [Candidate("sequential", options), *candidates]

    def timed(
        candidate: Candidate, chosen: Sequence[int], tokens: int, stats: DecodingStats
    ) -> tuple[float, list[list[int]]]:
        texts: list[list[int]] = [[] for _ in chosen]
        limited = replace(candidate.options, max_new_tokens=tokens)
        start = now()
        for index, token in stream(model, [prompts[number] for number in chosen], limited, chosen, stats=stats):
            texts[index].append(token)
        return now() - start, texts

    for candidate in candidates:
        timed(candidate, [0], 2, DecodingStats())
    for prompt in range(alone):
        for candidate in candidates:
            seconds, [text] = timed(candidate, [prompt], options.max_new_tokens, candidate.stats)
            candidate.seconds.append(seconds)
            candidate.texts.append(text)
    for candidate in candidates:
        seconds, texts = timed(candidate, range(together), options.max_new_tokens, DecodingStats())
        candidate.rate_together = sum(map(len, texts)) / seconds
    return [_row(candidate, candidates[0], together) for candidate in candidates]


def _row(candidate: Candidate, first: Candidate, together: int) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(first.seconds, candidate.seconds, strict=True)]
    pairs = list(zip(first.texts, candidate.texts, strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    return {
        "method": candidate.name, "tokens_per_s": sum(map(len, candidate.texts)) / sum(candidate.seconds),
        "ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
        "acceptance": candidate.stats.acceptance, "tokens_per_step": candidate.stats.tokens_per_step,
        "mean_k": candidate.stats.mean_k,
        "identical": sum(a == b for a, b in pairs), "texts": len(pairs),
        "share_before_difference": sum(same) / sum(len(a) for a, _ in pairs),
        "rows": together, "tokens_per_s_of_rows": candidate.rate_together,
        "ratio_of_rows": candidate.rate_together / first.rate_together,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a printed table."""
    together = f"{rows[0]['rows']} texts, tokens/s"
    lines = [
        f"{'':<24}{'tokens/s':>10}{'ratio':>8}{'(least, most)':>16}{'acceptance':>12}{'tokens/step':>13}{'mean K':>8}"
        f"{'identical':>11}{'same until':>12}{together:>22}{'ratio':>8}"
    ]
    for row in rows:
        spread = f"({row['ratio_least']:.2f}, {row['ratio_most']:.2f})"
        acceptance = f"{row['acceptance']:.3f}" if row["acceptance"] == row["acceptance"] else ""
        lines.append(
            f"{row['method']:<24}{row['tokens_per_s']:>10.1f}{row['ratio']:>8.2f}{spread:>16}{acceptance:>12}"
            f"{row['tokens_per_step']:>13.2f}{row['mean_k']:>8.2f}{row['identical']:>7} of {row['texts']}"
            f"{row['share_before_difference']:>11.0%}{row['tokens_per_s_of_rows']:>22.1f}{row['ratio_of_rows']:>8.2f}"
        )
    return "\n".join(lines)
