"""Smooth and thin curves with many points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMOOTHING = "an exponential average over about 2% of the run's steps"


def smooth(values: Array, share: float = 0.02) -> Array:
    """Exponential moving average over a span of ``share`` of the points, with bias correction for the first points."""
    decay = 1 - 2 / (max(share * len(values), 1) + 1)
    result = np.empty_like(values)
    total = weight = 0.0
    for index, value in enumerate(values):
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result[index] = total / weight
    return result


def thin(x: Array, most: int = 300, log: bool = False) -> NDArray[np.int64]:
    """Indices of at most ``most`` points, spread evenly along the (linear or logarithmic) axis. Keeps both ends."""
    if len(x) <= most:
        return np.arange(len(x))
    positive = log and bool((x > 0).all())
    grid = np.geomspace(x[0], x[-1], most) if positive else np.linspace(x[0], x[-1], most)
    return np.unique(np.clip(np.searchsorted(x, grid), 0, len(x) - 1))
