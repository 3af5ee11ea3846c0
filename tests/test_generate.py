"""Sampling: its filters against hand-made cases, its seeds, and that it samples what is scored."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import OBJECTIVES, micro_config, micro_model

from recurrent_db import UserError, generate
from recurrent_db.generate import filter_probabilities, generate_tokens
from recurrent_db.likelihood import token_log_probabilities
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.tokenizer import Tokenizer

LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.5, 0.2, 0.2, 0.1]),
        (0.0, 0, 1.0, [1, 0, 0, 0]),
        (1.0, 1, 1.0, [1, 0, 0, 0]),
        (1.0, 3, 1.0, [5 / 9, 2 / 9, 2 / 9, 0]),
        (1.0, 0, 0.5, [1, 0, 0, 0]),
        (1.0, 0, 0.6, [5 / 7, 2 / 7, 0, 0]),
        (1.0, 0, 1e-9, [1, 0, 0, 0]),
        (0.5, 0, 1.0, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
    ],
)
def test_filters(temperature: float, top_k: int, top_p: float, expected: list[float]) -> None:
    ours = filter_probabilities(LOGITS, temperature, top_k, top_p)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def fresh(objective: str, tokenizer: Tokenizer) -> torch.nn.Module:
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


def test_long_prompts_and_empty_ones(tokenizer: Tokenizer) -> None:
    model = fresh("denoise", tokenizer)
    long = generate(model, tokenizer, "x = 1\n" * 200, k=2, max_new_tokens=40)  # beyond the window of 32 tokens
    assert isinstance(long, str)
    assert isinstance(generate(model, tokenizer, "", k=1, max_new_tokens=3), str)
    assert generate(model, tokenizer, "a", k=1, max_new_tokens=0) == ""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_are_drawn_from_the_scored_distribution(objective: str) -> None:
    """First tokens over many requests follow the mean of the scored probabilities (chi-squared, 1,500 draws)."""
    from scipy.stats import chi2

    model, _ = micro_model(micro_config("--objective.name", objective), vocab_size=5, spread=0.2)
    model = model.float()
    prompt, n = [1, 2, 3], 1500
    drawn = torch.tensor([next(generate_tokens(model, prompt, 2, 1, request=r)) for r in range(n)])
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
        whole = list(generate_tokens(model, [1], 1, 20, seed=seed))
        cut = list(generate_tokens(model, [1], 1, 20, seed=seed, stop_id=2))
        assert cut == (whole[: whole.index(2)] if 2 in whole else whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be 1 or more"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_mistakes(options: dict[str, float], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=message):
        generate(fresh("next_token", tokenizer), tokenizer, "a", **options)  # type: ignore[arg-type]
