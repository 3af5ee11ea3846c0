"""Random depth of an unrolled training step (Huginn, arXiv 2502.05171, section 3.3)."""

from __future__ import annotations

import math

from recurrent_db.rng import Rng


def poisson_quantile(u: float, mean: float) -> int:
    """Smallest n with P(Poisson(mean) <= n) >= u, for u in (0, 1).

    Terms are computed as logarithms, so large means do not underflow. The result is the same on every platform.
    """
    n, log_mass = 0, -mean
    cumulative = math.exp(log_mass)
    limit = int(mean + 40 * math.sqrt(mean + 1) + 40)  # beyond the quantile of the largest double below 1
    while cumulative < u and n < limit:
        n += 1
        log_mass += math.log(mean) - math.log(n)
        cumulative += math.exp(log_mass)
    return n


LOG_DEPTH_STD = 0.5
"""Standard deviation s of ln tau, as in Huginn."""


def sample_depth(rng: Rng, mean_depth: int, truncation: int) -> tuple[int, int]:
    """Draw the depth of one optimizer step: (passes without gradient, passes with gradient).

    tau ~ LogNormal(ln r - s^2/2, s) and p = Poisson(tau) + 1, with r = ``mean_depth``. Then max(p - k, 0) passes have no
    gradient and min(p, k) have one, with k = ``truncation``; k = 0 gives all passes a gradient (Huginn, arXiv 2502.05171,
    section 3.3). The draw is the same for the whole batch and on every process.
    """
    s = LOG_DEPTH_STD
    tau = math.exp(math.log(mean_depth) - s**2 / 2 + s * rng.scalar_normal("depth/rate"))
    depth = poisson_quantile(rng.scalar("depth/count"), tau) + 1
    with_gradient = min(depth, truncation) if truncation else depth
    return depth - with_gradient, with_gradient
