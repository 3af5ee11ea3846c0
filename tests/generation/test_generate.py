"""Generation: tokens against recomputing everything, batches against single texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import OBJECTIVES, micro_config, micro_model
from torch._dynamo.testing import CompileCounter

from recurrent_db import UserError, generate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.evaluation.likelihood import token_log_probabilities
from recurrent_db.generation import sequential
from recurrent_db.generation.generate import Completion, complete, generate_texts, stream
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sampling import draw
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng


def fresh(objective: str, tokenizer: Tokenizer) -> LoopedLM:
    config = micro_config("--objective.name", objective)
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config.model, 0)
    model.recurrence = build_objective(config).recurrence
    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_seed_gives_the_same_text(objective: str, tokenizer: Tokenizer) -> None:
    model = fresh(objective, tokenizer)
    first, again, other = (generate(model, tokenizer, "def ", k=2, max_new_tokens=12, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_empty_prompts_and_texts(tokenizer: Tokenizer) -> None:
    model = fresh("denoise", tokenizer)
    assert isinstance(generate(model, tokenizer, "", k=1, max_new_tokens=3), str)
    assert generate(model, tokenizer, "a", k=1, max_new_tokens=0) == ""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_are_drawn_from_the_scored_distribution(objective: str) -> None:
    """First tokens over many requests follow the mean of the scored probabilities (chi-squared, 1,500 draws)."""
    from scipy.stats import chi2

    model, _ = micro_model(micro_config("--objective.name", objective), vocab_size=5, spread=0.2)
    model = model.float()
    prompt, n = [1, 2, 3], 1500
    drawn = torch.tensor([token for _, token in stream(model, [prompt] * n, GenerationOptions(k=2, max_new_tokens=1))])
    counts = torch.bincount(drawn, minlength=5).double()
    inputs = torch.tensor([prompt]).expand(n, -1)
    rng, requests = Rng(0, EVALUATION_STEP), torch.arange(n)
    expected = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for token in range(5):
            targets = torch.full((n, 3), token)
            log_p = token_log_probabilities(model, inputs, targets, [2], rng, requests)[2][:, -1]
            expected[token] = log_p.double().exp().sum()
    assert expected.sum().item() == pytest.approx(n, rel=1e-4)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(1 - 1e-4, df=4)


def test_a_stop_token_ends_the_text() -> None:
    model, _ = micro_model(micro_config("--objective.name", "next_token"), vocab_size=5)
    for seed in range(30):
        options = GenerationOptions(k=1, max_new_tokens=20, seed=seed)
        whole = [token for _, token in stream(model, [[1]], options)]
        cut = [token for _, token in stream(model, [[1]], options, ends_text=lambda _, token: token == 2)]
        assert cut == (whole[: whole.index(2)] if 2 in whole else whole)


WINDOW = 32  # of the models here
KINDS = [
    ["next_token"],
    ["unrolled"],
    ["denoise"],
    ["denoise", "--objective.denoise.sampler", "ancestral"],
    ["denoise", "--objective.denoise.conditioning", "two-stream", "--objective.denoise.bridge", "sample"],
]


def small(options: Sequence[str], dtype: torch.dtype = torch.float64) -> LoopedLM:
    return micro_model(micro_config("--objective.name", *options), spread=0.1)[0].to(dtype)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def recomputed(model: LoopedLM, prompt: list[int], options: GenerationOptions, request: int) -> list[int]:
    """The definition: each token from its whole context, read anew."""
    rng, ids, first = Rng(options.seed, EVALUATION_STEP), list(prompt), max(0, len(prompt) - WINDOW)
    for _ in range(options.max_new_tokens):
        if len(ids) - first > WINDOW:
            first += WINDOW // 2
        tokens = torch.tensor([ids[first:]])
        noise = NoiseSource(rng, torch.tensor([request]), WINDOW, offset=first)
        [(_, hidden)] = model.recurrence.hidden(model, tokens, model.encode(tokens), [options.k], noise)
        u = rng.uniform([request], (1,), f"token/{len(ids)}").item()
        ids.append(draw(model.logits(hidden[0, -1]), options, ids, u))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[-1])
@pytest.mark.parametrize(
    ("length", "count"),
    [(5, 20), (1, 3), (WINDOW - 3, 8), (WINDOW, 2), (WINDOW + 9, 40)],
    ids=["short", "one token", "grows out of the window", "a window", "long and far out of it"],
)
def test_tokens_equal_those_of_recomputing_everything(kind: list[str], length: int, count: int) -> None:
    model, [prompt] = small(kind), prompts_of(length)
    greedy = GenerationOptions(k=3, max_new_tokens=count, seed=1, temperature=0)
    for options in (greedy, greedy.changed(temperature=0.9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)):
        ours = [token for _, token in stream(model, [prompt], options, requests=[4])]
        assert ours == recomputed(model, prompt, options, 4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[-1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sixteen_together_draw_what_each_draws_alone(
    kind: list[str], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different length, texts that end at different times, some grow out of the window; read in parts, too."""
    model = small(kind, torch.float32)
    options = GenerationOptions(k=3, max_new_tokens=30, temperature=temperature, seed=2)
    prompts = prompts_of(*range(1, 28, 3), 30, 31, 31, 32, 40, 7, 2)
    assert len(prompts) == 16
    requests = [100 + number for number in range(16)]
    count = [0] * 16

    def ends_text(sequence: int, token: int) -> bool:
        count[sequence] += 1
        return token in (3, 7) or count[sequence] > 3 + 2 * sequence

    together: list[list[int]] = [[] for _ in prompts]
    for index, token in stream(model, prompts, options, requests, ends_text):
        together[index].append(token)
    assert len({len(tokens) for tokens in together}) > 5
    monkeypatch.setattr(sequential, "_LOGITS_AT_ONCE", 5 * 61)
    for number, prompt in enumerate(prompts):
        count[number] = 0
        ends_this = lambda _, token, number=number: ends_text(number, token)  # noqa: E731
        alone = stream(model, [prompt], options, [requests[number]], ends_this)
        assert [token for _, token in alone] == together[number], number


def test_a_model_can_be_trained_after_it_has_generated() -> None:
    model = small(["denoise"])
    assert len(list(stream(model, [[1, 2]], GenerationOptions(k=2, max_new_tokens=3)))) == 3
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.embedding.weight.grad is not None


def test_generation_under_a_cache_policy(tokenizer: Tokenizer) -> None:
    """`last` and `modulo-2` at K = 2 differ as they should; the policies' definition: test_cache.py."""
    model = fresh("unrolled", tokenizer)
    full, both, last = (
        generate(model, tokenizer, "def ", k=2, max_new_tokens=24, cache_policy=policy)
        for policy in ("full", "modulo-2", "last")
    )
    assert full == both
    assert full != last
    with pytest.raises(UserError, match="the cache policy must be"):
        generate(model, tokenizer, "def ", cache_policy="some")


def test_texts_together_are_the_texts_alone(tokenizer: Tokenizer) -> None:
    model = fresh("unrolled", tokenizer)
    prompts = ["import os", "", "x = [", "def f(a, b):\n    return"]
    options = GenerationOptions(k=2, max_new_tokens=8, seed=3)
    together = generate_texts(model, tokenizer, prompts, options)
    assert together[0] == generate(model, tokenizer, prompts[0], options)
    done: list[int] = []
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    again = complete(model, tokenizer, ids, options, batch_size=3, progress=done.append)
    assert [str(text) for text in again] == together
    assert done == [3, 1]
    assert together[1] != generate(model, tokenizer, prompts[1], options)  # other draws


def test_stop_strings_across_tokens_and_characters(tokenizer: Tokenizer) -> None:
    whole = "one two\nthree \u65e5\u672c\u8a9e four\n\n\nfive"
    ids = tokenizer.encode(whole)

    def cut(*stops: str) -> str:
        text = Completion(tokenizer, stops)
        read = next((n for n, token in enumerate(ids, start=1) if text.add(token)), len(ids))
        assert text.ids == ids[:read]
        return str(text)

    assert cut() == whole
    for start in range(len(whole)):
        for end in range(start + 1, min(len(whole), start + 8) + 1):
            stop = whole[start:end]
            assert cut(stop, "not there") == whole[: whole.index(stop)]
    assert cut("four", "three", "e \u65e5") == "one two\n"
    assert cut("") == whole
    text = Completion(tokenizer)
    assert [text.add(token) for token in (*ids[:2], tokenizer.eos_id)] == [False, False, True]
    assert str(text) == tokenizer.decode(ids[:2])


def test_generation_stops_at_a_string(tokenizer: Tokenizer) -> None:
    model = fresh("next_token", tokenizer)
    whole = generate(model, tokenizer, "def ", k=1, max_new_tokens=30)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    assert generate(model, tokenizer, "def ", k=1, max_new_tokens=30, stop=["\0", stop]) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be 1 or more"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"temperature": math.inf}, "temperature"),
        ({"k": 2.5}, "k must be a whole number, got 2.5"),
        ({"seed": 1 << 64}, "seed must fit into 64 bits"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"sampler": None}, "sampler must be a string, got None"),
        ({"stop": "end"}, "stop must be a list of strings"),
        ({"temprature": 0.5}, "unknown generation option 'temprature'; did you mean temperature"),
        ({"xyzzy": 1}, "unknown generation option 'xyzzy'; known options: k, temperature"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=message):
        generate(fresh("next_token", tokenizer), tokenizer, "a", **options)


@pytest.mark.parametrize(
    ("objective", "sampler"), [*((name, "sequential") for name in OBJECTIVES), ("unrolled", "speculative")]
)
def test_compiled_decoding_is_decoding(objective: str, sampler: str) -> None:
    """The same texts for every number of rows and length, from graphs that all blocks share and no token adds to."""
    model = micro_model(micro_config("--objective.name", objective))[0].eval()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    options = GenerationOptions(k=3, max_new_tokens=12, temperature=0.8, seed=1, sampler=sampler)

    def texts(rows: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts[:rows]]
        for index, token in stream(model, prompts[:rows], options):
            found[index].append(token)
        return found

    expected = [texts(rows) for rows in (1, 2, 3)]
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_decoding(counter)
    assert [texts(rows) for rows in (1, 2, 3)] == expected
    assert counter.frame_count > 0
    made = counter.frame_count
    assert [texts(rows) for rows in (3, 2, 1)] == expected[::-1]
    assert counter.frame_count == made <= 8


def test_a_text_of_a_batch_is_its_request_alone(tokenizer: Tokenizer) -> None:
    model = micro_model(micro_config("--objective.name", "unrolled"), vocab_size=tokenizer.vocab_size)[0].eval()
    prompts = ["def f", "", "import os and more"] * 6
    together = generate_texts(model, tokenizer, prompts, k=2, max_new_tokens=6)
    assert len(together) > 16
    for number, prompt in enumerate(prompts):
        assert generate(model, tokenizer, prompt, k=2, max_new_tokens=6, request=number) == together[number]
    assert generate_texts(model, tokenizer, prompts[:2], k=2, max_new_tokens=6, requests=[6, 7]) == together[6:8]
    assert together[0] != together[3]
    with pytest.raises(UserError, match="one number per prompt"):
        generate_texts(model, tokenizer, prompts, requests=[1])
