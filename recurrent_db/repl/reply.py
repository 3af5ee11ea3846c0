"""A reply of the REPL: its text, shown while it is generated, and its speed, FLOPs and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from recurrent_db.accounting.flops import cache_numbers_per_token
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.samplers import make_decoder
from recurrent_db.model.looped import LoopedLM


def bytes_shown(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


@dataclass
class Reply:
    """A generated text with its options and measurements."""

    prompt: str
    prompt_ids: list[int]
    options: GenerationOptions
    ids: list[int] = field(default_factory=list)
    """Generated tokens."""
    ended: str = "length"
    """Why the text ended: ``length``, ``document`` (the model ended it) or ``stopped`` (Ctrl-C)."""
    text: str = ""
    first_seconds: float = 0.0
    """Time to the first token, in seconds."""
    seconds: float = 0.0
    """Total time, in seconds."""
    flops: float = 0.0
    cache_bytes: int = 0
    mean_k: float = float("nan")
    """Mean number of iterations per token; NaN without tokens."""
    acceptance: float | None = None
    """Share of drafted tokens that were accepted; None if nothing was drafted."""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; NaN if there is only one."""
        later = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / later if len(self.ids) > 1 and later > 0 else float("nan")

    def to_json(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in ("ended", "seconds", "flops", "cache_bytes", "acceptance")}
        figures["mean_k"] = self.mean_k if self.mean_k == self.mean_k else None
        return {
            "prompt": self.prompt, "text": self.text, **asdict(self.options), "tokens": len(self.ids), **figures,
        }  # fmt: skip


def check_memory(model: LoopedLM, prompt_tokens: int, options: GenerationOptions) -> None:
    """Refuse a cache larger than the machine's memory, because the system would kill the whole program.

    Raises:
        UserError: the cache does not fit; the message gives the needed and the installed memory.
    """
    weight = model.embedding.weight
    positions = min(model.config.max_seq_len, prompt_tokens + options.max_new_tokens)
    numbers = cache_numbers_per_token(model.config, model.recurrence.passes(options.k), options.cache_policy)
    needed = positions * numbers * weight.element_size()
    if weight.device.type == "cuda":
        memory = torch.cuda.mem_get_info(weight.device)[1]
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > memory:
        raise UserError(
            f"at k = {options.k} the cache of {positions} tokens needs {bytes_shown(needed)}, but the memory has only"
            f" {bytes_shown(memory)}: choose a lower /k, or /cache last"
        )


def make_reply(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompt: str,
    ids: list[int],
    options: GenerationOptions,
    show: Callable[[bytes], object],
) -> Reply:
    """Continue the prompt ``ids`` and call ``show`` with the bytes of each new token. Ctrl-C (KeyboardInterrupt) ends the
    text and keeps what was generated.

    Raises:
        UserError: the cache does not fit into memory.
    """
    check_memory(model, len(ids), options)
    reply, decoder = Reply(prompt, ids, options), make_decoder(model, [ids], options)

    def ends_text(_: int, token: int) -> bool:
        if token == tokenizer.eos_id:
            reply.ended = "document"
        return token == tokenizer.eos_id

    start = time.perf_counter()
    try:
        for _, token in decoder.stream(ends_text):
            reply.ids.append(token)
            reply.first_seconds = reply.first_seconds or time.perf_counter() - start
            show(tokenizer.decode_bytes([token]))
    except KeyboardInterrupt:
        reply.ended = "stopped"
    reply.seconds = time.perf_counter() - start
    reply.text = tokenizer.decode(reply.ids)
    reply.flops, reply.cache_bytes, stats = decoder.flops, decoder.cache_bytes, decoder.stats
    reply.mean_k, reply.acceptance = stats.mean_k, stats.acceptance if stats.drafted else None
    return reply
