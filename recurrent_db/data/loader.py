"""Batches from token shards. This file defines which tokens form sample p of a run.

Shapes: B sequences, T positions.

Sequence j of a source is tokens j*T to j*T + T inclusive: T inputs and, shifted by one, T targets. Sample p is the p-th
sequence of a run, counted from 0. It is a pure function of (seed, p):

    p -> source      exact shares, from floors of p times a fraction
      -> n           sample p is the n-th drawn from that source
      -> epoch       n // N, where N is the source's number of sequences
      -> sequence    a keyed permutation of range(N) at n % N, with a new key every epoch

The loader has no state to save. A resumed run and a run on another number of processes see the same samples.

`Slots` says which positions a step takes: each once, or each in several steps in a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar, overload

import numpy as np
import torch

from recurrent_db.data.shards import TokenData
from recurrent_db.errors import UserError

_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass
class Batch:
    """B packed sequences of T tokens."""

    tokens_BT: torch.Tensor
    """int64: input tokens."""
    targets_BT: torch.Tensor
    """int64: the token that follows each input token."""
    doc_ids_BT: torch.Tensor
    """int32: number of each token's document within the sequence, from 0. A separator belongs to the document that it
    ends. Stays on the CPU, where the attention mask is built from it."""
    sample_index_B: torch.Tensor
    """int64: each sequence's position p in the run, which keys its random numbers. Stays on the CPU."""

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with tokens and targets on ``device``.

        ``doc_ids_BT`` and ``sample_index_B`` stay on the CPU: masks and noise are prepared from them there, without
        waiting for the device.
        """
        return Batch(
            self.tokens_BT.to(device, non_blocking=True),
            self.targets_BT.to(device, non_blocking=True),
            self.doc_ids_BT,
            self.sample_index_B,
        )

    def pin(self) -> Batch:
        """The batch with tokens and targets in pinned memory, from which `to` copies to a GPU without waiting."""
        return Batch(self.tokens_BT.pin_memory(), self.targets_BT.pin_memory(), self.doc_ids_BT, self.sample_index_B)

    def slice(self, start: int, stop: int) -> Batch:
        """Sequences ``start`` to ``stop`` (exclusive) of the batch, as views."""
        return Batch(*(getattr(self, part.name)[start:stop] for part in fields(self)))


def _mix(value: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood, 2014): hashes 64 bits to 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@overload
def permute(index: int, n: int, key: int) -> int: ...
@overload
def permute(index: np.ndarray, n: int, key: int) -> np.ndarray: ...
def permute(index: int | np.ndarray, n: int, key: int) -> int | np.ndarray:
    """A pseudorandom permutation of range(n), chosen by ``key``, evaluated at ``index`` in O(1) memory.

    A balanced Feistel network permutes the smallest range of 4^h numbers that contains range(n). A result outside
    range(n) is permuted again until it falls inside (cycle walking: fewer than 4 passes on average).

    Args:
        index: in range(n); an int, or an array of integers of any shape.
        key: any int. Only its low 64 bits are used.

    Returns:
        An int, or an int64 array of the shape of ``index``.

    Raises:
        ValueError: an index outside range(n).
    """
    values = np.array(index, dtype=np.int64).reshape(-1)
    if len(values) and (values.min() < 0 or values.max() >= n):
        raise ValueError(f"index outside range({n})")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(_mix((key + number * 0xD1B54A32D192ED03) & _MASK)) for number in range(_ROUNDS)]
    result = values.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        x = result[todo]
        left, right = x >> half, x & mask
        for round_key in keys:
            mixed = (right ^ round_key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        result[todo] = (left << half) | right
        todo = todo[result[todo] >= np.uint64(n)]
    if np.ndim(index) == 0:
        return int(result[0])
    return result.astype(np.int64).reshape(np.shape(index))


@lru_cache(maxsize=256)
def epoch_key(seed: int, source: str, epoch: int) -> int:
    """The key of the permutation of one epoch of a source."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:8], "big")


def _fraction(part: float, whole: float) -> tuple[int, int]:
    """part / whole as integers (a, b) with b <= 2^31. Exact if both are ints and the reduced denominator is in range."""
    if isinstance(part, int) and isinstance(whole, int):
        common = math.gcd(part, whole)
        if whole // common <= 1 << 31:
            return part // common, whole // common
    return min(1 << 31, round(part / whole * (1 << 31))), 1 << 31


def _floor_share(positions: np.ndarray, a: int, b: int) -> np.ndarray:
    """floor(positions * a / b) without overflow, for 0 <= a <= b <= 2^31."""
    cycles, rest = np.divmod(positions, b)
    return cycles * a + rest * a // b


def _make_batch(ids: np.ndarray, data: TokenData, positions: np.ndarray) -> Batch:
    """Build a batch from token ids (B, T + 1), int64, and the sequences' positions (B,).

    Raises:
        UserError: an id is outside the vocabulary. Shards may be damaged after they were checked.
    """
    if ids.max() >= data.vocab_size:
        raise UserError(f"{data.where}: damaged: token id {ids.max()} outside the vocabulary of {data.vocab_size}")
    tokens_BT1 = torch.from_numpy(ids)
    ended = ids[:, :-1] == data.eos_id
    doc_ids = np.zeros(ended.shape, dtype=np.int32)
    np.cumsum(ended[:, :-1], axis=1, out=doc_ids[:, 1:])
    return Batch(
        tokens_BT1[:, :-1].contiguous(),
        tokens_BT1[:, 1:].contiguous(),
        torch.from_numpy(doc_ids),
        torch.from_numpy(positions.astype(np.int64)),
    )


class DeviceBatch(Protocol):
    """A batch that can be moved to a device."""

    def to(self, device: torch.device | str) -> Self:
        """The batch on ``device``."""

    def pin(self) -> Self:
        """The batch in pinned memory."""


AnyBatch = TypeVar("AnyBatch", bound=DeviceBatch)


@dataclass(frozen=True)
class Slots:
    """Which position of the run each slot holds. A slot is a place in the batch, 0 to batch_size - 1.

    From step ``start`` on, a slot holds its sample for ``visits`` steps in a row. Slot s is at visit (step - start + s) mod
    ``visits``, so that a step has samples at every visit. For the same reason most slots hold their very first sample for
    fewer steps.
    """

    visits: int = 1
    start: int = 0

    def positions(self, step: int, slots: np.ndarray, batch_size: int) -> np.ndarray:
        """The position that each of ``slots`` (n,) holds at ``step``, int64 (n,). It is slot + a multiple of batch_size."""
        samples_before = (step - self.start + slots % self.visits) // self.visits
        return (self.start + samples_before) * batch_size + slots


class StepLoader(Generic[AnyBatch]):
    """Batches of a run, addressed by optimizer step. The base of loaders without a state to save.

    ``slots`` can be set: it says which positions of the run a step takes.

    Args:
        batch_size: samples per optimizer step, over all processes.
        seed: seed of the data order.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.slots = batch_size, seed, Slots()

    def gather(self, positions: np.ndarray) -> AnyBatch:
        """The samples at ``positions`` (n,) of the run."""
        raise NotImplementedError

    def _range(self, rank: int, world: int) -> tuple[int, int]:
        """The first slot of process ``rank``, and the slot after its last."""
        if not 0 <= rank < world:
            raise UserError(f"process {rank} is not one of {world} processes, which are counted from 0")
        if self.batch_size % world:
            raise UserError(f"a batch of {self.batch_size} samples does not divide evenly among {world} processes")
        share = self.batch_size // world
        return rank * share, (rank + 1) * share

    def batch(self, step: int, rank: int = 0, world: int = 1, micro: tuple[int, int] | None = None) -> AnyBatch:
        """The part of process ``rank`` in the batch of optimizer step ``step``.

        The whole batch is the samples step * batch_size to (step + 1) * batch_size (exclusive), unless ``slots`` is set.

        Args:
            micro: (start, stop) of a micro-batch within the part; None is all of it.

        Raises:
            UserError: ``batch_size`` is not a multiple of ``world``, or ``rank`` is out of range.
        """
        start, stop = self._range(rank, world)
        if micro is not None:
            start, stop = start + micro[0], min(stop, start + micro[1])
        return self.gather(self.slots.positions(step, np.arange(start, stop, dtype=np.int64), self.batch_size))

    def micro_batches(self, step: int, micro_batch_size: int, rank: int = 0, world: int = 1) -> Iterator[AnyBatch]:
        """`batch` in micro-batches of ``micro_batch_size`` samples. The last one may be smaller."""
        if micro_batch_size < 1:
            raise UserError("the micro-batch size must be at least 1")
        start, stop = self._range(rank, world)
        for begin in range(0, stop - start, micro_batch_size):
            yield self.batch(step, rank, world, (begin, begin + micro_batch_size))


class Loader(StepLoader[Batch]):
    """Batches of a run, addressed by optimizer step. It has no state to save.

    Args:
        data: the training split.
        sequence_length: T, in tokens.
        batch_size: sequences per optimizer step, over all processes.
        seed: seed of the data order.
        mixture: weight of each source by name; they need not sum to 1. Unnamed sources are not used. Without a mixture
            each source is drawn in proportion to its size, so that all sources finish an epoch together.

    Raises:
        UserError: the mixture names an unknown source, a weight is negative or not finite, all weights are 0, or a source
            is shorter than one sequence.
    """

    def __init__(
        self,
        data: TokenData,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        mixture: Mapping[str, float] | None = None,
    ) -> None:
        if sequence_length < 1 or batch_size < 1:
            raise UserError("the sequence length and the batch size must be at least 1")
        super().__init__(batch_size, seed)
        self.data, self.sequence_length = data, sequence_length
        sizes = {name: max(0, (source.tokens - 1) // sequence_length) for name, source in data.sources.items()}
        weights: dict[str, int] | dict[str, float] = sizes
        if mixture:
            for name, weight in mixture.items():
                if name not in sizes:
                    raise UserError(f"data.mixture: no source {name!r} in {data.where}; it has: {', '.join(sizes)}")
                if not (math.isfinite(weight) and weight >= 0):
                    raise UserError(f"data.mixture.{name}: a weight must be 0 or more, not {weight}")
                if weight > 0 and not sizes[name]:
                    raise UserError(_too_short(data, sequence_length, name))
            weights = {name: float(mixture.get(name, 0.0)) for name in sizes}
            if not any(weights.values()):
                raise UserError("data.mixture: at least one weight must be above 0")
        self.names = [name for name, weight in weights.items() if weight > 0]
        if not self.names:
            raise UserError(_too_short(data, sequence_length))
        self.sequences = [sizes[name] for name in self.names]
        chosen = [weights[name] for name in self.names]
        self._shares = [_fraction(weight, sum(chosen[i:])) for i, weight in enumerate(chosen)]
        self._shares[-1] = (1, 1)  # despite rounding, the last source takes all that is left

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For positions p (n,) in the run: index of the source in `names`, epoch, sequence within the source.

        Returns:
            Three int64 arrays of shape (n,).
        """
        source, epoch, sequence = (np.empty(len(positions), dtype=np.int64) for _ in range(3))
        left, rank = np.arange(len(positions)), np.asarray(positions, dtype=np.int64)
        for number, (a, b) in enumerate(self._shares):
            # Of the positions left, this source takes every position q at which floor(q * a / b) increases by one.
            drawn = _floor_share(rank, a, b)
            taken = _floor_share(rank + 1, a, b) > drawn
            mine, n = left[taken], drawn[taken]
            source[mine] = number
            epoch[mine] = n // self.sequences[number]
            sequence[mine] = n % self.sequences[number]
            for e in np.unique(epoch[mine]):
                which = mine[epoch[mine] == e]
                key = epoch_key(self.seed, self.names[number], int(e))
                sequence[which] = permute(sequence[which], self.sequences[number], key)
            left, rank = left[~taken], (rank - drawn)[~taken]
        return source, epoch, sequence

    def gather(self, positions: np.ndarray) -> Batch:
        """The sequences at ``positions`` (n,) of the run."""
        T = self.sequence_length
        source, _, sequence = self.locate(positions)
        ids = np.empty((len(positions), T + 1), dtype=np.int64)
        for target, number, j in zip(ids, source.tolist(), sequence.tolist(), strict=True):
            target[:] = self.data.sources[self.names[number]].read(j * T, T + 1)
        return _make_batch(ids, self.data, positions)

    def epochs(self, step: int) -> float:
        """Epochs after ``step`` optimizer steps: sequences drawn divided by the sequences in all sources used."""
        return step * self.batch_size / sum(self.sequences)

    def epochs_by_source(self, step: int) -> dict[str, float]:
        """`epochs` of each source used. They differ if a mixture is set."""
        left, epochs = np.array([step * self.batch_size]), {}
        for name, sequences, (a, b) in zip(self.names, self.sequences, self._shares, strict=True):
            drawn = _floor_share(left, a, b)
            epochs[name] = int(drawn[0]) / sequences
            left = left - drawn
        return epochs


def _too_short(data: TokenData, sequence_length: int, name: str | None = None) -> str:
    tokens = data.sources[name].tokens if name else data.tokens
    what = f"source {name!r} of {data.where}" if name else f"{data.where}"
    return (
        f"{what} has {tokens} tokens, too few for one sequence of {sequence_length} + 1: "
        f"use more text or a shorter data.sequence_length"
    )


def validation_batches(
    data: TokenData,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches of held-out sequences, in a fixed order.

    Sequences are cut as in `Loader`, source after source. ``sample_index_B`` is a sequence's position in the whole split,
    whatever ``max_tokens`` and ``world`` are. The last batch may be smaller.

    Args:
        max_tokens: tokens to use at most, rounded down to whole sequences. The sequences are spread evenly over the split.
            None uses the whole split.
        rank, world: process ``rank`` gets every ``world``-th sequence, from sequence ``rank`` on. Processes may differ by
            one sequence.

    Raises:
        UserError: at the first batch, if the split is shorter than one sequence.
    """
    T = sequence_length
    names = list(data.sources)
    starts = np.cumsum([0, *(max(0, (data.sources[name].tokens - 1) // T) for name in names)])
    total = int(starts[-1])
    if not total:
        raise UserError(_too_short(data, T))
    count = total if max_tokens is None else min(total, max(1, max_tokens // T))
    chosen = (np.arange(count, dtype=np.int64) * total // count)[rank::world]
    for begin in range(0, len(chosen), batch_size):
        positions = chosen[begin : begin + batch_size]
        ids = np.empty((len(positions), T + 1), dtype=np.int64)
        for target, position in zip(ids, positions.tolist(), strict=True):
            number = int(np.searchsorted(starts, position, side="right")) - 1
            target[:] = data.sources[names[number]].read((position - int(starts[number])) * T, T + 1)
        yield _make_batch(ids, data, positions)
