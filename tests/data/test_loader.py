"""The loader: its permutation, its batches, their order."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data import Loader, Slots, TokenData, open_data, permute, validation_batches
from recurrent_db.errors import UserError

pytestmark = pytest.mark.fast

EOS = 2


@given(st.integers(1, 3000), st.integers(-(2**63), 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), np.arange(n))
    assert permute(n // 2, n, key) == image[n // 2]


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
@settings(deadline=None, max_examples=50)
def test_permute_stays_in_range_and_is_injective(n: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    image = permute(index, n, key)
    assert 0 <= image.min() <= image.max() < n
    assert len(np.unique(image)) == len(index)


def test_permute_mixes() -> None:
    """Each index goes to each place about equally often over keys, and neighbours do not stay neighbours."""
    n, keys = 10, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 81 + 6 * (
        2 * 81
    ) ** 0.5  # chi squared, 81 degrees of freedom
    image = permute(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(image)) == 1) < 0.01
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match="range"):
            permute(wrong, 10, 0)


def numbered(*sequences: int, T: int = 8) -> TokenData:
    """Sources of so many sequences; every token names its source and place, so that a sample can be recognised."""
    arrays = {}
    for number, count in enumerate(sequences):
        arrays[f"s{number}"] = (np.arange(count * T + 1) + 10 + 10_000 * number).astype("<u4")
    return TokenData.from_arrays(arrays, vocab_size=100_000, eos_id=EOS)


def test_targets_are_the_next_tokens(data_dir: Path) -> None:
    data = open_data(data_dir, "train")
    batch = Loader(data, 32, 16, seed=3).batch(2)
    assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.doc_ids_BT.shape == (16, 32)
    assert (batch.tokens_BT.dtype, batch.targets_BT.dtype) == (torch.int64, torch.int64)
    assert (batch.doc_ids_BT.dtype, batch.sample_index_B.dtype) == (torch.int32, torch.int64)
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert batch.sample_index_B.tolist() == list(range(32, 48))
    part = batch.slice(3, 5)
    assert len(part) == 2
    assert torch.equal(part.to("cpu").tokens_BT, batch.tokens_BT[3:5])


def test_document_numbers() -> None:
    ids = np.array([7, 7, EOS, 8, EOS, EOS, 9, 9, 9], dtype=np.uint16)
    batch = Loader(TokenData.from_arrays({"a": ids}, 10, EOS), 8, 1).batch(0)
    assert batch.tokens_BT.tolist() == [[7, 7, 2, 8, 2, 2, 9, 9]]
    assert batch.targets_BT.tolist() == [[7, 2, 8, 2, 2, 9, 9, 9]]
    assert batch.doc_ids_BT.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**32), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_every_sequence_once_per_epoch(sizes: list[int], seed: int, batch_size: int) -> None:
    T = 8
    loader, total = Loader(numbered(*sizes), T, batch_size, seed), sum(sizes)
    steps = -(-3 * total // batch_size)
    firsts = [int(one) for step in range(steps) for one in loader.batch(step).tokens_BT[:, 0]]
    expected = {10 + 10_000 * number + j * T for number, size in enumerate(sizes) for j in range(size)}
    for epoch in range(3):
        seen = firsts[epoch * total : (epoch + 1) * total]
        assert len(seen) == total
        assert set(seen) == expected
    assert loader.epochs(steps) == pytest.approx(steps * batch_size / total)


def test_epochs_differ_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Loader(numbered(50), 8, 50, seed).batch(epoch).tokens_BT[:, 0].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in itertools.product((0, 1), (0, 1, 2))}) == 6


@given(st.integers(1, 6), st.integers(0, 1000), st.integers(1, 9), st.integers(2, 5))
@settings(deadline=None, max_examples=60)
def test_slots_hold_each_sample_for_their_visits(visits: int, start: int, batch_size: int, samples: int) -> None:
    slots, places = Slots(visits, start), np.arange(batch_size)
    steps = np.arange(start, start + samples * visits)
    held = np.stack([slots.positions(int(step), places, batch_size) for step in steps])
    assert held.dtype == np.int64
    for slot in places.tolist():
        offset = slot % visits  # the first sample is held for so many steps fewer
        order = np.repeat(start + np.arange(samples + 1), visits)[offset : offset + len(steps)]
        np.testing.assert_array_equal(held[:, slot], order * batch_size + slot)
        one = slots.positions(start + 1, np.array([slot]), batch_size)
        assert one.tolist() == [order[1] * batch_size + slot]
    # A new sample begins in every step, where there are enough slots, and each step has samples at every visit.
    if batch_size >= visits:
        for before, after in itertools.pairwise(held):
            assert (before != after).sum() in (batch_size // visits, -(-batch_size // visits))
    # All positions are taken that plain loading takes, from the same one on.
    assert set(range(start * batch_size, (start + samples - 1) * batch_size)) <= set(held.flatten().tolist())
    assert held.min() == start * batch_size


def test_visits_take_the_place_of_epochs() -> None:
    """24 sequences, 6 slots: in an epoch's 12 steps of 3 visits every sequence is seen, 3 times after the first ones."""
    loader = Loader(numbered(24), 8, 6, seed=1)
    loader.slots = Slots(3)
    seen = [loader.batch(step) for step in range(14)]
    first_tokens = {
        int(p): int(t) for one in seen for p, t in zip(one.sample_index_B, one.tokens_BT[:, 0], strict=True)
    }
    assert len({first_tokens[position] for position in range(24)}) == 24
    counts = Counter(int(position) for one in seen for position in one.sample_index_B)
    assert [counts[position] for position in range(24)] == [3, 2, 1] * 2 + [3] * 18


@given(st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 100), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_samples_do_not_depend_on_processes_or_micro_batches(world: int, micro: int, step: int, visits: int) -> None:
    loader = Loader(numbered(30, 11), 8, 8, seed=5, mixture={"s0": 1, "s1": 2})
    loader.slots = Slots(visits, min(step, 3))
    whole = loader.batch(step)
    parts = [part for rank in range(world) for part in loader.micro_batches(step, micro, rank, world)]
    assert max(len(part) for part in parts) <= micro
    for name in ("tokens_BT", "targets_BT", "doc_ids_BT", "sample_index_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(1, 2000))
@settings(deadline=None, max_examples=60)
def test_mixture_shares_hold_from_the_start(weights: list[float], drawn: int) -> None:
    names = [f"s{number}" for number in range(len(weights))]
    loader = Loader(numbered(*[20] * len(weights)), 8, drawn, mixture=dict(zip(names, weights, strict=True)))
    found = Counter((loader.batch(0).tokens_BT[:, 0] // 10_000).tolist())
    by_source = loader.epochs_by_source(1)
    for number, weight in enumerate(weights):
        assert abs(found[number] - drawn * weight / sum(weights)) < len(weights) + 1e-3
        assert by_source[names[number]] == found[number] / 20


def test_positions_far_into_a_run_do_not_overflow() -> None:
    loader = Loader(numbered(1000, 7), 8, 4, mixture={"s0": 0.7, "s1": 0.3})
    positions = np.arange(2**45, 2**45 + 1000)
    source, epoch, sequence = loader.locate(positions)
    assert 690 < (source == 0).sum() < 710
    assert epoch.min() > 0
    assert (sequence[source == 1] < 7).all()


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"other": 1.0}, "no source 'other'"),
        ({"s0": -1.0}, "weight must be"),
        ({"s0": float("nan")}, "weight must be"),
        ({"s0": 0.0}, "above 0"),
    ],
)
def test_bad_mixtures(mixture: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loader(numbered(4, 4), 8, 2, mixture=mixture)


def test_too_little_text_is_a_user_error() -> None:
    data = numbered(3, T=8)
    with pytest.raises(UserError, match="too few for one sequence"):
        Loader(data, 25, 2)
    with pytest.raises(UserError, match="too few for one sequence"):
        next(validation_batches(data, 25, 2))
    with pytest.raises(UserError, match="does not divide"):
        Loader(data, 8, 3).batch(0, rank=0, world=2)
    assert Loader(data, 24, 2).batch(0).tokens_BT[:, 0].tolist() == [10, 10]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 500), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=60)
def test_validation_covers_the_split_evenly(sequences: int, batch_size: int, max_tokens: int, world: int) -> None:
    data = numbered(sequences, 5)
    total = sequences + 5

    def indices(limit: int | None, rank: int = 0, world: int = 1) -> list[int]:
        batches = validation_batches(data, 8, batch_size, limit, rank, world)
        return [index for batch in batches for index in batch.sample_index_B.tolist()]

    assert indices(None) == list(range(total))
    some = indices(max_tokens)
    assert len(some) == min(total, max(1, max_tokens // 8))
    gaps = np.diff([*some, total])
    assert some[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert sorted(itertools.chain(*(indices(max_tokens, rank, world) for rank in range(world)))) == some
