"""Sequences that begin alike, run as one row: a tree of tokens in which each position sees what leads to it.

The choices of a question, or two sentences with one beginning, are a trunk and its branches. Laid out branch after branch
they are one row: the trunk is run once, and a mask (`Tree`), rotary tables (`Placed`) and noise (`PlacedNoise`) by place
in the sequence instead of place in the row give every position what it would have had alone.

    sequences (5 6 7), (5 6 8 9), (5 4)  ->  row 5 4 6 7 8 9, places 0 1 1 2 2 3

Shapes: B rows, T positions of a row, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recurrent_db.model.attention import SDPA, Rule, Sees, Visible, to_device
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource

Tokens = tuple[int, ...]


def common_length(a: Tokens, b: Tokens) -> int:
    """How many positions two sequences begin with together."""
    shorter = min(len(a), len(b))
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), shorter)


@dataclass
class Row:
    """A row being laid out: sequences are added in sorted order."""

    tokens: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    """Of each sequence, the row's positions that hold it."""

    def add(self, sequence: Tokens, common: int) -> None:
        """Add a sequence whose first ``common`` positions are the last one's."""
        path = self.paths[-1][:common] if self.paths else []
        first = len(self.tokens)
        self.tokens += sequence[common:]
        self.paths.append([*path, *range(first, len(self.tokens))])

    @classmethod
    def of(cls, sequences: Sequence[Tokens]) -> Row:
        """The row of sorted sequences."""
        row = cls()
        for before, sequence in itertools.pairwise([(), *sequences]):
            row.add(sequence, common_length(before, sequence))
        return row

    @property
    def branches(self) -> bool:
        """Whether it is more than one sequence from first token to last."""
        return self.paths[-1] != list(range(len(self.tokens)))


@dataclass(frozen=True, eq=False)
class Tree(Rule):
    """A rule for rows of trees: a position sees those that lead to it, and itself.

    ``docs_BS`` calls every position a document, so that none of the simpler forms of a rule is taken for it.
    """

    seen_BTT: Tensor = field(kw_only=True)
    """bool, on the CPU: whether the second position leads to the first, or is it."""

    def sees(self, device: torch.device) -> Sees:
        seen_BTT, positions, stream = to_device(self.seen_BTT, device), self.positions, self.stream

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            there = j % positions
            seen = seen_BTT[b, i, there]
            if stream == "own":
                return seen
            return (seen & (j < positions)) | (j == positions + i)

        return sees


@dataclass(eq=False)
class Placed:
    """What a pass over trees has in place of a past (`model.attention.Past`): the rotary tables of its places."""

    rope: tuple[Tensor, Tensor]

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        return k_BHTE, v_BHTE


@dataclass(frozen=True)
class PlacedNoise(NoiseSource):
    """Noise by place in a sequence; rows of one request share what is drawn."""

    places_BT: Tensor = field(kw_only=True)
    """int64, on the CPU; (1, T) where all rows have the same."""

    def _pages(self, length: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        requests, which_B = self.requests.unique(return_inverse=True)
        source = NoiseSource(self.rng, requests, self.page, self.draw)
        draw: Callable[..., Tensor] = source.normal if normal else source.uniform
        drawn = draw(int(self.places_BT.max()) + 1, width, stream, device)
        return drawn[to_device(which_B[:, None], device), to_device(self.places_BT, device)]


def lay_out(model: LoopedLM, rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor, Visible | None]:
    """Tokens (B, T) on the model's device, padded on the right with ``pad``; their places, for `PlacedNoise`; and who sees
    whom, None where rows without branches make it the ordinary causal rule. Ask under the autocast that the pass runs
    under."""
    length = max(len(row.tokens) for row in rows)
    device = model.embedding.weight.device
    tokens_BT = torch.tensor([row.tokens + [pad] * (length - len(row.tokens)) for row in rows], device=device)
    # Right padding: no position of a causal model sees what comes after it.
    if not any(row.branches for row in rows):
        return tokens_BT, torch.arange(length)[None], None
    places_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    seen_BTT = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for places_T, seen_TT, row in zip(places_BT, seen_BTT, rows, strict=True):
        done = -1
        for path in row.paths:
            # A sequence's own part is the end of its path, and what leads to it the path up to there.
            new = [i for i, position in enumerate(path) if position > done]
            if not new:
                continue
            own = torch.tensor(path[new[0] :])
            places_T[own] = torch.arange(new[0], len(path))
            seen_TT[own[:, None], torch.tensor(path)] = (
                torch.arange(len(path)) <= torch.arange(new[0], len(path))[:, None]
            )
            done = path[-1]
    each = torch.arange(length).repeat(len(rows), 1)
    rule = Tree(length, length, each, seen_BTT=seen_BTT)
    cos_SF, sin_SF = model.rope(int(places_BT.max()) + 1)
    at = to_device(places_BT, device)
    past = Placed((cos_SF[at], sin_SF[at]))
    dtype = model.served(Rule(length, length)).dtype
    return tokens_BT, places_BT, Visible.make(rule, device, dtype, SDPA, past=past)
