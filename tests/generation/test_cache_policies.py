"""The cache's policies against their definition, and its size in bytes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cache_cases import KINDS, KS, built, cached, in_chunks, kind_id, noise_of, recomputed, text
from helpers import micro_config, micro_model
from torch import Tensor, nn

from recurrent_db.accounting.flops import cache_numbers_per_token
from recurrent_db.commands import flops
from recurrent_db.errors import UserError
from recurrent_db.generation.cache import Cache
from recurrent_db.model import LoopedLM
from recurrent_db.model.attention import Rule, Visible


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
    model, tokens = built(options), text(2, 9)
    whole, passes = recomputed(model, tokens, [k])[k], model.recurrence.passes(k)
    most = max(passes.clean_no_grad or passes.core_no_grad, passes.readouts_no_grad)
    for policy, modulus in (("last", 1), ("modulo-3", 3), ("modulo-8", 8)):
        cache, past = Cache(model, 2, 9, policy=policy), BruteForce(model, modulus)
        parts = []
        for part in tokens.split([5, 1, 2, 1], dim=1):
            noise, visible = noise_of((7, 8), past.first if not parts else past.stop), past.visible(part.shape[1])
            e = model.encode(part, visible)
            [(_, hidden)] = model.recurrence.hidden(model, part, e, [k], noise, visible=visible)
            parts.append(model.logits(hidden))
        expected = torch.cat(parts, dim=1)
        ours = in_chunks(model, cache, tokens, [5, 1, 2, 1], [k])[k]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
        assert ((ours - whole).abs().max() > 1e-9) == (most > modulus)
        torch.testing.assert_close(ours[:, :5], whole[:, :5], rtol=0, atol=1e-9)


def test_a_policy_that_is_none() -> None:
    for word in ("modulo-0", "modulo", "first", "modulo-" + "9" * 5000):
        with pytest.raises(UserError, match="the cache policy must be full, last or modulo-S"):
            Cache(built(["next_token"]), 1, 1, policy=word)
