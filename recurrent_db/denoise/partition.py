"""Which block has which noise level.

`Partition` alone defines the noise range of each block, for training, scoring and sampling. Blocks are counted from 1; block
1 has the highest noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recurrent_db.denoise.noise import Density, LogUniform, partition
from recurrent_db.errors import UserError


def split_layers(n_layers: int, n_blocks: int, given: Sequence[int] = ()) -> list[int]:
    """Number of layers in each block: ``given``, or as even as possible with larger blocks first.

    Raises:
        UserError: there are more blocks than layers, or ``given`` does not have ``n_blocks`` positive numbers with sum
            ``n_layers``.
    """
    if not 1 <= n_blocks <= n_layers:
        raise UserError(f"{n_layers} layers cannot be cut into {n_blocks} blocks")
    split = list(given) or [n_layers // n_blocks + (b < n_layers % n_blocks) for b in range(n_blocks)]
    if len(split) != n_blocks or sum(split) != n_layers or min(split) < 1:
        raise UserError(f"{split} does not split {n_layers} layers into {n_blocks} blocks")
    return split


@dataclass(frozen=True)
class Partition:
    """The noise range of each block. Block b, from 1, has (edges[b], edges[b - 1]]; the last block also has sigma_min."""

    law: Density
    """Distribution by which the ranges were cut; `levels` uses it too."""
    edges: tuple[float, ...]
    """Ends of the ranges, from sigma_max down to sigma_min: one more than there are blocks."""
    gamma: float = 0.0
    """Overlap of the ranges in training; see `range_of`."""

    @classmethod
    def cut(cls, density: Density, n_blocks: int, gamma: float = 0.0, uniform: bool = False) -> Partition:
        """Cut ranges of equal probability under ``density``, or with ``uniform`` of equal width in ln sigma (a control)."""
        law = LogUniform(density.sigma_min, density.sigma_max) if uniform else density
        lows = [low for low, _ in partition(law, n_blocks)]
        return cls(law, (density.sigma_max, *lows[::-1]), gamma)

    @property
    def n_blocks(self) -> int:
        return len(self.edges) - 1

    def check(self, block: int) -> None:
        """Raise ValueError if there is no block with this number."""
        if not 1 <= block <= self.n_blocks:
            raise ValueError(f"there is no block {block}: blocks are counted from 1 to {self.n_blocks}")

    def block_of(self, sigma: float) -> int:
        """The block that has this noise level. Raises ValueError if no block has it."""
        if not self.edges[-1] <= sigma <= self.edges[0]:
            raise ValueError(f"noise level {sigma} is outside [{self.edges[-1]}, {self.edges[0]}]")
        return 1 + sum(sigma <= edge for edge in self.edges[1:-1])

    def range_of(self, block: int) -> tuple[float, float]:
        """The noise range (low, high) that a block is trained on.

        It is the block's own range, widened by the factor (high/low)^gamma on both sides, within [sigma_min, sigma_max].
        Raises ValueError if there is no such block.
        """
        self.check(block)
        low, high = self.edges[block], self.edges[block - 1]
        if not self.gamma:
            return low, high
        widening = (high / low) ** self.gamma
        return max(low / widening, self.edges[-1]), min(high * widening, self.edges[0])

    def levels_inside(self, block: int, count: int) -> list[float]:
        """``count`` noise levels spread over a block's own range: the middles of intervals of equal probability, rising."""
        ends = self.law.cdf(torch.tensor([self.edges[block], self.edges[block - 1]], dtype=torch.float64))
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        levels: list[float] = self.law.quantile(ends[0] + shares * (ends[1] - ends[0])).tolist()
        return levels

    def levels(self, k: int) -> list[float]:
        """Falling noise levels of a walk of ``k`` steps: the upper ends of k intervals of equal probability.

        At k = B each block makes one step, from the upper end of its range. At k = n B each block makes n steps.
        """
        n = self.n_blocks
        inner = self.law.quantile(1 - torch.arange(k, dtype=torch.float64) / k).tolist()
        # Take the block's exact edge where there is one: a value rounded up would belong to the block before.
        return [self.edges[i * n // k] if i * n % k == 0 else inner[i] for i in range(k)]
