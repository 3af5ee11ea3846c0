"""The cache against recomputation: every objective's inference, in chunks, padded, copied and cut."""

from __future__ import annotations

import pytest
import torch
from cache_cases import KINDS, KS, LENGTH, built, cached, denoise, in_chunks, kind_id, noise_of, recomputed, text

from recurrent_db.generation.cache import Cache

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("options", KINDS, ids=kind_id)
def test_prefill_and_decode_equal_recomputation(options: list[str]) -> None:
    """At every position and each K: a prefill, then token by token; chunks of all lengths; all three K in one pass."""
    model, tokens = built(options), text()
    together = recomputed(model, tokens, KS)
    for k in KS:
        expected = recomputed(model, tokens, [k])[k]
        torch.testing.assert_close(together[k], expected, rtol=0, atol=1e-9)
        ours = in_chunks(model, Cache(model, 2, LENGTH), tokens, [9, *[1] * 6], [k])[k]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    ours_by_k = in_chunks(model, Cache(model, 2, 32), tokens, [1, 1, 7, 2, 4], KS)
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
        ours = in_chunks(model, Cache(model, 2, LENGTH), tokens, [9, *[1] * 6], [k])[k]
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
    other = text(2, 24)[:, LENGTH:]
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
