"""Generated tasks whose answers need many steps, one after the other.

A task draws pairs of token sequences: the model's input, and the answer at each position (not the next token). A sample is a
function of (seed, step, sample) through recurrent_db.rng. Held-out samples use a separate random stream and are the same for
all training seeds.

- `s5`: the running product in the symmetric group on five letters. Token i is an element g_i. The answer at position i is
  g_1 g_2 ... g_i, the product of functions: (a b)(x) = a(b(x)). No constant depth is enough for all lengths, because S5 is
  not solvable and its word problem is complete for NC1 (Barrington, 1989).
- `s5-generators`: the same with only two elements, a transposition and a five-cycle, which generate S5.
- `p-hop`: k-hop induction heads (Sanford, Hsu and Telgarsky, arXiv:2402.09268; p-hop in Saunshi et al., arXiv:2502.17416).
  For a sequence X_1 ... X_N, find(i) is the largest j <= i with X_{j-1} = X_i: the position after the last earlier
  occurrence of the symbol at i, or 0 if there is none. The answer at i is X at the position that k applications of find
  reach from i, or "none" if the chain ends. The first token is k, uniform over 1 to 8, so that one model learns all of them.

  X has six symbols, and no symbol follows itself. With independent draws from four symbols, find(i) = i wherever a symbol
  follows itself; repeating the symbol at i is then right for 63 percent of the two-hop answers, and for 36 to 53 percent
  beyond. Here the best of repeating the symbol at i, i-1 or i-2 is right for 34 percent of the answers at 1 and 2 hops, 20
  percent at 3 and 4, and 18 percent beyond.

Shapes: B samples, T positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recurrent_db.rng import Rng

LETTERS = 5
PERMUTATIONS = list(itertools.permutations(range(LETTERS)))
"""The 120 elements of S5 in lexicographic order; token n stands for the n-th."""
INDEX = {permutation: number for number, permutation in enumerate(PERMUTATIONS)}
PRODUCT = np.array([[INDEX[tuple(a[b[x]] for x in range(LETTERS))] for b in PERMUTATIONS] for a in PERMUTATIONS])
"""PRODUCT[a, b] is the token of a b: b is applied first, then a."""
GENERATORS = [INDEX[1, 0, 2, 3, 4], INDEX[1, 2, 3, 4, 0]]
"""A transposition and a five-cycle."""


class Task(Protocol):
    """Interface of a task."""

    vocab_size: int
    length: int
    """Number of positions in a sample."""
    headline: str
    """Group whose accuracy selects the learning rate."""

    def draw(self, rng: Rng, samples: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 (B, T) each."""
        ...

    def groups(self, tokens_BT: Tensor, targets_BT: Tensor) -> dict[str, Tensor]:
        """Groups of positions whose accuracy is reported: name -> bool (B, T)."""
        ...


class RunningProduct:
    """`s5`; with ``elements``, products of this subset of the group only."""

    def __init__(self, length: int = 32, elements: Sequence[int] = range(len(PERMUTATIONS))) -> None:
        self.length, self.elements, self.vocab_size = length, np.array(elements), len(PERMUTATIONS)
        self.ranges = {"1-8": (1, 8), "9-16": (9, 16), "17-32": (17, 32), "9-32": (9, 32)}
        self.headline = "9-32"

    def draw(self, rng: Rng, samples: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        u_BT = rng.uniform(samples, (self.length,), f"{stream}/elements").numpy()
        tokens_BT = self.elements[(u_BT * len(self.elements)).astype(np.int64)]
        targets_BT = np.empty_like(tokens_BT)
        targets_BT[:, 0] = tokens_BT[:, 0]
        for i in range(1, self.length):
            targets_BT[:, i] = PRODUCT[targets_BT[:, i - 1], tokens_BT[:, i]]
        return torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT)

    def groups(self, tokens_BT: Tensor, targets_BT: Tensor) -> dict[str, Tensor]:
        position_T = torch.arange(1, self.length + 1)
        return {
            name: ((position_T >= first) & (position_T <= last)).expand_as(targets_BT)
            for name, (first, last) in self.ranges.items()
        }


class PHop:
    """`p-hop`. Tokens: the symbols from 0, then "none", then the numbers of hops 1, 2, ..."""

    def __init__(self, length: int = 96, symbols: int = 6, hops: int = 8) -> None:
        self.length, self.symbols, self.hops = length, symbols, hops
        self.none, self.vocab_size, self.headline = symbols, symbols + 1 + hops, "all"

    def draw(self, rng: Rng, samples: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        u_BT = rng.uniform(samples, (self.length,), f"{stream}/symbols").numpy()
        # The first symbol, then each symbol's distance to the previous one: 1 to symbols - 1, never 0.
        jumps_BT = 1 + (u_BT * (self.symbols - 1)).astype(np.int64)
        jumps_BT[:, 1] = u_BT[:, 1] * self.symbols
        tokens_BT = (jumps_BT.cumsum(1) - jumps_BT[:, :1]) % self.symbols
        hops_B = (u_BT[:, 0] * self.hops).astype(np.int64) + 1
        tokens_BT[:, 0] = self.none + hops_B
        # Position 0 holds the number of hops and stands for "none": chains that reach it stay there.
        rows_B, find_BT = np.arange(len(tokens_BT)), np.zeros_like(tokens_BT)
        after_BV = np.zeros((len(tokens_BT), self.symbols), dtype=np.int64)
        for i in range(1, self.length):
            if i > 1:
                after_BV[rows_B, tokens_BT[:, i - 1]] = i
            find_BT[:, i] = after_BV[rows_B, tokens_BT[:, i]]
        place_BT = np.broadcast_to(np.arange(self.length), tokens_BT.shape)
        for hop in range(self.hops):
            place_BT = np.where((hop < hops_B)[:, None], np.take_along_axis(find_BT, place_BT, axis=1), place_BT)
        found_BT = np.take_along_axis(tokens_BT, place_BT, axis=1)
        found_BT[(place_BT == 0)] = self.none
        return torch.from_numpy(tokens_BT), torch.from_numpy(found_BT)

    def groups(self, tokens_BT: Tensor, targets_BT: Tensor) -> dict[str, Tensor]:
        """Groups by number of hops, without the positions whose chain ends."""
        answered_BT = targets_BT != self.none
        hops_B1 = tokens_BT[:, :1] - self.none
        return {
            **{str(hops): answered_BT & (hops_B1 == hops) for hops in range(1, self.hops + 1)},
            "all": answered_BT,
        }


TASKS: dict[str, Task] = {
    "s5": RunningProduct(),
    "s5-generators": RunningProduct(elements=GENERATORS),
    "p-hop": PHop(),
}
