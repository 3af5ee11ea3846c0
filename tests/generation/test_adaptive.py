"""Adaptive depth and warm starts against their uncached definition, and rows together against rows alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import micro_config, micro_model
from torch import Tensor, nn

from recurrent_db import UserError, generate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.generation import decoder
from recurrent_db.generation.adaptive import settled
from recurrent_db.generation.decoder import DecodingStats, EndsText, never
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import THRESHOLDS, Exit, GenerationOptions
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.attention import SDPA, Rule, Visible
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng

WINDOW, K = 32, 7  # of the models here
EXITS = ["kl:0.005", "entropy:0.02", "latent:0.15"]
"""Thresholds at which depths vary for models that were never trained."""


def built(objective: str = "unrolled") -> LoopedLM:
    return micro_model(micro_config("--objective.name", objective, "--model.n_core", "2"), spread=0.1)[0]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


class Held:
    """`model.attention.Past` of a whole context at once: from each position's depth on, it shows what its last iteration
    made."""

    again = 0

    def __init__(self, model: LoopedLM, depths: Sequence[int]) -> None:
        self.rope, self.depths_T1 = model.rope(len(depths)), torch.tensor(depths)[:, None]
        self.visits: Counter[nn.Module] = Counter()
        self.last: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        rule = Rule(len(depths), len(depths))
        self.visible = Visible(rule, torch.device("cpu"), torch.float64, SDPA, SDPA, None, past=self)

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        runs = self.depths_T1 > self.visits[layer]
        if layer in self.last:
            k_last, v_last = self.last[layer]
            k_BHTE, v_BHTE = torch.where(runs, k_BHTE, k_last), torch.where(runs, v_BHTE, v_last)
        self.visits[layer] += 1
        self.last[layer] = k_BHTE, v_BHTE
        return k_BHTE, v_BHTE

    def once_more(self, visible: Visible, e_BTD: Tensor) -> tuple[Visible, Tensor]:
        raise NotImplementedError


def near_enough(word: str, old: Tensor, new: Tensor) -> bool:
    """The criteria once more, for two vectors of logits or states."""
    name, _, threshold = word.partition(":")
    if name == "latent":
        return bool((new - old).square().sum().sqrt() / new.square().sum().sqrt() < float(threshold))
    p, q = new.softmax(-1), old.softmax(-1)
    if name == "kl":
        return bool((p * (p / q).log()).sum() < float(threshold))
    return abs((q * q.log()).sum() - (p * p.log()).sum()).item() < float(threshold)


@torch.no_grad()
def defined(
    model: LoopedLM, prompt: list[int], exit: str | None, warm: bool, count: int
) -> tuple[list[int], list[int], list[Tensor]]:
    """Greedy tokens, the depths that they were read at and their logits, with everything run anew for each token."""
    noise = NoiseSource(Rng(1, EVALUATION_STEP), torch.tensor([0]), WINDOW)
    like = torch.empty(1, len(prompt) + count, 32, dtype=torch.float64)
    colds = model.recurrence.start(like, noise)  # type: ignore[attr-defined]
    ids, first, together = list(prompt), max(0, len(prompt) - WINDOW), len(prompt) - 1
    depths: dict[int, int] = {}
    logits = []

    def states_of(context: list[int], at: list[int], starts: Tensor) -> list[Tensor]:
        past = Held(model, at)
        e, states = model.encode(torch.tensor([context]), past.visible), [starts]
        for _ in range(K):
            states.append(model.iterate(states[-1], e, visible=past.visible))
        return states

    def left_with(states: list[Tensor], at: list[int]) -> Tensor:
        return torch.stack([states[depth][:, place] for place, depth in enumerate(at)], dim=1)

    for _ in range(count):
        if len(ids) - first > WINDOW:  # what is read anew is read together
            first, together = first + WINDOW // 2, len(ids) - 1
        context = ids[first:]
        at = [K if place < together else depths.get(place, K) for place in range(first, len(ids))]
        starts = colds[:, first : len(ids)].clone()
        for place in range(max(1, together - first), len(context) if warm else 0):
            before = states_of(context[:place], at[:place], starts[:, :place])
            starts[:, place] = left_with(before, at[:place])[:, -1]
        states = states_of(context, at, starts)
        outs = [model.logits(model.decode(left_with(states, [*at[:-1], n])))[0, -1] for n in range(K + 1)]
        seen = [state[0, -1] for state in states] if (exit or "").startswith("latent") else outs
        depth = next((n for n in range(2, K + 1) if exit and near_enough(exit, seen[n - 1], seen[n])), K)
        depths[len(ids) - 1] = depth
        logits.append(outs[depth])
        ids.append(int(outs[depth].argmax()))
    return ids[len(prompt) :], list(depths.values()), logits


@pytest.mark.parametrize(
    ("exit", "warm"), [*((exit, False) for exit in EXITS), *((exit, True) for exit in EXITS), (None, True)]
)
@pytest.mark.parametrize("length", [1, 6, WINDOW - 2, WINDOW + 5])
def test_against_the_uncached_definition(
    exit: str | None, warm: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, depths, and logits within 1e-9 in float64; contexts that grow out of the window, too."""
    model, [prompt] = built(), prompts_of(length)
    stats, draw = DecodingStats(), decoder.draw
    recorded: list[Tensor] = []

    def recording(logits_V: Tensor, *rest: Any) -> int:
        recorded.append(logits_V)
        return draw(logits_V, *rest)

    monkeypatch.setattr(decoder, "draw", recording)
    options = GenerationOptions(k=K, max_new_tokens=7, temperature=0, seed=1, exit=exit, warm_start=warm)
    drawn = stream(model, [prompt], options, stats=stats)
    tokens, depths, logits = defined(model, prompt, exit, warm, 7)
    assert [token for _, token in drawn] == tokens
    assert stats.iterations == sum(depths)
    torch.testing.assert_close(torch.stack(recorded), torch.stack(logits), rtol=0, atol=1e-9)


def texts(
    model: LoopedLM,
    prompts: Sequence[list[int]],
    requests: Sequence[int] | None = None,
    ends_text: EndsText = never,
    stats: DecodingStats | None = None,
    **changes: Any,
) -> list[list[int]]:
    drawn: list[list[int]] = [[] for _ in prompts]
    options = GenerationOptions(k=K, max_new_tokens=20, seed=1, **changes)
    for index, token in stream(model, prompts, options, requests, ends_text, stats):
        drawn[index].append(token)
    return drawn


@pytest.mark.parametrize(("exit", "warm"), [*((exit, False) for exit in EXITS), (EXITS[0], True)])
def test_prompts_together_draw_what_each_draws_alone(exit: str, warm: bool) -> None:
    """Each row leaves its iterations by itself; texts end at different times and some grow out of the window."""
    model, prompts, together = built(), prompts_of(5, 1, 29, 32, 41, 14), DecodingStats()

    def ends_text(sequence: int, token: int) -> bool:
        return token % 16 == 3

    options = {"exit": exit, "warm_start": warm}
    expected = texts(model, prompts, range(100, 106), ends_text, together, **options)
    assert len(set(map(len, expected))) > 3
    alone = [DecodingStats() for _ in prompts]
    for number, prompt in enumerate(prompts):
        ours = texts(model, [prompt], [100 + number], ends_text, alone[number], **options)
        assert ours == [expected[number]]
    assert together.iterations == sum(stats.iterations for stats in alone)
    assert len({stats.mean_k for stats in alone}) > 3
    assert 2 < together.mean_k < K


@pytest.mark.parametrize("objective", ["next_token", "unrolled"])
def test_the_cap_and_the_least(objective: str) -> None:
    """An exit that never opens is plain decoding at K; one that always does takes the two iterations that it compares."""
    model, prompts = built(objective), prompts_of(3, 8)
    for name in THRESHOLDS:
        closed, opened = DecodingStats(), DecodingStats()
        assert texts(model, prompts, exit=f"{name}:0", stats=closed) == texts(model, prompts)
        texts(model, prompts, exit=f"{name}:1e9", stats=opened)
        assert (closed.mean_k, opened.mean_k) == (K, 2)


def test_criteria() -> None:
    old = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    new = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).log() + 3  # a constant does not matter
    kl = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    for threshold, expected in ((kl + 1e-6, [True, True]), (kl - 1e-6, [False, True])):
        assert settled(Exit("kl", threshold), old, new).tolist() == expected
    assert settled(Exit("entropy", 1e-6), old, new).tolist() == [True, True]
    assert settled(Exit("entropy", 0.09), old[:1], old[1:]).tolist() == [True]  # 1.0397 and 0.9503 nats
    assert settled(Exit("entropy", 0.089), old[:1], old[1:]).tolist() == [False]
    states = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])
    assert settled(Exit("latent", 0.51), *states).tolist() == [True]
    assert settled(Exit("latent", 0.49), *states).tolist() == [False]


def test_words() -> None:
    assert Exit.parse("kl") == Exit("kl", THRESHOLDS["kl"])
    assert Exit.parse("latent:1e-2") == Exit("latent", 0.01)
    for word in ("", "kl:", "kl:x", "kl:-1", "kl:nan", "kl:inf", "norm", "entropy:1:2"):
        with pytest.raises(UserError, match="exit must be kl, entropy or latent"):
            Exit.parse(word)
    for options in ({"exit": "kl"}, {"warm_start": True}):
        with pytest.raises(UserError, match="whose inference is a plain loop"):
            stream(built("denoise"), [[1]], GenerationOptions(**options))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="cache policy 'last' needs the sequential sampler"):
            GenerationOptions(cache_policy="last", **options)  # type: ignore[arg-type]


def test_text_with_an_exit(tokenizer: Tokenizer) -> None:
    config = micro_config("--objective.name", "unrolled")
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config.model, 0)
    model.recurrence = build_objective(config).recurrence
    stats = DecodingStats()
    text = generate(model, tokenizer, "def ", k=9, max_new_tokens=12, exit="latent:0.5", warm_start=True, stats=stats)
    assert isinstance(text, str)
    assert stats.positions == 12
    assert 2 <= stats.mean_k < 9
