"""Metrics of generated text that likelihood misses: variety, repetition, MAUVE, and their confidence intervals.

All are functions of texts as token ids, or of their features. Texts of several models are comparable only if one tokenizer
is used for all of them.

- `distinct`: distinct n-grams divided by all n-grams of a set of texts (Li et al., arXiv:1510.03055). It falls with the
  size of the set, so compare only sets with equally many texts of equal length.
- `repetition`: share of a text's 4-grams that occurred earlier in it; seq-rep-4 of Welleck et al. (arXiv:1908.04319).
- `mauve_score`: area under the divergence curve of two sets of texts (Pillutla et al., arXiv:2102.01454), from given
  features. It depends on the features and on the number of texts, so it is not comparable with published values.
- `interval`: 95 percent intervals by resampling halves.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recurrent_db.rng import key

if TYPE_CHECKING:
    from recurrent_db.evaluation.judge import Reading

DISTINCT = (1, 2, 4)
"""Values of n for distinct-n."""

DISTINCT_MARGIN = 0.03
"""Largest difference to real text's distinct-2 at which a row is ranked. Text with a lower distinct-2 repeats itself; text
with a higher one is noise."""


def ngrams(texts: Sequence[Sequence[int]], n: int) -> list[NDArray[np.int64]]:
    """Each text's n-grams in order, as integers. Equal n-grams have equal integers, across all texts."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        np.array(
            [
                numbers.setdefault(tuple(text[start : start + n]), len(numbers))
                for start in range(max(0, len(text) - n + 1))
            ],
            dtype=np.int64,
        )
        for text in texts
    ]


def distinct_share(numbered: Sequence[NDArray[np.int64]]) -> float:
    """Number of distinct values divided by number of values, over all arrays together; NaN without values."""
    together = np.concatenate(numbered) if numbered else np.empty(0)
    return len(np.unique(together)) / len(together) if len(together) else float("nan")


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams divided by all n-grams of ``texts``. No n-gram spans two texts. NaN without n-grams."""
    return distinct_share(ngrams(texts, n))


def repetition(text: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that occurred earlier in it: 1 - distinct / all. 0 for a text shorter than n."""
    [numbered] = ngrams([text], n)
    return 1 - distinct_share([numbered]) if len(numbered) else 0.0


# ---------------------------------------------------------------------------------------------------------------
# MAUVE


def has_mauve() -> bool:
    """Whether mauve-text can be imported."""
    return _compute_mauve() is not None


def _compute_mauve() -> Callable[..., Any] | None:
    try:
        from mauve import compute_mauve
    except ImportError:
        return None
    return compute_mauve


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning about small clusters that faiss prints to standard error from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def mauve_score(p_ND: NDArray[Any], q_ND: NDArray[Any], buckets: int | None = None, restarts: int = 5) -> float:
    """MAUVE of two sets of features, in (0, 1]; 1 for equal distributions. Uses the library's own settings and seed.

    Args:
        p_ND, q_ND: features, one row per text. The sets may differ in size.
        buckets: number of clusters. The default is a tenth of the smaller set, at least 2.
        restarts: number of runs of k-means; the best one counts.

    Raises:
        ImportError: mauve-text is not installed.
    """
    compute = _compute_mauve()
    if compute is None:
        raise ImportError("mauve-text is not installed")
    with _quiet():
        result = compute(
            p_features=p_ND, q_features=q_ND, num_buckets=buckets or "auto", kmeans_num_redo=restarts, verbose=False
        )
    return float(result.mauve)


def mauve_buckets(texts: int) -> int:
    """The library's default number of clusters for sets of ``texts`` texts."""
    return max(2, round(texts / 10))


# ---------------------------------------------------------------------------------------------------------------
# Intervals


def half_samples(count: int, resamples: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Random halves of range(count), each drawn without replacement.

    The mean over a random half varies around the sample's mean as much as the sample's mean varies around the truth:
    sigma^2 / (n/2) (1 - 1/2) = sigma^2 / n. Halves can therefore replace bootstrap samples. Unlike these, they hold no text
    twice. `distinct` would count a second copy as repetition, and MAUVE as a difference between the sets.
    """
    rng = np.random.default_rng(key("halves", seed))
    return [np.sort(rng.permutation(count)[: count // 2]) for _ in range(resamples)]


def interval(value: float, halves: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of ``value``: quantiles of its values on `half_samples`, shifted to have mean ``value``. The shift is needed
    because some metrics depend on the size of the set. NaN without halves."""
    finite = np.array([half for half in halves if np.isfinite(half)])
    if not len(finite):
        return float("nan"), float("nan")
    tails = (1 - level) / 2
    low, high = np.quantile(finite - finite.mean(), [tails, 1 - tails])
    return value + float(low), value + float(high)


# ---------------------------------------------------------------------------------------------------------------
# All metrics


@dataclass(frozen=True)
class Measures:
    """Metrics of sets of texts by name, with 95 percent intervals. A metric without a value is left out."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def measure(readings: Sequence[Reading], reference: Reading | None, halves: Sequence[NDArray[np.int64]]) -> Measures:
    """Compute all metrics on J sets of N texts. Text i of each set continues prompt i.

    Perplexity and bits per byte pool all sets. Repetition is the mean over texts. Distinct-n and MAUVE depend on the size
    of a set, so they are means over the sets: several generated continuations per prompt stay comparable with one real one.

    Args:
        readings: the judge's reading of each set.
        reference: the judge's reading of real continuations. Without it MAUVE is left out. ``mauve`` uses the features of
            the last token, as in the paper; ``mauve_mean`` uses their mean over the continuation.
        halves: `half_samples` of the N prompts.
    """
    nats_JN, tokens_JN, bytes_JN = (
        np.stack([getattr(reading, name) for reading in readings]) for name in ("nats", "tokens", "bytes")
    )
    repeated_JN = np.array([[repetition(ids) for ids in reading.ids] for reading in readings])
    numbered = {n: [ngrams(reading.ids, n) for reading in readings] for n in DISTINCT}
    buckets = mauve_buckets(nats_JN.shape[1])

    def values(chosen: NDArray[np.int64], restarts: int) -> dict[str, float]:
        nats, tokens = nats_JN[:, chosen].sum(), tokens_JN[:, chosen].sum()
        found = {"nats_per_token": nats / tokens if tokens else np.nan}
        n_bytes = bytes_JN[:, chosen].sum()
        found["bits_per_byte"] = nats / np.log(2) / n_bytes if n_bytes else np.nan
        for n, sets in numbered.items():
            found[f"distinct_{n}"] = np.mean([distinct_share([texts[i] for i in chosen]) for texts in sets])
        found["repetition"] = repeated_JN[:, chosen].mean()
        if reference is not None:
            for name, kind in (("mauve", "features"), ("mauve_mean", "mean_features")):
                real_ND = getattr(reference, kind)[chosen]
                made = [getattr(reading, kind)[chosen] for reading in readings]
                found[name] = np.mean([mauve_score(real_ND, made_ND, buckets, restarts) for made_ND in made])
        return {name: float(value) for name, value in found.items()}

    whole = values(np.arange(nats_JN.shape[1]), restarts=5)
    parts = [values(half, restarts=1) for half in halves]
    spans = {name: interval(value, [part[name] for part in parts]) for name, value in whole.items()}
    for name in whole.keys() - {"nats_per_token", "bits_per_byte"}:
        spans[name] = tuple(np.clip(spans[name], 0, 1).tolist())
    # The interval is computed in nats and exponentiated at the end, because the distribution is less skewed in nats.
    whole["generative_ppl"], spans["generative_ppl"] = (
        np.exp(whole.pop("nats_per_token")),
        tuple(np.exp(spans.pop("nats_per_token")).tolist()),
    )
    known = [name for name, value in whole.items() if np.isfinite(value)]
    return Measures(
        {name: float(whole[name]) for name in known},
        {name: spans[name] for name in known if np.isfinite(spans[name]).all()},
    )


# ---------------------------------------------------------------------------------------------------------------
# Rows of a table. A row is a dict with each metric (or None) under its name, and the intervals under "intervals".

COLUMNS = {
    "mauve": ("MAUVE", 3), "mauve_mean": ("MAUVE-mean", 3), "generative_ppl": ("gen-PPL", 1),
    "bits_per_byte": ("bits/byte", 3), "distinct_1": ("dist-1", 3), "distinct_2": ("dist-2", 3), "distinct_4": ("dist-4", 3),
    "repetition": ("rep-4", 3),
}  # fmt: skip
"""Metrics in the order of the table: heading and number of digits."""


def rank(real: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Add ``ranked`` and ``rank`` to all rows. Rows whose distinct-2 is within `DISTINCT_MARGIN` of real text's are ranked
    from 1 by rising generative perplexity. The others and ``real`` get None. Equal perplexities share a rank."""

    def near(row: dict[str, Any]) -> bool:
        known = None not in (row["distinct_2"], real["distinct_2"], row["generative_ppl"])
        return known and abs(row["distinct_2"] - real["distinct_2"]) <= DISTINCT_MARGIN + 1e-12

    perplexities = [row["generative_ppl"] for row in rows if near(row)]
    for row in (real, *rows):
        row["ranked"] = row is not real and near(row)
        row["rank"] = 1 + sum(other < row["generative_ppl"] for other in perplexities) if row["ranked"] else None


def heading() -> str:
    """Headings of the metrics."""
    return "".join(f"{title:>16}" for title, _ in COLUMNS.values())


def cells(row: dict[str, Any]) -> str:
    """A row's metrics, aligned with `heading`, each with half of its interval's width."""
    line = ""
    for name, (_, digits) in COLUMNS.items():
        value = "-" if row[name] is None else f"{row[name]:.{digits}f}"
        low, high = row["intervals"].get(name, (0.0, 0.0))
        line += f"{value + (f' ±{(high - low) / 2:.{digits}f}' if high > low else ''):>16}"
    return line
