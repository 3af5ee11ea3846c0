"""Diffusion transformer in blocks (DiT, arXiv 2212.09748; DiffusionBlocks, arXiv 2506.14202, section 5.2).

It denoises whole images, conditioned on their class. Each layer is modulated by the noise level and the class (adaLN-zero).
The number of blocks may be 1.

Shapes: B images, N patches, D width, H heads, E head size, P patch size in pixels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_db.config import ModelConfig
from recurrent_db.denoise.frame import Frame
from recurrent_db.model.vit import Patches


class DiTLayer(nn.Module):
    """Attention and MLP. Each has a norm without weights, a shift and scale after it, and a gate (adaLN-zero)."""

    def __init__(self, width: int, n_heads: int, d_mlp: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, d_mlp), nn.Linear(d_mlp, width)

    def forward(self, x_BND: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """``modulation``: shift, scale and gate of attention, then of the MLP, each (B, 1, D). At zero, the layer returns
        its input."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        x_BND = x_BND + gate * self._attend(self._norm(x_BND) * (1 + scale) + shift)
        seen_BND = self._norm(x_BND) * (1 + scale_mlp) + shift_mlp
        return x_BND + gate_mlp * self.down(F.gelu(self.up(seen_BND), approximate="tanh"))

    def _norm(self, x_BND: Tensor) -> Tensor:
        return F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6)

    def _attend(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, E) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class ImageFrame(Frame):
    """What surrounds a DiT's layers: images are cut into patches and put together again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patches, self.size = Patches(config), config.patch_size
        self.norm, self.out = nn.LayerNorm(config.d_model), nn.Linear(config.d_model, 3 * self.size**2)
        self.image_size = tuple(config.image_size)

    def embed(self, view: Tensor, x: Any) -> Tensor:
        return self.patches(view)

    def read(self, hidden: Tensor, x: Any) -> Tensor:
        return F.fold(self.out(self.norm(hidden)).mT, self.image_size, self.size, stride=self.size)
