"""Measures of text against brute force, their intervals against the truth, and MAUVE's two ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurrent_db.evaluation.judge import Reading
from recurrent_db.evaluation.text_metrics import (
    COLUMNS,
    cells,
    distinct,
    half_samples,
    has_mauve,
    heading,
    interval,
    mauve_score,
    measure,
    rank,
    repetition,
)

TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6)


def all_ngrams(texts: Sequence[Sequence[int]], n: int) -> list[str]:
    return [",".join(map(str, text[i : i + n])) for text in texts for i in range(len(text)) if i + n <= len(text)]


@given(TEXTS, st.integers(1, 4))
def test_distinct_against_brute_force(texts: list[list[int]], n: int) -> None:
    found = all_ngrams(texts, n)
    if found:
        assert distinct(texts, n) == len(set(found)) / len(found)
    else:
        assert math.isnan(distinct(texts, n))


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(1, 4))
def test_repetition_is_the_share_of_ngrams_that_came_before(text: list[int], n: int) -> None:
    found = all_ngrams([text], n)
    again = sum(found[i] in found[:i] for i in range(len(found)))
    assert repetition(text, n) == pytest.approx(again / len(found) if found else 0.0)


def test_by_hand() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12 21 12 | 12
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == 0.0


# ---------------------------------------------------------------------------------------------------------------


def test_halves_are_halves() -> None:
    halves = half_samples(21, 50, seed=3)
    assert all(len(set(half.tolist())) == 10 and half.max() < 21 for half in halves)
    assert np.array_equal(halves[4], half_samples(21, 50, seed=3)[4])
    assert not np.array_equal(halves[4], half_samples(21, 50, seed=4)[4])


def test_intervals_cover_the_truth() -> None:
    """Of 400 intervals of a mean of 60 skewed numbers, about 95 percent hold the true mean; the expected width is that of
    the normal approximation."""
    rng = np.random.default_rng(0)
    halves, covered, widths = half_samples(60, 200), 0, []
    for _ in range(400):
        x = rng.gamma(4.0, size=60)
        low, high = interval(x.mean(), [x[half].mean() for half in halves])
        covered += low <= 4.0 <= high
        widths.append(high - low)
    assert 0.90 <= covered / 400 <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / math.sqrt(60), rel=0.06)


def test_an_interval_of_distinct_holds_its_value() -> None:
    """Distinct-2 of half of the texts is higher than that of all: the interval is moved, so that it is about the value."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 20, size=(60, 20)).tolist()
    value = distinct(texts, 2)
    parts = [distinct([texts[i] for i in half], 2) for half in half_samples(60, 100)]
    assert min(parts) > value + 0.05
    low, high = interval(value, parts)
    assert low < value < high
    assert high - low < 0.05


def test_no_resamples_no_interval() -> None:
    assert all(map(math.isnan, interval(1.0, [])))


def test_ranks() -> None:
    distinct_2 = [0.80, 0.771, 0.829, 0.76, 0.85, 0.79, 0.8, None]
    perplexity = [30.0, 20.0, 25.0, 1.0, 2.0, 20.0, None, 3.0]
    rows = [{"distinct_2": d, "generative_ppl": p} for d, p in zip(distinct_2, perplexity, strict=True)]
    real = {"distinct_2": 0.80, "generative_ppl": 10.0}
    rank(real, rows)
    assert [row["rank"] for row in rows] == [4, 1, 3, None, None, 1, None, None]
    assert [row["ranked"] for row in rows] == [row["rank"] is not None for row in rows]
    assert real["ranked"] is False and real["rank"] is None
    rank({"distinct_2": None, "generative_ppl": None}, rows)
    assert not any(row["ranked"] for row in rows)


def test_cells_stand_under_their_headings() -> None:
    row = {**dict.fromkeys(COLUMNS, 0.5), "mauve": None, "intervals": {"distinct_2": [0.4, 0.62]}}
    line = cells(row)
    assert len(line) == len(heading())
    assert line.split() == ["-", "0.500", "0.5", "0.500", "0.500", "0.500", "±0.110", "0.500", "0.500"]


# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_mauve(), reason="mauve-text is not installed (extra `mauve`)")
def test_mauve_is_near_one_for_one_distribution_and_far_lower_for_two(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    p, q, shifted = rng.normal(size=(400, 16)), rng.normal(size=(400, 16)), rng.normal(2.0, size=(400, 16))
    same, other = mauve_score(p, q), mauve_score(p, shifted)
    assert same > 0.95
    assert other < 0.1
    assert same == mauve_score(p, q)
    assert mauve_score(p, p) == pytest.approx(1.0)
    assert capfd.readouterr().err == ""  # faiss has its say in C++ otherwise


def reading(ids: list[list[int]], nats: list[float], features: np.ndarray) -> Reading:
    lengths = np.array([len(one) for one in ids])
    features = features.astype(np.float32)
    return Reading(np.array(nats), lengths, 3 * lengths, features, features[:, ::-1], ids)


def test_measures_of_two_sets() -> None:
    """Perplexity pools the sets; distinct-n and repetition are means over them."""
    features = np.zeros((2, 3))
    one = reading([[1, 1, 1, 1, 1], [1, 2, 3, 4]], [2.0, 4.0], features)
    two = reading([[1, 2, 3, 4, 5], [6, 7]], [1.0, 3.0], features)
    found = measure([one, two], None, half_samples(2, 20))
    assert found.values["generative_ppl"] == pytest.approx(math.exp(10 / 16))
    assert found.values["bits_per_byte"] == pytest.approx(10 / math.log(2) / 48)
    assert found.values["distinct_2"] == pytest.approx((4 / 7 + 5 / 5) / 2)
    assert found.values["repetition"] == pytest.approx((1 / 2 + 0 + 0 + 0) / 4)
    assert "mauve" not in found.values
    for name, value in found.values.items():
        low, high = found.intervals[name]
        assert low <= value + 1e-12 and value <= high + 1e-12, name
    low, high = found.intervals["generative_ppl"]  # of the two prompts by themselves, in nats: 3/10 and 7/6
    assert math.log(high / low) == pytest.approx(7 / 6 - 3 / 10)


def test_empty_texts_have_no_perplexity() -> None:
    found = measure([reading([[], []], [0.0, 0.0], np.zeros((2, 3)))], None, half_samples(2, 5))
    assert set(found.values) == {"repetition"}


@pytest.mark.skipif(not has_mauve(), reason="mauve-text is not installed (extra `mauve`)")
def test_measured_mauve_is_the_librarys() -> None:
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(60, 8)), rng.normal(0.5, size=(60, 8))
    texts = [[i, i + 1] for i in range(60)]
    p, q = reading(texts, [1.0] * 60, real), reading(texts, [1.0] * 60, made)
    found = measure([q], p, half_samples(60, 20))
    assert found.values["mauve"] == mauve_score(p.features, q.features)
    assert found.values["mauve_mean"] == mauve_score(p.mean_features, q.mean_features)
    low, high = found.intervals["mauve"]
    assert 0 <= low < found.values["mauve"] < high <= 1
