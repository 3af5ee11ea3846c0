"""Scoring: closed forms, the mixture over noise, and that it never sees the answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import OBJECTIVES, micro_config, micro_model

from recurrent_db.data import Batch
from recurrent_db.data.ngram import bigram_nll, unigram_nll
from recurrent_db.evaluation.likelihood import score, score_draws, token_log_probabilities
from recurrent_db.model import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

RNG = Rng(0, EVALUATION_STEP)

CASES = {
    "next_token": {},
    "unrolled": {},
    "denoise": {},
    "denoise_paper": {},
    "hard": {"bridge": "hard"},
    "sample": {"bridge": "sample"},
    "state": {"bridge": "state"},
    "heun": {"sampler": "heun"},
    "ancestral": {"sampler": "ancestral"},
    "karras": {"grid": "karras"},
    "log-uniform": {"grid": "log-uniform"},
    "two-stream": {"conditioning": "two-stream"},
    "two-stream heun state": {"conditioning": "two-stream", "sampler": "heun", "bridge": "state"},
}
"""Objectives, and ways of walking of a denoiser."""


def model_of(case: str) -> LoopedLM:
    options = [f"--objective.denoise.{name}={value}" for name, value in CASES[case].items()]
    name = case if case in (*OBJECTIVES, "denoise_paper") else "denoise"
    return micro_model(micro_config("--objective.name", name, *options))[0]


def tokens(n: int = 2, length: int = 12, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


def logits(model: LoopedLM, inputs: torch.Tensor, k: int, draw: int = 0) -> torch.Tensor:
    noise = NoiseSource(RNG, torch.arange(len(inputs)), 32, draw)
    with torch.no_grad():
        [(_, hidden)] = model.recurrence.hidden(model, inputs, model.encode(inputs), [k], noise)
        return model.logits(hidden)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3])
def test_scored_logits_never_see_the_answer(case: str, k: int) -> None:
    """Perturbing tokens from i+1 on changes no logit at or before i, exactly, in float64."""
    model, inputs, i = model_of(case), tokens(), 6
    changed = inputs.clone()
    changed[:, i + 1 :] = (changed[:, i + 1 :] + 7) % 61
    before, after = logits(model, inputs, k), logits(model, changed, k)
    assert torch.equal(before[:, : i + 1], after[:, : i + 1])
    # Positive control: the perturbation reaches every later position.
    assert (before[:, i + 1 :] != after[:, i + 1 :]).any(-1).all()


@pytest.mark.parametrize("conditioning", ["inject", "two-stream"])
def test_starting_from_the_answer_is_caught_by_the_same_test(
    conditioning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leak that the test above is there for: z made from y on purpose."""
    model, inputs, i = model_of("denoise" if conditioning == "inject" else conditioning), tokens(), 6
    changed = inputs.clone()
    changed[:, i + 1] = (changed[:, i + 1] + 7) % 61
    found = []
    for x in (inputs, changed):
        y = model.recurrence.targets(model)[torch.roll(x, -1, dims=1)]  # position i holds token i+1
        monkeypatch.setattr(NoiseSource, "normal", lambda self, *shape, y=y: y / 20 + 0.01)
        found.append(logits(model, x, 1))
    assert not torch.equal(found[0][:, : i + 1], found[1][:, : i + 1])


def test_a_denoiser_in_training_does_see_its_own_answer_and_no_later_one() -> None:
    """Training's read-out at i depends on token i+1 through z, and on no token after it, with either conditioning."""
    for case in ("denoise", "two-stream"):
        model = model_of(case)
        walk, inputs, i = model.recurrence, tokens(), 6

        def read(x: torch.Tensor, targets: torch.Tensor, model: LoopedLM = model, walk: Any = walk) -> torch.Tensor:
            with torch.no_grad():
                e, z = model.encode(x), walk.targets(model)[targets] + 0.1
                estimate = walk.estimate(model, z, 0.1, e, walk.clean_contexts(model, e))
                return model.logits(walk.read(model, estimate, e.dtype))

        targets = torch.roll(inputs, -1, dims=1)
        base = read(inputs, targets)
        for later in range(i + 1, 12):
            x, y = inputs.clone(), targets.clone()
            x[:, later] = (x[:, later] + 7) % 61
            y[:, later - 1] = x[:, later]
            same = torch.equal(read(x, y)[:, : i + 1], base[:, : i + 1])
            assert same == (later > i + 1)


def test_two_stream_reads_no_neighbours_noise() -> None:
    """In the core position i sees clean keys and its own noisy key: another position's z changes nothing."""
    model = model_of("two-stream")
    walk, inputs = model.recurrence, tokens()
    with torch.no_grad():
        e = model.encode(inputs)
        z = torch.randn(e.shape, generator=torch.Generator().manual_seed(2))
        changed = z.clone()
        changed[:, 3] += 1.0
        a, b = (walk.estimate(model, x, 0.5, e, walk.clean_contexts(model, e)) for x in (z, changed))
    same = (a == b).all(-1).all(0)
    assert same.tolist() == [position != 3 for position in range(12)]


def test_the_state_bridge_reads_out_once() -> None:
    state, soft = (model_of(case).recurrence.passes(8) for case in ("state", "denoise"))
    assert (state.core_no_grad, state.readouts_no_grad, state.bridges) == (8, 1, 0)
    assert (soft.core_no_grad, soft.readouts_no_grad, soft.bridges) == (8, 8, 7)
    assert model_of("unrolled").recurrence.passes(8).core_no_grad == 8


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
    for draw in range(5):
        each.append(logits(model, inputs, 2, draw).softmax(-1).gather(-1, targets[..., None])[..., 0])
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


class FiniteNoise(NoiseSource):
    """Noise that takes one of 16 values for each position, so that the mixture's integral is a finite sum."""

    VALUES = torch.randn(16, 8, generator=torch.Generator().manual_seed(7)) * 1.5
    forced: int | None = None

    def normal(self, length: int, width: int, stream: str, device: torch.device) -> torch.Tensor:
        picks = (self.uniform(length, 1, stream, device)[..., 0] * 16).long()
        if self.forced is not None:
            picks = torch.full_like(picks, self.forced)
        return self.VALUES[picks]


def test_the_mixture_converges_to_the_exact_integral(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary of 3, one position, 16 noise values: the exact likelihood is a sum. The NLL falls towards it with a
    bias of order 1/M, and at M = 512 agrees within three standard errors."""
    config = micro_config("--objective.name", "denoise", "--model.d_model", "8", "--model.n_heads", "1",
                          "--objective.denoise.sigma_max", "2")  # fmt: skip
    config.model.vocab_size, config.objective.denoise.mute = 3, False
    model, _ = micro_model(config, vocab_size=3, spread=1.0)
    inputs, targets, k = torch.tensor([[1]]), torch.tensor([[2]]), 2
    monkeypatch.setattr("recurrent_db.evaluation.likelihood.NoiseSource", FiniteNoise)
    each = []
    with torch.no_grad():
        for value in range(16):
            monkeypatch.setattr(FiniteNoise, "forced", value)
            each.append(token_log_probabilities(model, inputs, targets, [k], RNG, torch.tensor([0]))[k].item())
    monkeypatch.setattr(FiniteNoise, "forced", None)
    p = np.exp(each)
    exact, relative_variance = -math.log(p.mean()), p.var() / p.mean() ** 2
    assert relative_variance > 0.05  # or there would be nothing to converge

    # 4,096 draws of one request, as one batch of requests for speed: bias at M from the mean over disjoint groups.
    n = 4096
    rows = inputs.expand(n, 1), targets.expand(n, 1)
    with torch.no_grad():
        log_p = token_log_probabilities(model, *rows, [k], RNG, torch.arange(n))[k][:, 0].double()
    ms = [1, 2, 4, 8, 16]
    bias = [(-(log_p.view(-1, m).logsumexp(1) - math.log(m))).mean().item() - exact for m in ms]
    slope = np.polyfit(np.log(ms), np.log(bias), 1)[0]
    assert slope == pytest.approx(-1, abs=0.25), bias
    assert bias[-1] == pytest.approx(relative_variance / 2 / 16, rel=0.6)  # the leading term, and not zero

    # The function's own draws of one request.
    with torch.no_grad():
        own = -token_log_probabilities(model, inputs, targets, [k], RNG, torch.tensor([3]), draws=512)[k].item()
    assert abs(own - exact) < 3 * math.sqrt(relative_variance / 512)


def test_the_standard_error_over_draws_is_that_of_repeated_scoring() -> None:
    """Tokens of a sequence share their neighbours' noise, so errors of single tokens do not simply average out: the
    reported error is compared with the spread of scores under other seeds, at a K where the walk matters."""
    model, _ = micro_model(micro_config("--objective.name", "denoise"), spread=0.2)
    model = model.float()
    inputs = tokens(6)
    batches = [Batch(inputs, torch.roll(inputs, -1, dims=1), torch.zeros_like(inputs), torch.arange(6))]
    runs = [score_draws(model, batches, [3], np.ones(61), (8,), seed)[8].by_k[3] for seed in range(24)]
    spread = np.std([run.nll for run in runs], ddof=1)
    reported = np.mean([run.noise_stderr for run in runs])
    assert spread > 1e-4
    assert 0.6 < reported / spread < 1.6


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
