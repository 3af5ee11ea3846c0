"""DiffusionBlocks: a stack of residual layers, cut into blocks that train alone (arXiv 2506.14202).

See docs/guides/blocks.md.

    partition = Partition.cut(density, n_blocks, gamma=0.1)        # noise range of each block
    blocks = convert(layers, n_blocks, density, width=64, sd=0.5)  # any layers x -> x + f(x) of one width
    blocks.loss(2, y, u, eps).backward()                           # trains block 2 only
    blocks.walk(eps)                                               # from noise to data, block 1 to block B

A residual stack goes from input to output in small steps, as a reverse diffusion goes from noise to data. The conversion
identifies the two: L layers become B blocks, and block b becomes the denoiser of its own range of noise levels, conditioned
on the level by AdaLN. The loss of a denoiser does not depend on the other denoisers, so each block can be trained alone.

`Partition` alone defines the noise range of each block, for training, scoring and sampling. Blocks are counted from 1; block
1 has the highest noise.

Language models have their own classes: `model.blocks_lm.BlocksLM`, trained by `objectives.denoise_blocks` and
`objectives.masked`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_db.denoise.noise import Density, LogUniform, partition
from recurrent_db.denoise.precond import Precond
from recurrent_db.errors import UserError
from recurrent_db.model.layers import NoiseEmbedding


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

    def levels(self, k: int) -> list[float]:
        """Falling noise levels of a walk of ``k`` steps: the upper ends of k intervals of equal probability.

        At k = B each block makes one step, from the upper end of its range. At k = n B each block makes n steps.
        """
        n = self.n_blocks
        inner = self.law.quantile(1 - torch.arange(k, dtype=torch.float64) / k).tolist()
        # Take the block's exact edge where there is one: a value rounded up would belong to the block before.
        return [self.edges[i * n // k] if i * n % k == 0 else inner[i] for i in range(k)]


def _modulated(layer: nn.Module, x: Tensor, modulation: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Tensor:
    """Condition a residual layer x -> x + f(x): x + (1 + gate) f((1 + scale) x + shift).

    Zeros change nothing (AdaLN-Zero, DiT, arXiv 2212.09748). Raises ValueError if the layer changes the shape of x.
    """
    shift, scale, gate = (m.view(m.shape[0], *[1] * (x.ndim - 2), m.shape[-1]) for m in modulation)
    seen = x + scale * x + shift
    out = layer(seen, *args, **kwargs)
    if out.shape != x.shape:
        raise ValueError(f"a residual layer must keep its input's shape: {tuple(x.shape)} became {tuple(out.shape)}")
    return x + (1 + gate) * (out - seen)


class DenoisingBlock(nn.Module):
    """Some layers of a network, conditioned on the noise level by AdaLN."""

    def __init__(self, layers: Sequence[nn.Module], width: int, d_condition: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.conditioning = NoiseEmbedding(width, len(layers), d_condition, parts=3)
        nn.init.normal_(self.conditioning.hidden.weight, std=d_condition**-0.5)
        for parameter in (self.conditioning.hidden.bias, *self.conditioning.out.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c_noise_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer, modulation in zip(self.layers, self.conditioning(c_noise_B), strict=True):
            x = _modulated(layer, x, modulation, *args, **kwargs)
        return x


class DiffusionBlocks(nn.Module):
    """A network converted by `convert`. Data y and noised data z are (B, ..., width)."""

    def __init__(
        self, blocks: Sequence[DenoisingBlock], partition: Partition, density: Density, precond: Precond
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.partition, self.density, self.precond = partition, density, precond

    def block(self, number: int) -> DenoisingBlock:
        """Block ``number``, from 1. Training it needs its own parameters only. Raises ValueError if there is no such
        block."""
        self.partition.check(number)
        block = self.blocks[number - 1]
        assert isinstance(block, DenoisingBlock)
        return block

    def draw(self, number: int, u: Tensor) -> Tensor:
        """Noise levels in a block's training range from uniform ``u`` in [0, 1), float64."""
        ends = self.density.cdf(torch.tensor(self.partition.range_of(number), dtype=torch.float64))
        return self.density.quantile(ends[0] + u.double() * (ends[1] - ends[0]))

    def denoise(self, number: int, z: Tensor, sigma_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate y from z = y + sigma eps by block ``number``. Further arguments are passed to the layers."""
        sigma_B = sigma_B.to(z.device)
        sigma = sigma_B.to(z.dtype).view(-1, *[1] * (z.ndim - 1))
        out = self.block(number)(self.precond.view(z, sigma), self.precond.c_noise(sigma_B.float()), *args, **kwargs)
        return self.precond.combine(z, out, sigma)

    def loss(self, number: int, y: Tensor, u_B: Tensor, eps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Squared error of block ``number``, weighted so that all noise levels count the same (EDM, arXiv 2206.00364,
        eq. 8).

        Args:
            number: the block, from 1.
            y: data, (B, ..., width).
            u_B: uniform in [0, 1); it determines the noise levels.
            eps: standard normal noise in the shape of ``y``.
        """
        sigma_B = self.draw(number, u_B).to(y.device)
        sigma = sigma_B.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        estimate = self.denoise(number, y + sigma * eps, sigma_B, *args, **kwargs)
        return (self.precond.weight(sigma) * (estimate - y).square()).mean()

    @torch.no_grad()
    def walk(self, eps: Tensor, steps: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        """Generate data from standard normal ``eps`` by Euler steps, starting with block 1. ``steps`` = 0 makes one step per
        block."""
        levels = self.partition.levels(steps or self.partition.n_blocks)
        z = eps * levels[0]
        for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
            sigma_B = torch.full((len(z),), sigma, dtype=torch.float64)
            estimate = self.denoise(self.partition.block_of(sigma), z, sigma_B, *args, **kwargs)
            z = following / sigma * z + (1 - following / sigma) * estimate
        return z


def convert(
    network: Sequence[nn.Module] | nn.Sequential | nn.ModuleList,
    n_blocks: int,
    noise: Density,
    width: int,
    sd: float,
    layers: Sequence[int] = (),
    gamma: float = 0.0,
    uniform: bool = False,
    d_condition: int = 64,
) -> DiffusionBlocks:
    """Cut a stack of residual layers, each x -> x + f(x) on (B, ..., width), into blocks that train alone.

    The layers keep their weights and become part of the result. A projection that starts at zero conditions each of them on
    the noise level, so directly after the conversion they compute what they did before.

    Args:
        network: the layers, in order.
        n_blocks: number of blocks.
        noise: distribution of the noise levels. Blocks get ranges of equal probability, high noise first.
        width: size of the data's last dimension.
        sd: standard deviation of the data per component.
        layers: number of layers in each block; by default as even as possible.
        gamma: overlap of the ranges in training (0.1 for text in arXiv 2506.14202, section 3).
        uniform: use ranges of equal width in ln sigma instead.
        d_condition: width of the noise level's embedding.

    Raises:
        UserError: the layers cannot be split this way, or ``sd`` is not above 0.
    """
    if not 0 < sd < math.inf:
        raise UserError(f"sd, the data's standard deviation, must be above 0, got {sd}")
    stack = list(network)
    parts, start = [], 0
    for count in split_layers(len(stack), n_blocks, layers):
        parts.append(DenoisingBlock(stack[start : start + count], width, d_condition))
        start += count
    return DiffusionBlocks(parts, Partition.cut(noise, n_blocks, gamma, uniform), noise, Precond(sd))
