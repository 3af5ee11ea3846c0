"""Steps of the reverse diffusion from one noise level to the next: pure functions with one signature.

The ordinary differential equation is dz/dsigma = (z - D(z, sigma)) / sigma (EDM, arXiv 2206.00364, eq. 1 with
sigma(t) = t). With a perfect denoiser and a last step to sigma 0 every step lands on y.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""(z, sigma) -> estimate of y, all of one shape."""

Step = Callable[[Denoise, Tensor, float, float, Tensor | None], Tensor]
"""(denoise, z, sigma, sigma_next, eps) -> z at sigma_next < sigma. ``eps`` is standard normal noise, used by
stochastic steps only."""


def euler(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float, eps: Tensor | None = None) -> Tensor:
    """First order: z' = (sigma'/sigma) z + (1 - sigma'/sigma) D. One evaluation."""
    ratio = sigma_next / sigma
    return ratio * z + (1 - ratio) * denoise(z, sigma)


def heun(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float, eps: Tensor | None = None) -> Tensor:
    """Second order in ln sigma: the exact step of the linear part with the estimate averaged over both ends.

    Two evaluations, one for the last step to sigma 0. Written in the estimate instead of the slope (EDM, algorithm 1),
    which is the same to second order and stays finite for any step: the result is always a mixture of z and estimates.
    """
    ratio = sigma_next / sigma
    first = denoise(z, sigma)
    guess = ratio * z + (1 - ratio) * first
    if sigma_next == 0:
        return guess
    return ratio * z + (1 - ratio) * 0.5 * (first + denoise(guess, sigma_next))


def ancestral(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float, eps: Tensor | None = None) -> Tensor:
    """Stochastic: a draw from the posterior of z' given z and y = D, which is normal with mean
    y + (sigma'^2/sigma^2)(z - y) and variance sigma'^2 (1 - sigma'^2/sigma^2). One evaluation."""
    ratio = sigma_next / sigma
    estimate = denoise(z, sigma)
    mean = estimate + ratio**2 * (z - estimate)
    if sigma_next == 0:
        return mean
    if eps is None:
        raise ValueError("the ancestral step needs noise")
    return mean + sigma_next * (1 - ratio**2) ** 0.5 * eps


STEPS: dict[str, Step] = {"euler": euler, "heun": heun, "ancestral": ancestral}
STOCHASTIC = {"ancestral"}
EVALUATIONS = {"euler": 1, "heun": 2, "ancestral": 1}
"""Core passes of one step that does not go to sigma 0."""
