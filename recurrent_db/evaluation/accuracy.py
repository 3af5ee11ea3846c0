"""Accuracy on a task's items with its uncertainty, and the difference of two models on the same items.

Shapes: N items, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurrent_db.rng import key

Floats = NDArray[np.float64]

RESAMPLES = 1000


def credit(scores: Sequence[float], right: int) -> float:
    """Credit for one item: 1 if the right choice has the highest score alone, 1/n if n choices share it, else 0.

    The harness takes the first of tied choices. A model that gives all choices the same score then looks perfect on a task
    whose right choice always comes first. Scores that differ by less than a relative 1e-9 count as tied.
    """
    best = max(scores)
    tied = [index for index, score in enumerate(scores) if score >= best - 1e-9 * max(1.0, abs(best))]
    return (right in tied) / len(tied)


def resampled_means(credits_N: Floats, seed: int = 0) -> Floats:
    """Means of bootstrap samples, (R,)."""
    n = len(credits_N)
    rng = np.random.default_rng(key(seed, "bootstrap", n))
    return np.array([credits_N[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)])


@dataclass(frozen=True)
class Accuracy:
    """Mean credit over items, with its uncertainty."""

    mean: float
    stderr: float
    """Standard error over items; NaN for one item."""
    resamples_R: Floats
    """Means of bootstrap samples, (R,)."""

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 percent of the bootstrap means."""
        low, high = np.quantile(self.resamples_R, (0.025, 0.975))
        return float(low), float(high)

    @classmethod
    def of(cls, credits_N: Floats) -> Accuracy:
        n = len(credits_N)
        stderr = float(credits_N.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        return cls(float(credits_N.mean()), stderr, resampled_means(credits_N))

    @classmethod
    def average(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """Accuracy over a group of tasks with equal weights and independent items."""
        stderr = math.sqrt(sum(part.stderr**2 for part in parts)) / len(parts)
        # Tasks with equally many items share their bootstrap indices, so each task's means get their own order.
        mixed = [np.random.default_rng(number).permutation(part.resamples_R) for number, part in enumerate(parts)]
        return cls(float(np.mean([part.mean for part in parts])), stderr, np.mean(mixed, axis=0))


@dataclass(frozen=True)
class Difference:
    """The difference between two models' accuracies on the same items."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, ours_N: Floats, theirs_N: Floats) -> Difference:
        difference_N = ours_N - theirs_N
        n = len(difference_N)
        return cls(float(difference_N.mean()), float(difference_N.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan)

    @classmethod
    def average(cls, parts: Sequence[Difference]) -> Difference:
        """Difference over a group of tasks with equal weights."""
        stderr = math.sqrt(sum(part.stderr**2 for part in parts)) / len(parts)
        return cls(float(np.mean([part.mean for part in parts])), stderr)

    @property
    def z(self) -> float:
        """The difference divided by its standard error; 0 if the models agree on all items."""
        if self.stderr == 0:
            return math.copysign(math.inf, self.mean) if self.mean else 0.0
        return self.mean / self.stderr
