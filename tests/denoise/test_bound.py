"""The bound on a walk's likelihood: exact for an exact denoiser, right on average for a wrong one, blind to the future."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import micro_config, micro_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.denoise.bound import walk_log_weight
from recurrent_db.denoise.sampler import ancestral
from recurrent_db.evaluation.likelihood import draw_log_probabilities
from recurrent_db.model import LoopedLM
from recurrent_db.recurrence.walk import DenoiseWalk, normalised
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

RNG = Rng(0, EVALUATION_STEP)
CASES: dict[str, dict[str, str]] = {
    "inject": {},
    "two-stream": {"conditioning": "two-stream"},
    "state heun": {"bridge": "state", "sampler": "heun"},
    "paper": {},
}


def model_of(case: str, spread: float = 0.3) -> LoopedLM:
    options = [f"--objective.denoise.{name}={value}" for name, value in CASES[case].items()]
    name = "denoise_paper" if case == "paper" else "denoise"
    return micro_model(micro_config("--objective.name", name, *options), spread=spread)[0]


def toy(vocab: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """(log p, targets of one norm, generator), float64."""
    generator = torch.Generator().manual_seed(seed)
    log_p_V = torch.randn(vocab, generator=generator, dtype=torch.float64).log_softmax(-1)
    rows_VD = 1.3 * normalised(torch.randn(vocab, width, generator=generator, dtype=torch.float64))
    return log_p_V, rows_VD, generator


@pytest.mark.parametrize("k", [1, 2, 5, 24])
def test_an_exact_denoiser_has_the_answer_s_probability_as_every_weight(k: int) -> None:
    log_p_V, rows_VD, generator = toy(7, 5)

    def read(z: Tensor, sigma: float) -> Tensor:
        """The posterior of the token; rows have one norm, so |z - y|^2 differs by z.y alone."""
        return (log_p_V + z @ rows_VD.T / sigma**2).log_softmax(-1)

    sigmas = torch.logspace(6, -1.5, k, dtype=torch.float64).tolist()
    answers = torch.arange(7)[:, None].expand(7, 50)
    start = sigmas[0] * torch.randn(7, 50, 5, generator=generator, dtype=torch.float64)
    eps = torch.randn(24, 7, 50, 5, generator=generator, dtype=torch.float64)
    log_w = walk_log_weight(read, rows_VD, answers, start, sigmas, lambda index: eps[index])
    # The start is drawn without the answer: at sigma 10^6 that changes nothing to five places.
    assert (log_w - log_p_V[:, None]).abs().max() < 1e-4


def test_a_wrong_denoiser_s_weights_have_the_walk_s_own_probability_as_their_mean() -> None:
    """Against the walk itself, run 300,000 times: how often it ends at each token."""
    _, rows_VD, generator = toy(4, 3, seed=1)
    mix = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    sigmas, n = [2.0, 1.4, 1.0], 300_000

    def read(z: Tensor, sigma: float) -> Tensor:
        return (torch.tanh(z @ mix / (1 + sigma)) * 0.7 + 0.2 * sigma * torch.arange(4.0)).log_softmax(-1)

    def normal() -> Tensor:
        return torch.randn(1, n, 3, generator=generator, dtype=torch.float64)

    def draw(z: Tensor, sigma: float) -> Tensor:
        return torch.multinomial(read(z, sigma)[0].exp(), 1, generator=generator)[:, 0]

    z = sigmas[0] * normal()
    for sigma, following in itertools.pairwise(sigmas):
        y = rows_VD[draw(z, sigma)][None]
        z = ancestral(lambda z, sigma, y=y: y, z, sigma, following, normal())
    ends = torch.bincount(draw(z, sigmas[-1]), minlength=4) / n
    for token in range(4):
        answers = torch.full((1, n), token)
        eps = [normal(), normal()]
        w = walk_log_weight(read, rows_VD, answers, sigmas[0] * normal(), sigmas, lambda i, eps=eps: eps[i]).exp()
        error = math.sqrt(w.var().item() / n + ends[token].item() * (1 - ends[token].item()) / n)
        assert abs(w.mean().item() - ends[token].item()) < 4 * error
        assert error < 0.005
        assert w.log().mean() < w.mean().log() - 0.01  # the denoiser is wrong, so the weights differ


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_the_read_out_at_sigma_max(case: str) -> None:
    model = model_of(case)
    inputs = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    arguments = model, inputs, inputs.roll(-1, 1), [1], RNG, torch.arange(2)
    bound, mixture = (draw_log_probabilities(*arguments, 3, bound=on)[1] for on in (True, False))
    assert torch.allclose(bound, mixture, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_bound_depends_on_no_token_after_the_answer(case: str) -> None:
    model, i = model_of(case), 5
    text = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(2))
    changed = text.clone()
    changed[:, i + 2 :] = (changed[:, i + 2 :] + 7) % 61
    before, after = (
        draw_log_probabilities(model, t[:, :-1], t[:, 1:], [3], RNG, torch.arange(2), 2, bound=True)[3]
        for t in (text, changed)
    )
    assert torch.equal(before[..., : i + 1], after[..., : i + 1])
    assert (before[..., i + 1 :] != after[..., i + 1 :]).all()


def test_the_bound_is_below_the_likelihood_that_many_draws_of_the_mixture_find() -> None:
    """Of one and the same walk: ancestral with a sampled bridge, clean context (so positions do not share noise)."""
    options = {"conditioning": "two-stream", "bridge": "sample", "sampler": "ancestral", "sigma_min": "2"}
    words = [f"--objective.denoise.{name}={value}" for name, value in options.items()]
    model = micro_model(micro_config("--objective.name", "denoise", *words), spread=0.1)[0].float()
    n = 4000  # draws of one text, as a batch of requests
    inputs = torch.randint(61, (1, 4), generator=torch.Generator().manual_seed(3)).expand(n, 4)
    arguments = model, inputs, inputs.roll(-1, 1), [3], RNG, torch.arange(n), 1
    with torch.no_grad():
        each = [draw_log_probabilities(*arguments, bound=bound)[3][0].double() for bound in (True, False)]
    bound_T, mixture_T = (log_p_NT.logsumexp(0) - math.log(n) for log_p_NT in each)
    assert torch.allclose(bound_T, mixture_T, atol=0.03)  # the same number, from draws of two kinds
    assert (each[0].mean(0) < bound_T).all()


@pytest.mark.parametrize("case", ["inject", "two-stream"])
def test_the_bound_costs_what_a_soft_walk_costs(case: str) -> None:
    """Its sum over the rows is a soft bridge's product; what walks cost is counted in test_flops.py."""
    model = model_of(case).float()
    walk = model.recurrence
    assert isinstance(walk, DenoiseWalk)
    assert walk.config.bridge == "soft" and walk.bound_passes(3) == walk.passes(3)
    inputs = torch.zeros(2, 8, dtype=torch.long)
    counts = []
    for bound in (True, False):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            draw_log_probabilities(model, inputs, inputs, [3], RNG, torch.arange(2), 1, bound=bound)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
