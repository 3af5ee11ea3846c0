"""Models of every kind of inference, run with a cache and without: what the tests of the cache share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers import micro_config, micro_model
from torch import Tensor

from recurrent_db.generation.cache import Cache
from recurrent_db.model import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

KS = (1, 3, 6)
LENGTH, PAGE = 15, 8  # pages of noise shorter than the text, so that chunks cross their borders


def denoise(*options: str) -> list[str]:
    return ["denoise", *(f"--objective.denoise.{o}" if i % 2 == 0 else o for i, o in enumerate(options))]


KINDS = [
    ["next_token"],
    ["unrolled"],
    ["unrolled", "--model.injection", "diagonal"],
    [
        "unrolled",
        *(f"--model.{w}" for w in ("layer=llama", "n_kv_heads=1", "head_size=6", "qk_norm=true", "tied=false")),
    ],
    ["unrolled", *(f"--model.{w}" for w in ("layer=neox", "rope_size=4"))],
    ["denoise_paper"],
    *(denoise("bridge", bridge) for bridge in ("soft", "hard", "sample", "state")),
    *(denoise("sampler", sampler) for sampler in ("heun", "ancestral")),
    *(denoise("grid", grid) for grid in ("karras", "log-uniform")),
    denoise("conditioning", "two-stream"),
    denoise("conditioning", "two-stream", "sampler", "heun", "bridge", "sample"),
]


def kind_id(options: list[str]) -> str:
    return "-".join(o for o in options if not o.startswith("--"))


def built(options: Sequence[str], dtype: torch.dtype = torch.float64) -> LoopedLM:
    """A model whose iterations do not drive neighbouring states apart, as a spread of 0.3 does: rounding stays small."""
    config = micro_config("--objective.name", *options, "--model.n_core", "2", "--model.n_coda", "2")
    return micro_model(config, spread=0.1)[0].to(dtype)


def text(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(5))


def noise_of(requests: Sequence[int], offset: int | tuple[int, ...] = 0, draw: int = 0) -> NoiseSource:
    return NoiseSource(Rng(0, EVALUATION_STEP), torch.tensor(requests), PAGE, draw, offset)


@torch.no_grad()
def recomputed(
    model: LoopedLM, tokens: Tensor, ks: Sequence[int], requests: Sequence[int] = (7, 8)
) -> dict[int, Tensor]:
    """Logits by K, without a cache."""
    hidden = model.recurrence.hidden(model, tokens, model.encode(tokens), ks, noise_of(requests))
    return {k: model.logits(hidden_BTD) for k, hidden_BTD in hidden}


@torch.no_grad()
def cached(
    model: LoopedLM, cache: Cache, tokens: Tensor, ks: Sequence[int], requests: Sequence[int] = (7, 8), draws: int = 1
) -> list[dict[int, Tensor]]:
    """Logits of tokens that follow what the cache holds: by K, for each noise draw."""
    offset = cache.offset
    visible = cache.grow(tokens.shape[1])
    e = model.encode(tokens, visible)
    each = []
    for draw in range(draws):
        hidden = model.recurrence.hidden(model, tokens, e, ks, noise_of(requests, offset, draw), visible=visible)
        each.append({k: model.logits(hidden_BTD) for k, hidden_BTD in hidden})
    return each


def in_chunks(
    model: LoopedLM, cache: Cache, tokens: Tensor, chunks: Sequence[int], ks: Sequence[int]
) -> dict[int, Tensor]:
    parts = [cached(model, cache, part, ks)[0] for part in tokens.split(list(chunks), dim=1)]
    return {k: torch.cat([part[k] for part in parts], dim=1) for k in ks}
