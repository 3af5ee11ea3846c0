"""Noise levels: their densities, the equal-probability partition, grids for walks, and sigma*.

sigma is the standard deviation of the noise per component, in the units of the target y. All computations here are float64;
callers cast once, at the network's input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recurrent_db.rng import key


class Density(Protocol):
    """A probability distribution of sigma on [sigma_min, sigma_max]."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    def cdf(self, sigma: Tensor) -> Tensor:
        """Cumulative distribution function, float64, any shape."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of `cdf`: from u in [0, 1] to sigma, float64, any shape."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ Normal(p_mean, p_std) truncated to [ln sigma_min, ln sigma_max] (EDM, arXiv 2206.00364, table 1)."""

    p_mean: float
    p_std: float
    sigma_min: float
    sigma_max: float

    def _phi(self, sigma: float) -> float:
        return 0.5 * math.erfc(-(math.log(sigma) - self.p_mean) / (self.p_std * math.sqrt(2)))

    def cdf(self, sigma: Tensor) -> Tensor:
        low, high = self._phi(self.sigma_min), self._phi(self.sigma_max)
        phi = torch.special.ndtr((sigma.double().log() - self.p_mean) / self.p_std)
        return ((phi - low) / (high - low)).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        """sigma = exp(p_mean + p_std * Phi^-1(q)), where q goes linearly from Phi at sigma_min to Phi at sigma_max
        (arXiv 2506.14202, section 3)."""
        low, high = self._phi(self.sigma_min), self._phi(self.sigma_max)
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(low + u.double() * (high - low)))
        return sigma.clamp(self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class LogUniform:
    """ln sigma uniform on [ln sigma_min, ln sigma_max]."""

    sigma_min: float
    sigma_max: float

    def cdf(self, sigma: Tensor) -> Tensor:
        share = torch.log(sigma.double() / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        return share.clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u.double()
        return sigma.clamp(self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class Uniform:
    """Uniform on [sigma_min, sigma_max]. Masked diffusion uses it for time, where sigma_min is 0."""

    sigma_min: float
    sigma_max: float

    def cdf(self, sigma: Tensor) -> Tensor:
        return ((sigma.double() - self.sigma_min) / (self.sigma_max - self.sigma_min)).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        return self.sigma_min + u.double() * (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Below:
    """The distribution ``law`` conditioned on sigma <= ``sigma_max``."""

    law: Density
    sigma_max: float

    @property
    def sigma_min(self) -> float:
        return self.law.sigma_min

    def _share(self) -> Tensor:
        return self.law.cdf(torch.tensor(self.sigma_max, dtype=torch.float64))

    def cdf(self, sigma: Tensor) -> Tensor:
        return (self.law.cdf(sigma) / self._share()).clamp(max=1)

    def quantile(self, u: Tensor) -> Tensor:
        return self.law.quantile(u.double() * self._share()).clamp(max=self.sigma_max)


@dataclass(frozen=True)
class Within:
    """A density restricted to a part of its range."""

    whole: Density
    sigma_min: float
    sigma_max: float

    def _ends(self) -> tuple[float, float]:
        low, high = self.whole.cdf(torch.tensor((self.sigma_min, self.sigma_max), dtype=torch.float64)).tolist()
        return low, high

    def cdf(self, sigma: Tensor) -> Tensor:
        low, high = self._ends()
        return ((self.whole.cdf(sigma) - low) / (high - low)).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self._ends()
        return self.whole.quantile(low + u.double() * (high - low))


def draw_sigma(density: Density, atom: float, u: Tensor) -> Tensor:
    """Noise levels from uniform ``u`` in [0, 1): exactly sigma_max with probability ``atom``, else from the density.

    u >= 1 - atom gives sigma_max, so sigma rises with u. Returns float64 in the shape of ``u``.
    """
    if atom >= 1:
        return torch.full_like(u, density.sigma_max, dtype=torch.float64)
    inside = density.quantile((u.double() / (1 - atom)).clamp(max=1.0))
    return torch.where(u < 1 - atom, inside, density.sigma_max)


def partition(density: Density, n: int, gamma: float = 0.0, uniform: bool = False) -> list[tuple[float, float]]:
    """Cut the range of noise levels into ``n`` intervals of equal probability (arXiv 2506.14202, section 3).

    Args:
        density: distribution of the noise levels.
        n: number of intervals.
        gamma: overlap. Each interval is widened by the factor (high/low)^gamma on both sides, within the range. The paper
            uses 0.1 for text.
        uniform: cut into intervals of equal width in ln sigma instead, as a control.

    Returns:
        (low, high) of each interval, lowest noise first.
    """
    law = LogUniform(density.sigma_min, density.sigma_max) if uniform else density
    edges = law.quantile(torch.linspace(0, 1, n + 1, dtype=torch.float64)).tolist()
    edges[0], edges[-1] = density.sigma_min, density.sigma_max
    pairs = []
    for low, high in itertools.pairwise(edges):
        widening = (high / low) ** gamma if gamma else 1.0
        pairs.append((max(low / widening, density.sigma_min), min(high * widening, density.sigma_max)))
    return pairs


@torch.no_grad()
def nearest_row_accuracy(rows_VD: Tensor, sigma: float, generator: torch.Generator, draws: int = 256) -> float:
    """Probability that the target nearest to y + sigma * eps is y itself, estimated from ``draws`` uniformly drawn targets.

    ``rows_VD``: all targets, fp32 (V, D).
    """
    picks = torch.randint(len(rows_VD), (draws,), generator=generator)
    noisy = rows_VD[picks] + sigma * torch.randn(draws, rows_VD.shape[1], generator=generator)
    scores = noisy @ rows_VD.T - 0.5 * rows_VD.square().sum(-1)
    return (scores.argmax(-1) == picks).double().mean().item()


def sigma_star(rows_VD: Tensor, sigma_min: float, sigma_max: float, seed: int = 0) -> float:
    """The noise level at which the target nearest to z is the right one half of the time. Below it a model can copy.

    Found by bisection in ln sigma, with the same random numbers at every level. If the probability does not cross one half,
    an end of [sigma_min, sigma_max] is returned. ``rows_VD``: all targets, (V, D).
    """
    rows_VD = rows_VD.detach().float().cpu()

    def accuracy(log_sigma: float) -> float:
        # The seed is hashed, because the targets may have been drawn from a generator with the plain seed.
        generator = torch.Generator().manual_seed(key(seed, "sigma_star"))
        return nearest_row_accuracy(rows_VD, math.exp(log_sigma), generator)

    low, high = math.log(sigma_min), math.log(sigma_max)
    if accuracy(low) < 0.5:
        return sigma_min
    if accuracy(high) > 0.5:
        return sigma_max
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if accuracy(middle) > 0.5 else (low, middle)
    return math.exp((low + high) / 2)


def share_below(density: Density, atom: float, sigma: float) -> float:
    """Share of the training's noise levels that are below ``sigma``."""
    return (1 - atom) * density.cdf(torch.tensor(sigma, dtype=torch.float64)).item()


Grid = Callable[[Density, int], list[float]]


def equal_probability_grid(density: Density, n: int) -> list[float]:
    """n noise levels from sigma_max down to sigma_min, with equal probability between neighbours; [sigma_max] for n = 1."""
    if n == 1:
        return [density.sigma_max]
    inner = density.quantile(torch.linspace(1, 0, n, dtype=torch.float64)).tolist()
    return [density.sigma_max, *inner[1:-1], density.sigma_min]


def karras_grid(density: Density, n: int, rho: float = 7.0) -> list[float]:
    """EDM's grid (arXiv 2206.00364, eq. 5): n levels from sigma_max to sigma_min, equally spaced in sigma^(1/rho)."""
    if n == 1:
        return [density.sigma_max]
    top, bottom = density.sigma_max ** (1 / rho), density.sigma_min ** (1 / rho)
    return [(top + i / (n - 1) * (bottom - top)) ** rho for i in range(n)]


def log_uniform_grid(density: Density, n: int) -> list[float]:
    """n noise levels from sigma_max to sigma_min, equally spaced in ln sigma."""
    if n == 1:
        return [density.sigma_max]
    return [density.sigma_max * (density.sigma_min / density.sigma_max) ** (i / (n - 1)) for i in range(n)]


def edges_grid(density: Density, n: int) -> list[float]:
    """The upper ends of n intervals of equal probability, from sigma_max down. sigma_min is not included."""
    below = density.quantile(torch.linspace(1, 0, n + 1, dtype=torch.float64)).tolist()[1:n]
    return [density.sigma_max, *below]


GRIDS: dict[str, Grid] = {
    "edges": edges_grid,
    "equal-probability": equal_probability_grid,
    "karras": karras_grid,
    "log-uniform": log_uniform_grid,
}
