"""How deep an unrolled training step is: Huginn's sampler of recurrence and of backpropagated depth."""

from __future__ import annotations

import math

from recurrent_db.rng import Rng


def poisson_quantile(u: float, mean: float) -> int:
    """Smallest n with P(Poisson(mean) <= n) >= u, for u in (0, 1).

    Summed in the log domain so that large means do not underflow; the same number on every platform and library.
    """
    n, log_mass = 0, -mean
    cumulative = math.exp(log_mass)
    limit = int(mean + 40 * math.sqrt(mean + 1) + 40)  # far past any u that a double can tell from one
    while cumulative < u and n < limit:
        n += 1
        log_mass += math.log(mean) - math.log(n)
        cumulative += math.exp(log_mass)
    return n


LOG_DEPTH_STD = 0.5
"""Standard deviation s of ln tau; Huginn's."""


def sample_depth(rng: Rng, mean_depth: int, truncation: int) -> tuple[int, int]:
    """Draw (iterations without gradient, iterations with gradient) for one optimizer step.

    Huginn (arXiv 2502.05171, section 3.3): tau ~ LogNormal(ln r - s^2/2, s), p = Poisson(tau) + 1; then
    max(p - k, 0) iterations without and min(p, k) with gradient. ``truncation`` k = 0 means all with gradient.
    One draw for the whole batch, the same on every process.
    """
    s = LOG_DEPTH_STD
    tau = math.exp(math.log(mean_depth) - s**2 / 2 + s * rng.scalar_normal("depth/rate"))
    depth = poisson_quantile(rng.scalar("depth/count"), tau) + 1
    with_gradient = min(depth, truncation) if truncation else depth
    return depth - with_gradient, with_gradient
