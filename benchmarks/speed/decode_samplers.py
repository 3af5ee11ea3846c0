"""Samplers and exits of a checkpoint against sequential decoding at the same K: what `decode.py --run RUN` measures.

Prompts are held-out text. They take turns: each is continued by sequential decoding and by every other method, one after the
other, so that the machine's changes of speed meet all alike; a ratio is the median over prompts of sequential's time over
the method's for the same text length. Then so many texts together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from recurrent_db.data import open_data, validation_batches
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import stream
from recurrent_db.generation.loop_decoder import Stats
from recurrent_db.generation.samplers import SAMPLERS, Method
from recurrent_db.generation.sampling import Sampling
from recurrent_db.model import LoopedLM


@dataclass
class Way:
    """A method to measure: a sampler, or an exit of sequential decoding, with ``+warm`` from the previous token's state."""

    word: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of each prompt alone."""
    texts: list[list[int]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    rate_together: float = 0.0
    """Tokens per second of several texts together."""

    @classmethod
    def parse(cls, word: str) -> Way:
        """Raises `UserError` for a word that is neither a sampler nor an exit."""
        if word.split(":")[0] in SAMPLERS:
            options: dict[str, Any] = {"sampler": word}
        else:
            name, plus, warm = word.partition("+")
            if plus and warm != "warm":
                raise UserError(f"--methods: after a + there can only be warm, not {warm!r}")
            options = {"exit": name, "warm_start": bool(plus)}
        Method.parse(**{"sampler": "sequential", **options})
        return cls(word, options)


def prompts_of(data: str, tokenizer_hash: str, window: int, count: int, length: int) -> list[list[int]]:
    """The beginnings of held-out windows, spread evenly over the split."""
    held_out = open_data(data, "validation", expect_tokenizer_hash=tokenizer_hash)
    batches = validation_batches(held_out, window, count, count * window)
    prompts = [row[:length].tolist() for batch in batches for row in batch.tokens_BT][:count]
    if len(prompts) < count:
        raise UserError(f"{data} holds {len(prompts)} held-out windows of {window} tokens, fewer than {count}")
    return prompts


def compare(
    model: LoopedLM, prompts: Sequence[list[int]], alone: int, rows: int, ways: Sequence[Way], k: int, tokens: int,
    sampling: Sampling, now: Callable[[], float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Continue ``alone`` of the prompts by themselves, then ``rows`` together, by sequential decoding and all ``ways``."""
    ways = [Way("sequential", {"sampler": "sequential"}), *ways]

    def timed(way: Way, chosen: Sequence[int], count: int, stats: Stats) -> tuple[float, list[list[int]]]:
        texts: list[list[int]] = [[] for _ in chosen]
        start = now()
        for index, token in stream(
            model, [prompts[number] for number in chosen], k, count, sampling, 0, chosen, stats=stats, **way.options
        ):
            texts[index].append(token)
        return now() - start, texts

    for way in ways:
        timed(way, [0], 2, Stats())
    for prompt in range(alone):
        for way in ways:
            seconds, [text] = timed(way, [prompt], tokens, way.stats)
            way.seconds.append(seconds)
            way.texts.append(text)
    for way in ways:
        seconds, texts = timed(way, range(rows), tokens, Stats())
        way.rate_together = sum(map(len, texts)) / seconds
    first = ways[0]
    return [_row(way, first, rows) for way in ways]


def _row(way: Way, first: Way, rows: int) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(first.seconds, way.seconds, strict=True)]
    pairs = list(zip(first.texts, way.texts, strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    return {
        "method": way.word, "tokens_per_s": sum(map(len, way.texts)) / sum(way.seconds),
        "ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios),
        "acceptance": way.stats.acceptance, "tokens_per_step": way.stats.tokens_per_step, "mean_k": way.stats.mean_k,
        "identical": sum(a == b for a, b in pairs), "texts": len(pairs),
        "share_before_difference": sum(same) / sum(len(a) for a, _ in pairs),
        "rows": rows, "tokens_per_s_of_rows": way.rate_together,
        "ratio_of_rows": way.rate_together / first.rate_together,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, to be read."""
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
