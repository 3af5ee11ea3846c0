"""Runs sequences with a shared prefix in one row of a batch, so that shared prefixes are computed once.

The choices of a question, or sentences with the same beginning, form a tree: a trunk and its branches. One row holds the
tree's tokens, branch after branch. A mask (`TreeRule`) lets each position see only the tokens on its own path from the
root. Rotary tables (`TreePast`) and noise (`TreeNoise`) use a position's place, which is its index in its own sequence.
Every position then computes the same result as in a row of its own.

    sequences (5 4), (5 6 7), (5 6 8 9)  ->  row 5 4 6 7 8 9, places 0 1 1 2 2 3

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


def shared_prefix_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix of two sequences."""
    shorter = min(len(a), len(b))
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), shorter)


@dataclass
class PrefixTree:
    """Sequences in one row. They must be added in sorted order."""

    tokens: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    """For each sequence, its positions in the row."""

    def add(self, sequence: Tokens, common: int) -> None:
        """Add a sequence whose first ``common`` tokens equal those of the sequence added last."""
        path = self.paths[-1][:common] if self.paths else []
        first = len(self.tokens)
        self.tokens += sequence[common:]
        self.paths.append([*path, *range(first, len(self.tokens))])

    @classmethod
    def of(cls, sequences: Sequence[Tokens]) -> PrefixTree:
        """The tree of sorted sequences."""
        tree = cls()
        for before, sequence in itertools.pairwise([(), *sequences]):
            tree.add(sequence, shared_prefix_length(before, sequence))
        return tree

    @property
    def has_branches(self) -> bool:
        """Whether the row holds more than one plain sequence."""
        return self.paths[-1] != list(range(len(self.tokens)))


@dataclass(frozen=True, eq=False)
class TreeRule(Rule):
    """Attention rule for rows of trees: a position sees the positions on its path, and itself.

    ``docs_BS`` makes every position its own document, so that no attention back end replaces the rule by a simpler one.
    """

    seen_BTT: Tensor = field(kw_only=True)
    """bool, on the CPU. [b, i, j]: whether position i sees position j."""

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
class TreePast:
    """Supplies the rotary tables of the places. A forward pass over trees has no real past (`model.attention.Past`)."""

    rope: tuple[Tensor, Tensor]

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        return k_BHTE, v_BHTE


@dataclass(frozen=True)
class TreeNoise(NoiseSource):
    """Noise by place instead of position. Rows of the same request share their noise."""

    places_BT: Tensor = field(kw_only=True)
    """Place of each position, int64, on the CPU; (1, T) if all rows have the same places."""

    def _pages(self, length: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        requests, which_B = self.requests.unique(return_inverse=True)
        source = NoiseSource(self.rng, requests, self.page, self.draw)
        draw: Callable[..., Tensor] = source.normal if normal else source.uniform
        drawn = draw(int(self.places_BT.max()) + 1, width, stream, device)
        return drawn[to_device(which_B[:, None], device), to_device(self.places_BT, device)]


def batch_trees(model: LoopedLM, trees: Sequence[PrefixTree], pad: int) -> tuple[Tensor, Tensor, Visible | None]:
    """Lay out one tree per row. Call it under the autocast context of the forward pass.

    Returns:
        Tokens (B, T) on the model's device, padded on the right with ``pad``; their places, for `TreeNoise`; and the mask,
        or None for the causal mask if no tree has branches.
    """
    length = max(len(tree.tokens) for tree in trees)
    device = model.embedding.weight.device
    tokens_BT = torch.tensor([tree.tokens + [pad] * (length - len(tree.tokens)) for tree in trees], device=device)
    # Right padding is harmless: no position of a causal model sees what comes after it.
    if not any(tree.has_branches for tree in trees):
        return tokens_BT, torch.arange(length)[None], None
    places_BT = torch.zeros(len(trees), length, dtype=torch.int64)
    seen_BTT = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    for places_T, seen_TT, tree in zip(places_BT, seen_BTT, trees, strict=True):
        done = -1
        for path in tree.paths:
            # The sequence's own tokens are the end of its path.
            new = [i for i, position in enumerate(path) if position > done]
            if not new:
                continue
            own = torch.tensor(path[new[0] :])
            places_T[own] = torch.arange(new[0], len(path))
            seen_TT[own[:, None], torch.tensor(path)] = (
                torch.arange(len(path)) <= torch.arange(new[0], len(path))[:, None]
            )
            done = path[-1]
    each = torch.arange(length).repeat(len(trees), 1)
    rule = TreeRule(length, length, each, seen_BTT=seen_BTT)
    cos_SF, sin_SF = model.rope(int(places_BT.max()) + 1)
    at = to_device(places_BT, device)
    past = TreePast((cos_SF[at], sin_SF[at]))
    dtype = model.served(Rule(length, length)).dtype
    return tokens_BT, places_BT, Visible.make(rule, device, dtype, SDPA, past=past)
