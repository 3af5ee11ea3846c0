"""The share of the text that is held out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data import holdout
from recurrent_db.data.corpus import Document
from recurrent_db.data.holdout import split_documents


def text_of(size: int, seed: int) -> str:
    """About ``size`` characters: lines of words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(size // 5 + 1)]
    return "".join(word + rng.choices(" \n", (9, 1))[0] for word in words)[:size]


def held(documents: list[Document], share: float) -> float:
    """The share of characters in the validation split. The parts of each text must add up to it."""
    found = list(split_documents("x", documents, share))
    assert "".join(one.text for _, one in found) == "".join(one.text for one in documents)
    return sum(len(one.text) for side, one in found if side == "validation") / sum(len(d.text) for d in documents)


@given(
    st.lists(st.one_of(st.integers(1, 300), st.integers(1, 30_000)), min_size=1, max_size=200),
    st.sampled_from((0.01, 0.05, 0.2, 0.5)),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_the_share_is_near_whatever_the_sizes(sizes: list[int], share: float, seed: int) -> None:
    documents = [Document(str(n), text_of(size, seed + n)) for n, size in enumerate(sizes)]
    total = sum(sizes)
    assert abs(held(documents, share) - share) <= share / 6 + 100 / total


@pytest.mark.parametrize("sizes", [[2000] * 69 + [900_000], [900_000] + [2000] * 69, [300] * 5000, [40_000] * 64])
def test_one_large_document_among_small_ones(sizes: list[int]) -> None:
    documents = [Document(str(n), text_of(size, n)) for n, size in enumerate(sizes)]
    assert held(documents, 0.05) == pytest.approx(0.05, rel=0.1)


def test_documents_after_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is longer than the head is split by hashes, and copies of the head's texts follow the first copy."""
    monkeypatch.setattr(holdout, "HEAD_BYTES", 200_000)
    rng = random.Random(0)
    texts = [text_of(rng.choice((200, 500, 30_000)), n) for n in range(300)]
    documents = [Document(str(n), rng.choice(texts)) for n in range(1500)]
    assert held(documents, 0.1) == pytest.approx(0.1, rel=0.15)
    parts: dict[str, set[str]] = {"train": set(), "validation": set()}
    for side, one in split_documents("x", iter(documents), 0.1):
        parts[side].add(one.text)
    assert not parts["train"] & parts["validation"]


def test_copies_stay_together() -> None:
    many = [Document(str(i), f"text {i % 150} " * 20) for i in range(300)]
    halves = list(split_documents("x", many, 0.2))
    assert [one for _, one in halves] == many
    sides: dict[str, set[str]] = {}
    for side, one in halves:
        sides.setdefault(one.text, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())
    assert sum(side == "validation" for side, _ in halves) == 60


def test_the_end_of_a_long_document_begins_with_a_line() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    halves = list(split_documents("x", [Document("book", text)], 0.1))
    assert [(side, one.id) for side, one in halves] == [("train", "book"), ("validation", "book@end")]
    assert "".join(one.text for _, one in halves) == text
    assert 0.09 < len(halves[1][1].text) / len(text) < 0.11
    assert halves[0][1].text.endswith("\n")
