"""Scoring: closed forms, the mixture over noise, and that it never sees the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import OBJECTIVES, micro_config, micro_model

from recurrent_db.data import Batch
from recurrent_db.likelihood import score, token_log_probabilities
from recurrent_db.ngram import bigram_nll, unigram_nll
from recurrent_db.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

RNG = Rng(0, EVALUATION_STEP)
VARIANTS = [("euler", "soft"), ("euler", "hard"), ("euler", "sample"), ("heun", "soft"), ("ancestral", "soft")]
CASES = [(name, "euler", "soft") for name in OBJECTIVES] + [("denoise", s, b) for s, b in VARIANTS[1:]]


def tokens(n: int = 2, length: int = 12, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


def logits(objective: str, sampler: str, bridge: str, inputs: torch.Tensor, k: int) -> torch.Tensor:
    config = micro_config("--objective.name", objective, "--objective.denoise.sampler", sampler,
                          "--objective.denoise.bridge", bridge)  # fmt: skip
    model, _ = micro_model(config)
    noise = NoiseSource(RNG, torch.arange(len(inputs)), 32)
    with torch.no_grad():
        [(_, hidden)] = model.recurrence.hidden(model, model.encode(inputs), [k], noise)
        return model.logits(hidden)


@pytest.mark.parametrize(("objective", "sampler", "bridge"), CASES)
@pytest.mark.parametrize("k", [1, 3])
def test_scored_logits_never_see_the_answer(objective: str, sampler: str, bridge: str, k: int) -> None:
    """Perturbing tokens from i+1 on changes no logit at or before i, exactly, in float64."""
    inputs, i = tokens(), 6
    changed = inputs.clone()
    changed[:, i + 1 :] = (changed[:, i + 1 :] + 7) % 61
    before, after = (logits(objective, sampler, bridge, x, k) for x in (inputs, changed))
    assert torch.equal(before[:, : i + 1], after[:, : i + 1])
    # Positive control: the perturbation reaches every later position.
    assert (before[:, i + 1 :] != after[:, i + 1 :]).any(-1).all()


def test_starting_from_the_answer_is_caught_by_the_same_test() -> None:
    """The leak that the test above is there for: z made from y on purpose."""
    model, _ = micro_model(micro_config("--objective.name", "denoise"))
    walk, inputs, i = model.recurrence, tokens(), 6
    changed = inputs.clone()
    changed[:, i + 1] = (changed[:, i + 1] + 7) % 61
    leaked = []
    with torch.no_grad():
        for x in (inputs, changed):
            targets = torch.roll(x, -1, dims=1)
            z = walk.targets(model)[targets] + 0.1  # position i holds token i+1
            leaked.append(model.logits(walk.read(model, z, 0.1, model.encode(x).float().double())))
    assert not torch.equal(leaked[0][:, i], leaked[1][:, i])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_do_not_depend_on_batching_or_length(objective: str) -> None:
    model, _ = micro_model(micro_config("--objective.name", objective))
    inputs, requests = tokens(4), torch.tensor([5, 9, 2, 7])
    targets = torch.roll(inputs, -1, dims=1)
    together = token_log_probabilities(model, inputs, targets, [1, 3], RNG, requests, draws=2)
    for row in range(4):
        alone = token_log_probabilities(
            model, inputs[row : row + 1, :9], targets[row : row + 1, :9], [1, 3], RNG, requests[row : row + 1], draws=2
        )
        for k in (1, 3):
            torch.testing.assert_close(alone[k][0], together[k][row, :9], rtol=0, atol=1e-5)


def test_one_pass_over_several_k_equals_each_alone() -> None:
    for objective in OBJECTIVES:
        model, _ = micro_model(micro_config("--objective.name", objective))
        inputs, requests = tokens(), torch.arange(2)
        targets = torch.roll(inputs, -1, dims=1)
        together = token_log_probabilities(model, inputs, targets, [1, 2, 4], RNG, requests)
        for k in (1, 2, 4):
            alone = token_log_probabilities(model, inputs, targets, [k], RNG, requests)
            torch.testing.assert_close(alone[k], together[k], rtol=0, atol=1e-6)


def test_the_mixture_is_the_log_of_the_mean_probability() -> None:
    model, _ = micro_model(micro_config("--objective.name", "denoise"))
    inputs, requests = tokens(), torch.arange(2)
    targets = torch.roll(inputs, -1, dims=1)
    mixture = token_log_probabilities(model, inputs, targets, [2], RNG, requests, draws=5)[2]
    each = []
    with torch.no_grad():
        for draw in range(5):
            noise = NoiseSource(RNG, requests, 32, draw)
            [(_, hidden)] = model.recurrence.hidden(model, model.encode(inputs), [2], noise)
            each.append(model.logits(hidden).softmax(-1).gather(-1, targets[..., None])[..., 0])
    torch.testing.assert_close(mixture, torch.stack(each).mean(0).log().float(), rtol=0, atol=1e-4)
    assert not torch.allclose(each[0], each[1])  # the draws differ, or the mean would prove nothing


def test_mixture_of_impossible_tokens_stays_finite() -> None:
    """log-mean-exp neither overflows nor underflows where every single probability does."""
    model, _ = micro_model(micro_config("--objective.name", "denoise"))
    with torch.no_grad():
        model.final_norm.weight.mul_(1e4)
    inputs = tokens()
    scored = token_log_probabilities(
        model, inputs, torch.roll(inputs, -1, dims=1), [1, 2], RNG, torch.arange(2), draws=3
    )
    assert all(torch.isfinite(log_p).all() for log_p in scored.values())
    assert scored[1].min() < -200


def test_bits_per_byte_and_standard_error() -> None:
    model, _ = micro_model(micro_config("--objective.name", "next_token"))
    inputs = tokens(6)
    batch = Batch(inputs, torch.roll(inputs, -1, dims=1), torch.zeros_like(inputs), torch.arange(6))
    lengths = np.arange(61) % 4
    result = score(model, [batch.slice(0, 4), batch.slice(4, 6)], [1], lengths)
    nll = -torch.log_softmax(model(inputs).float(), -1).gather(-1, batch.targets_BT[..., None])[..., 0].double()
    n_bytes = lengths[batch.targets_BT.numpy()].sum()
    assert result.tokens == 72
    assert result.by_k[1].nll == pytest.approx(nll.mean().item(), abs=1e-6)
    assert result.by_k[1].bits_per_byte == pytest.approx(nll.sum().item() / math.log(2) / n_bytes, rel=1e-6)
    assert result.by_k[1].stderr == pytest.approx(nll.mean(1).std().item() / math.sqrt(6), rel=1e-5)
    assert result.draws == 1  # no noise, nothing to average


# ---------------------------------------------------------------------------------------------------------------------
# The floor


def test_unigram_is_the_cross_entropy_of_the_frequencies() -> None:
    train = np.array([0, 0, 1, 2])
    expected = -np.mean(np.log([2 / 7, 3 / 7]))  # add-one over three tokens
    assert unigram_nll(train, np.array([0, 1, 0]), 3) == pytest.approx(expected)


def test_bigram_probabilities_sum_to_one_and_beat_the_unigram() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 5, size=200)
    train[1::2] = (train[::2] + 1) % 5
    for context in range(6):  # token 5 was never seen
        total = sum(math.exp(-bigram_nll(train, np.array([context, after]), 6)) for after in range(6))
        assert total == pytest.approx(1.0, abs=1e-9)
    held_out = rng.integers(0, 5, size=400)
    held_out[1::2] = (held_out[::2] + 1) % 5
    assert bigram_nll(train, held_out, 6) < unigram_nll(train, held_out, 6) - 0.2
