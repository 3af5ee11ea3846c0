"""Maps a noise level, and a second condition such as a class, to the modulation of a network's layers."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """Maps c_noise = ln(sigma) / 4 to the modulation of every core layer, with one matrix product for all layers.

    It has Fourier features of c_noise (fp32, as in EDM), a hidden layer, and a projection to n_blocks * parts * D numbers.
    The projection starts at zero, so a new model ignores the noise level.
    """

    def __init__(self, dim: int, n_blocks: int, hidden: int, parts: int = 6) -> None:
        super().__init__()
        self.n_blocks, self.dim, self.n_features, self.parts = n_blocks, dim, hidden, parts
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, n_blocks * parts * dim)

    def forward(self, c_noise_Bs: Tensor, beside: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """c_noise: fp32 (B, 1) for one level per sequence, or (B, T) for one per token. ``beside``: embedding of another
        condition, added before the hidden layer's SiLU. Returns for each layer a tuple of ``parts`` tensors, (B, 1, D) or
        (B, T, D)."""
        # Frequencies from 1/4 to 64 cycles per unit of c_noise resolve both its range (about 3) and 0.1 in ln sigma.
        half = self.n_features // 2
        rates = torch.exp(torch.linspace(math.log(0.25), math.log(64.0), half, device=c_noise_Bs.device))
        angles = c_noise_Bs.float()[..., None] * rates * 2 * math.pi
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        if self.n_features % 2:
            features = F.pad(features, (0, 1))
        device_type = c_noise_Bs.device.type
        # Noise conditioning stays fp32 under autocast. The meta device has no autocast.
        with torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext():
            hidden = self.hidden(features.to(self.hidden.weight.dtype))
            flat = self.out(F.silu(hidden if beside is None else hidden + beside))
        return [block.chunk(self.parts, dim=-1) for block in flat.chunk(self.n_blocks, dim=-1)]
