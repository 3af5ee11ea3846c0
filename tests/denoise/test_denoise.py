"""The mathematics of the denoiser against closed forms: densities, partition, scalings, steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from recurrent_db.denoise.noise import (
    GRIDS,
    Density,
    LogNormal,
    LogUniform,
    draw_sigma,
    nearest_row_accuracy,
    partition,
    share_below,
    sigma_star,
)
from recurrent_db.denoise.precond import Precond
from recurrent_db.denoise.sampler import STEPS, ancestral, euler, heun

pytestmark = pytest.mark.fast

PAPER = LogNormal(-1.2, 1.2, 0.002, 80.0)
DENSITIES = [PAPER, LogNormal(0.5, 0.7, 0.05, 20.0), LogUniform(0.01, 50.0)]


def pdf_log(density: Density, log_sigma: float) -> float:
    """Unnormalised density of ln sigma, written from the definition."""
    if isinstance(density, LogUniform):
        return 1.0
    assert isinstance(density, LogNormal)
    return math.exp(-0.5 * ((log_sigma - density.p_mean) / density.p_std) ** 2)


def mass(density: Density, low: float, high: float) -> float:
    """Unnormalised probability of [low, high] by quadrature."""
    return quad(lambda x: pdf_log(density, x), math.log(low), math.log(high), epsabs=1e-13, epsrel=1e-12, limit=400)[0]


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_cdf_is_the_integral_of_the_density(density: Density) -> None:
    whole = mass(density, density.sigma_min, density.sigma_max)
    for u in (0.1, 0.5, 0.9):
        sigma = density.quantile(torch.tensor(u, dtype=torch.float64)).item()
        assert mass(density, density.sigma_min, sigma) / whole == pytest.approx(u, abs=1e-9)
        assert density.cdf(torch.tensor(sigma, dtype=torch.float64)).item() == pytest.approx(u, abs=1e-12)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("n", range(1, 17))
def test_partition_has_equal_masses(density: Density, n: int) -> None:
    pairs = partition(density, n)
    whole = mass(density, density.sigma_min, density.sigma_max)
    assert pairs[0][0] == density.sigma_min
    assert pairs[-1][1] == density.sigma_max
    for low, high in pairs:
        assert mass(density, low, high) / whole == pytest.approx(1 / n, abs=1e-9)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pairs))


def test_overlap_widens_in_log_space_and_stays_in_range() -> None:
    plain, wide = partition(PAPER, 4), partition(PAPER, 4, gamma=0.1)
    for (low, high), (wide_low, wide_high) in zip(plain, wide, strict=True):
        factor = (high / low) ** 0.1
        assert wide_low == pytest.approx(max(low / factor, PAPER.sigma_min))
        assert wide_high == pytest.approx(min(high * factor, PAPER.sigma_max))


@settings(max_examples=50, deadline=None)
@given(
    u=st.floats(0, 1, exclude_max=True),
    atom=st.floats(0, 1),
    p_mean=st.floats(-3, 3),
    p_std=st.floats(0.1, 3),
)
def test_draws_stay_in_range_and_rise_with_u(u: float, atom: float, p_mean: float, p_std: float) -> None:
    density = LogNormal(p_mean, p_std, 0.01, 20.0)
    us = torch.tensor([u * 0.5, u], dtype=torch.float64)
    low, high = draw_sigma(density, atom, us).tolist()
    assert 0.01 <= low <= high <= 20.0


def test_the_atom_has_its_probability() -> None:
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    sigma = draw_sigma(PAPER, 0.3, u)
    assert (sigma == 80.0).double().mean().item() == pytest.approx(0.3, abs=1e-3)
    assert (draw_sigma(PAPER, 1.0, u) == 80.0).all()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_grids_fall_from_top_to_bottom(name: str, density: Density) -> None:
    assert GRIDS[name](density, 1) == [density.sigma_max]
    for n in (2, 5, 32):
        grid = GRIDS[name](density, n)
        assert len(grid) == n
        assert grid[0] == pytest.approx(density.sigma_max)
        last = density.quantile(torch.tensor(1 / n)).item() if name == "edges" else density.sigma_min
        assert grid[-1] == pytest.approx(last)
        assert all(a > b for a, b in itertools.pairwise(grid))


def test_karras_grid_matches_the_published_formula() -> None:
    steps = 18
    expected = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)]
    np.testing.assert_allclose(GRIDS["karras"](PAPER, steps), expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# sigma*


def test_sigma_star_is_where_half_of_the_nearest_rows_are_right() -> None:
    rows = torch.nn.functional.normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(3)), dim=-1)
    star = sigma_star(rows, 0.01, 10.0)
    accuracy = nearest_row_accuracy(rows, star, torch.Generator().manual_seed(99), draws=4000)
    assert accuracy == pytest.approx(0.5, abs=0.04)


def test_sigma_star_of_two_opposite_rows_has_a_closed_form() -> None:
    # Rows +1 and -1 in one dimension are told apart with probability Phi(1/sigma) > 1/2 at any noise.
    assert sigma_star(torch.tensor([[1.0], [-1.0]]), 0.01, 2.0) == 2.0
    accuracy = nearest_row_accuracy(torch.tensor([[1.0], [-1.0]]), 0.7, torch.Generator().manual_seed(0), draws=200_000)
    assert accuracy == pytest.approx(0.5 * math.erfc(-1 / 0.7 / math.sqrt(2)), abs=0.004)


def test_the_papers_constants_put_two_fifths_of_the_draws_below_sigma_star() -> None:
    # For V = 50k and d = 768 it is 42 percent; fewer rows move sigma* only through sqrt(2 ln V).
    rows = torch.nn.functional.normalize(torch.randn(20_000, 768, generator=torch.Generator().manual_seed(5)), dim=-1)
    star = sigma_star(rows, 0.002, 80.0)
    assert share_below(PAPER, 0.0, star) == pytest.approx(0.42, abs=0.03)
    assert share_below(PAPER, 0.5, star) == pytest.approx(0.21, abs=0.015)


# ---------------------------------------------------------------------------------------------------------------------
# Preconditioning


@pytest.mark.parametrize("sd", [0.05, 0.5, 1.0])
def test_scalings_at_the_limits(sd: float) -> None:
    precond = Precond(sd)
    tiny, huge = torch.tensor(1e-6 * sd, dtype=torch.float64), torch.tensor(1e6 * sd, dtype=torch.float64)
    assert precond.c_skip(tiny).item() == pytest.approx(1, abs=1e-9)
    assert precond.c_skip(huge).item() == pytest.approx(0, abs=1e-9)
    assert precond.c_out(tiny).item() == pytest.approx(0, abs=1e-5 * sd)
    assert precond.c_out(huge).item() == pytest.approx(sd, rel=1e-9)
    assert precond.c_in(tiny).item() == pytest.approx(1 / sd, rel=1e-9)
    assert (precond.c_in(huge) * huge).item() == pytest.approx(1, rel=1e-9)
    assert precond.c_noise(torch.tensor(math.e**4)).item() == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(sigma=st.floats(1e-3, 1e3), sd=st.floats(1e-2, 2.0))
def test_scalings_give_unit_variances(sigma: float, sd: float) -> None:
    """EDM's three conditions: network inputs and targets have unit variance, and w makes the loss weight one."""
    precond, s = Precond(sd), torch.tensor(sigma, dtype=torch.float64)
    assert (precond.c_in(s) ** 2 * (sigma**2 + sd**2)).item() == pytest.approx(1)
    # F's target is (y - c_skip z) / c_out, with z = y + sigma eps.
    variance = ((1 - precond.c_skip(s)) ** 2 * sd**2 + precond.c_skip(s) ** 2 * sigma**2) / precond.c_out(s) ** 2
    assert variance.item() == pytest.approx(1)
    assert (precond.weight(s) * precond.c_out(s) ** 2).item() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_perfect_denoiser_lands_on_y(name: str, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, generator=generator, dtype=torch.float64)
    sigmas = [*GRIDS["log-uniform"](PAPER, n), 0.0]
    z = y + sigmas[0] * torch.randn(5, generator=generator, dtype=torch.float64)
    for sigma, following in itertools.pairwise(sigmas):
        z = STEPS[name](lambda z, s: y, z, sigma, following, torch.randn(5, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(z, y, rtol=0, atol=1e-5)


def mixture_denoiser(z: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[y | z] for y ~ 1/2 N(-1, .3^2) + 1/2 N(1.5, .5^2), the closed form."""
    means, variances = (-1.0, 1.5), (0.09, 0.25)
    logs = [
        -0.5 * (z - m) ** 2 / (v + sigma**2) - 0.5 * math.log(v + sigma**2)
        for m, v in zip(means, variances, strict=True)
    ]
    weights = torch.stack(logs).softmax(0)
    posteriors = [(m * sigma**2 + v * z) / (v + sigma**2) for m, v in zip(means, variances, strict=True)]
    return (weights * torch.stack(posteriors)).sum(0)


@pytest.mark.parametrize(("step", "order"), [(euler, 1), (heun, 2)], ids=["euler", "heun"])
def test_order_of_convergence_on_a_gaussian_mixture(step: object, order: int) -> None:
    low, high = 0.02, 10.0
    start = torch.linspace(-15, 15, 41, dtype=torch.float64)

    def solve(n: int, method: object) -> torch.Tensor:
        z = start
        sigmas = [high * (low / high) ** (i / n) for i in range(n + 1)]
        for sigma, following in itertools.pairwise(sigmas):
            z = method(mixture_denoiser, z, sigma, following, None)  # type: ignore[operator]
        return z

    exact = solve(4_000, heun)
    ns = [16, 32, 64, 128, 256]
    errors = [(solve(n, step) - exact).abs().mean().item() for n in ns]
    slope = -np.polyfit(np.log(ns), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15), errors


def test_ancestral_steps_keep_the_marginal() -> None:
    """For Gaussian data the walk's distribution at every level is that of y + sigma eps, steps of any size or not."""
    sd, n = 0.7, 400_000
    generator = torch.Generator().manual_seed(1)

    def sampled(z: torch.Tensor, sigma: float) -> torch.Tensor:
        # A draw from p(y | z): with it, and not with the mean, one ancestral step is exact.
        mean, std = sd**2 / (sd**2 + sigma**2) * z, sd * sigma / math.sqrt(sd**2 + sigma**2)
        return mean + std * torch.randn(z.shape, generator=generator, dtype=torch.float64)

    z = math.sqrt(sd**2 + 4.0) * torch.randn(n, generator=generator, dtype=torch.float64)
    for sigma, following in ((2.0, 0.8), (0.8, 0.1)):
        z = ancestral(sampled, z, sigma, following, torch.randn(n, generator=generator, dtype=torch.float64))
        assert z.std().item() == pytest.approx(math.sqrt(sd**2 + following**2), rel=0.01)


def test_ancestral_needs_noise() -> None:
    with pytest.raises(ValueError, match="needs noise"):
        ancestral(lambda z, s: z, torch.zeros(1), 1.0, 0.5, None)


def test_uniform_partition_is_the_control() -> None:
    steps = [math.log(high / low) for low, high in partition(PAPER, 5, uniform=True)]
    assert steps == [pytest.approx(math.log(80 / 0.002) / 5)] * 5
