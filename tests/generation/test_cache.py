"""The cache against recomputation: every objective's inference, in chunks, padded, copied and cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from helpers import micro_config, micro_model
from torch import Tensor, nn

from recurrent_db.accounting.flops import cache_numbers_per_token
from recurrent_db.commands import flops
from recurrent_db.errors import UserError
from recurrent_db.generation.cache import Cache
from recurrent_db.model import LoopedLM
from recurrent_db.model.attention import Rule, Visible
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

KS = (1, 4, 16)
LENGTH, PAGE = 21, 8  # pages of noise shorter than the text, so that chunks cross their borders


def denoise(*options: str) -> list[str]:
    return ["denoise", *(f"--objective.denoise.{o}" if i % 2 == 0 else o for i, o in enumerate(options))]


KINDS = [
    ["next_token"],
    ["unrolled"],
    ["unrolled", "--model.injection", "diagonal"],
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


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
def test_prefill_and_decode_equal_recomputation(options: list[str]) -> None:
    """At every position and each K: a prefill, then token by token; chunks of all lengths; all three K in one pass."""
    model, tokens = built(options), text()
    together = recomputed(model, tokens, KS)
    for k in KS:
        expected = recomputed(model, tokens, [k])[k]
        torch.testing.assert_close(together[k], expected, rtol=0, atol=1e-9)
        ours = in_chunks(model, Cache(model, 2, LENGTH), tokens, [9, *[1] * 12], [k])[k]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    ours_by_k = in_chunks(model, Cache(model, 2, 32), tokens, [1, 1, 7, 2, 10], KS)
    for k in KS:
        torch.testing.assert_close(ours_by_k[k], together[k], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [["unrolled"], denoise("bridge", "soft"), denoise("conditioning", "two-stream")],
                         ids=kind_id)  # fmt: skip
def test_single_precision_differs_by_its_rounding(options: list[str]) -> None:
    """The cache's distance from float64 is that of recomputing in fp32, but for a factor of four."""
    tokens = text()
    exact = recomputed(built(options), tokens, KS)
    model = built(options, torch.float32)
    for k in KS:
        ours = in_chunks(model, Cache(model, 2, LENGTH), tokens, [9, *[1] * 12], [k])[k]
        rounding = (recomputed(model, tokens, [k])[k] - exact[k]).abs().max()
        assert 0 < rounding < 0.05
        assert (ours - exact[k]).abs().max() < 4 * rounding


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
def test_padded_rows_equal_single_ones(options: list[str]) -> None:
    """A prefill of prompts of different length, then tokens one at a time; what the padding holds changes nothing."""
    model, tokens, k = built(options), text(3, 12), 4
    lengths, requests = [3, 7, 1], [4, 5, 6]
    rows = [
        recomputed(model, torch.cat((row[:n], row[7:]))[None], [k], [request])[k][0]
        for row, n, request in zip(tokens, lengths, requests, strict=True)
    ]
    for filler in (0, 60):
        prompts = torch.stack(
            [torch.cat((torch.full((7 - n,), filler), row[:n])) for row, n in zip(tokens, lengths, strict=True)]
        )
        cache = Cache(model, 3, 12, padding=[7 - n for n in lengths])
        [first] = cached(model, cache, prompts, [k], requests)
        parts = [first[k], *(cached(model, cache, tokens[:, i : i + 1], [k], requests)[0][k] for i in range(7, 12))]
        logits = torch.cat(parts, dim=1)
        assert torch.isfinite(logits).all()
        for row, (n, expected) in enumerate(zip(lengths, rows, strict=True)):
            torch.testing.assert_close(logits[row, 7 - n :], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
def test_one_prefix_for_many_rows(options: list[str]) -> None:
    """Continuations of different length, padded on the right, from one prefix that was run once; with two draws."""
    model, prefix, k = built(options), text(1, 9), 4
    continuations, lengths = text(4, 5), [5, 1, 3, 4]
    cache = Cache(model, 1, 9)
    cached(model, cache, prefix, [k], [7], draws=2)
    ours = cached(model, cache.take([0] * 4, capacity=14), continuations, [k], [7] * 4, draws=2)
    for row, length in enumerate(lengths):
        whole = torch.cat((prefix[0], continuations[row, :length]))[None]
        for draw in range(2):
            with torch.no_grad():
                noise = noise_of([7], draw=draw)
                [(_, hidden)] = model.recurrence.hidden(model, whole, model.encode(whole), [k], noise)
                expected = model.logits(hidden)[0, 9:]
            torch.testing.assert_close(ours[draw][k][row, :length], expected, rtol=0, atol=1e-9)
    assert cache.length == 9  # and the prefix itself is as it was
    again = cached(model, cache.take([0], capacity=14), continuations[:1], [k], [7], draws=2)
    torch.testing.assert_close(again[1][k], ours[1][k][:1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
def test_cut_back_and_continued(options: list[str]) -> None:
    model, tokens, k = built(options), text(), 4
    cache = Cache(model, 2, LENGTH)
    cached(model, cache, tokens[:, :6], [k])
    other = text(2, 30)[:, 15:]
    for length in (3, 6, 0):  # other tokens are tried after the prefix, and forgotten
        cache.truncate(length)
        tried = torch.cat((tokens[:, :length], other), dim=1)
        ours = cached(model, cache, other, [k])[0][k]
        torch.testing.assert_close(ours, recomputed(model, tried, [k])[k][:, length:], rtol=0, atol=1e-9)
        cache.truncate(0)
        ours = in_chunks(model, cache, tokens[:, :8], [5, 3], [k])[k]
        torch.testing.assert_close(ours, recomputed(model, tokens[:, :8], [k])[k], rtol=0, atol=1e-9)


def test_rows_are_taken_in_any_order_padding_and_all() -> None:
    model, k = built(["unrolled"]), 2
    tokens = text(3, 6)
    cache = Cache(model, 3, 8, padding=[0, 2, 4])
    cached(model, cache, tokens[:, :5], [k], [1, 2, 3])
    whole = cached(model, cache.take([0, 1, 2]), tokens[:, 5:], [k], [1, 2, 3])[0][k]
    for rows, length in (([2, 0], 5), ([2, 1], 3), ([2], 1)):  # padding that all have is dropped
        taken = cache.take(rows)
        assert taken.length == length
        picked = cached(model, taken, tokens[rows, 5:], [k], [r + 1 for r in rows])[0][k]
        torch.testing.assert_close(picked, whole[rows], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("policy", ["full", "modulo-2", "last"])
def test_bytes(options: list[str], k: int, policy: str) -> None:
    """Two vectors for each layer and visit."""
    model, rows, capacity = built(options, torch.float32), 2, 10
    cache = Cache(model, rows, capacity, policy=policy)
    cached(model, cache, text(2, 4), [k])
    passes = model.recurrence.passes(k)
    assert cache.bytes == rows * capacity * 4 * cache_numbers_per_token(model.config, passes, policy)


def test_the_printed_bytes_are_a_caches() -> None:
    """`recurrent-db flops` against caches of that model."""
    for name, objective in (("unrolled", "unrolled"), ("denoise", "denoise")):
        config = micro_config("--objective.name", objective)
        model = micro_model(config)[0].bfloat16()
        for policy, by_name in flops.table(config, 3.0, 2)["cache_bytes_per_token_by_policy"].items():
            for k in (1, 8):
                cache = Cache(model, 1, 5, policy=policy)
                cached(model, cache, text(1, 5), [k], [0])
                assert cache.bytes == 5 * by_name[name][str(k)]


class BruteForce:
    """The policies as they are defined: every visit of every position is kept, and the keys that a visit sees are picked
    from them, position by position. `model.attention.Past`."""

    again = 0

    def __init__(self, model: LoopedLM, modulus: int) -> None:
        self.model, self.modulus, self.first = model, modulus, 0
        self.made: dict[tuple[nn.Module, int], list[tuple[Tensor, Tensor]]] = {}

    def visible(self, count: int) -> Visible:
        self.first, self.stop = getattr(self, "stop", 0), getattr(self, "stop", 0) + count
        cos, sin = self.model.rope(self.stop)
        self.rope, self.visits = (cos[self.first :], sin[self.first :]), Counter[nn.Module]()
        return self.model.served(Rule(count, self.stop), self)

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        visit = self.visits[layer]
        self.visits[layer] += 1
        seen = []
        for position in range(self.first):
            same = [n for n in range(len(self.made[layer, position])) if n % self.modulus == visit % self.modulus]
            seen.append(self.made[layer, position][max(same)])
        for index in range(k_BHTE.shape[2]):
            own = k_BHTE[:, :, index], v_BHTE[:, :, index]
            self.made.setdefault((layer, self.first + index), []).append(own)
            seen.append(own)
        return torch.stack([k for k, _ in seen], dim=2), torch.stack([v for _, v in seen], dim=2)

    def once_more(self, visible: Visible, e_BTD: Tensor) -> tuple[Visible, Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
@pytest.mark.parametrize("k", KS)
@torch.no_grad()
def test_policies_against_their_definition(options: list[str], k: int) -> None:
    model, tokens = built(options), text(2, 12)
    whole, passes = recomputed(model, tokens, [k])[k], model.recurrence.passes(k)
    most = max(passes.clean_no_grad or passes.core_no_grad, passes.readouts_no_grad)
    for policy, modulus in (("last", 1), ("modulo-3", 3), ("modulo-16", 16)):
        cache, past = Cache(model, 2, 12, policy=policy), BruteForce(model, modulus)
        parts = []
        for part in tokens.split([5, 1, 2, 1, 1, 1, 1], dim=1):
            noise, visible = noise_of((7, 8), past.first if not parts else past.stop), past.visible(part.shape[1])
            e = model.encode(part, visible)
            [(_, hidden)] = model.recurrence.hidden(model, part, e, [k], noise, visible=visible)
            parts.append(model.logits(hidden))
        expected = torch.cat(parts, dim=1)
        ours = in_chunks(model, cache, tokens, [5, 1, 2, 1, 1, 1, 1], [k])[k]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
        assert ((ours - whole).abs().max() > 1e-9) == (most > modulus)
        torch.testing.assert_close(ours[:, :5], whole[:, :5], rtol=0, atol=1e-9)


def test_a_policy_that_is_none() -> None:
    for word in ("modulo-0", "modulo", "first"):
        with pytest.raises(UserError, match="a cache policy is full, last or modulo-S"):
            Cache(built(["next_token"]), 1, 1, policy=word)


def test_slots_are_named_by_layer_and_visit() -> None:
    model = built(["unrolled"])
    cache = Cache(model, 1, 4)
    cached(model, cache, text(1, 2), [1, 3], [0])
    visits: dict[str, int] = {}
    for name, visit in cache.slots:
        visits[name] = max(visits.get(name, 0), visit + 1)
    assert visits == {
        "prelude.0.attn": 1, "core.blocks.0.attn": 3, "core.blocks.1.attn": 3, "coda.0.attn": 2, "coda.1.attn": 2,
    }  # fmt: skip


def test_misuse() -> None:
    model = built(["unrolled"])
    cache = Cache(model, 1, 4)
    with pytest.raises(ValueError, match="is for inference only"):
        model.encode(text(1, 2), cache.grow(2))
    with pytest.raises(ValueError, match="exceed the cache's capacity of 4"):
        cache.grow(3)
    assert cache.length == 2
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="exceed the new cache's capacity"):
        cache.take([0], capacity=1)
    with pytest.raises(ValueError, match="got 1"):
        Cache(model, 2, 4, padding=[1])
