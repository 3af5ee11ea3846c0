"""Steps of a walk from one noise level to the next: pure functions with one signature.

They solve dz/dsigma = (z - D(z, sigma)) / sigma (EDM, arXiv 2206.00364, eq. 1 with sigma(t) = t). With a perfect denoiser, a
last step to sigma 0 gives y exactly.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""Function from (z, sigma) to the estimate of y, in the shape of z."""

Step = Callable[[Denoise, Tensor, float, float, Tensor | None], Tensor]
"""Function from (denoise, z, sigma, sigma_next, eps) to z at sigma_next < sigma. ``eps`` is standard normal noise in the
shape of z, which only stochastic steps use."""


def euler(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float, eps: Tensor | None = None) -> Tensor:
    """Euler step, first order: z' = (sigma'/sigma) z + (1 - sigma'/sigma) D. One evaluation of ``denoise``."""
    ratio = sigma_next / sigma
    return ratio * z + (1 - ratio) * denoise(z, sigma)


def heun(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float, eps: Tensor | None = None) -> Tensor:
    """Heun step, second order in ln sigma: the estimate D is averaged over both ends of the step.

    Two evaluations of ``denoise``, or one if sigma_next is 0. EDM (algorithm 1) averages slopes instead of estimates. Both
    agree to second order; this form stays finite for any step, because the result is a mixture of z and estimates.
    """
    ratio = sigma_next / sigma
    first = denoise(z, sigma)
    guess = ratio * z + (1 - ratio) * first
    if sigma_next == 0:
        return guess
    return ratio * z + (1 - ratio) * 0.5 * (first + denoise(guess, sigma_next))


def ancestral(denoise: Denoise, z: Tensor, sigma: float, sigma_next: float, eps: Tensor | None = None) -> Tensor:
    """Ancestral step, stochastic: a draw from the posterior of z' given z and y = D. One evaluation of ``denoise``.

    The posterior is normal with mean y + (sigma'^2/sigma^2)(z - y) and variance sigma'^2 (1 - sigma'^2/sigma^2). Raises
    ValueError if ``eps`` is None and sigma_next is above 0.
    """
    ratio = sigma_next / sigma
    estimate = denoise(z, sigma)
    mean = estimate + ratio**2 * (z - estimate)
    if sigma_next == 0:
        return mean
    if eps is None:
        raise ValueError("the ancestral step needs noise: give eps")
    return mean + sigma_next * (1 - ratio**2) ** 0.5 * eps


STEPS: dict[str, Step] = {"euler": euler, "heun": heun, "ancestral": ancestral}
"""Steps by name."""
STOCHASTIC = {"ancestral"}
"""Names of the steps that need noise."""
EVALUATIONS = {"euler": 1, "heun": 2, "ancestral": 1}
"""Core passes per step, unless the step goes to sigma 0."""
