"""Unigram and bigram baselines. A trained network must reach a lower loss than both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unigram_log_p(counts_V: NDArray[np.integer]) -> NDArray[np.float64]:
    """Log-probabilities (V,) of the tokens from their counts (V,), with add-one smoothing. Nats, float64."""
    smoothed = counts_V + 1.0
    return np.log(smoothed / smoothed.sum())


def unigram_nll(train: NDArray[np.integer], held_out: NDArray[np.integer], vocab_size: int) -> float:
    """NLL of ``held_out[1:]`` under the token frequencies of ``train``, with add-one smoothing. Nats per token."""
    return float(-unigram_log_p(np.bincount(train, minlength=vocab_size))[held_out[1:]].mean())


def bigram_nll(
    train: NDArray[np.integer], held_out: NDArray[np.integer], vocab_size: int, discount: float = 0.75
) -> float:
    """NLL of ``held_out[1:]`` under a bigram model of ``train``. Nats per token.

    The model uses absolute discounting with Kneser-Ney backoff (Kneser and Ney, 1995), which is stronger than plain counts:

        p(b|a) = max(c(ab) - d, 0) / c(a) + d * types(a) / c(a) * p_kn(b)

    c counts occurrences in ``train``, types(a) is the number of distinct tokens after a, and p_kn(b) is proportional to
    the number of distinct tokens before b plus one.

    Args:
        train, held_out: token ids, 1-dimensional.
        discount: d.
    """
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    before, after = pairs // vocab_size, pairs % vocab_size
    total = np.bincount(before, weights=counts, minlength=vocab_size)
    types = np.bincount(before, minlength=vocab_size)
    continuation = np.bincount(after, minlength=vocab_size) + 1.0
    continuation /= continuation.sum()

    wanted = held_out[:-1].astype(np.int64) * vocab_size + held_out[1:]
    where = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[where] == wanted, counts[where], 0)
    context = held_out[:-1]
    seen = total[context] > 0
    denominator = np.where(seen, total[context], 1)
    backoff = np.where(seen, discount * types[context] / denominator, 1.0)
    p = np.where(seen, np.maximum(count - discount, 0) / denominator, 0) + backoff * continuation[held_out[1:]]
    return float(-np.log(p).mean())
