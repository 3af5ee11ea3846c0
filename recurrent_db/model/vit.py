"""Vision transformer (ViT, arXiv 2010.11929), whole or in blocks (DiffusionBlocks, arXiv 2506.14202, section 5.1).

The layers are those of Hugging Face transformers. The whole network classifies an image from a learned class token. In
blocks, the noised embedding of the class takes that token's place: each block reads it beside the clean patches, and its
read-out names the class.

Shapes: B images, N patches, D width, C classes, P patch size in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_db.config import ModelConfig
from recurrent_db.denoise.frame import Frame
from recurrent_db.errors import UserError


class Patches(nn.Module):
    """Cuts images (B, 3, H, W) into patches, and embeds each with its position: (B, N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.patch_size
        self.grid = (config.image_size[0] // self.size, config.image_size[1] // self.size)
        """Rows and columns of patches."""
        self.embed = nn.Linear(3 * self.size**2, config.d_model)
        self.position = nn.Parameter(torch.empty(patch_count(config), config.d_model))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.embed(F.unfold(images_BCHW, self.size, stride=self.size).mT) + self.position


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, fp32 (rows * columns, width).

    Args:
        grid: numbers of rows and columns.

    A quarter of the width each is for sine and cosine of row and column, with wavelengths from 2 pi to 2 pi * 10,000 (DiT,
    arXiv 2212.09748). What is left of the width is zero.
    """
    quarter = width // 4
    rates = 1e4 ** -(torch.arange(quarter, dtype=torch.float64) / max(1, quarter))
    axes = torch.meshgrid(*(torch.arange(count) for count in grid), indexing="ij")
    angles = [axis.flatten().double()[:, None] * rates for axis in axes]
    parts = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return F.pad(torch.cat(parts, dim=1), (0, width - 4 * quarter)).float()


def patch_count(config: ModelConfig) -> int:
    """Number of patches of an image."""
    height, width = config.image_size
    return (height // config.patch_size) * (width // config.patch_size)


def vit_layers(config: ModelConfig) -> list[nn.Module]:
    """``n_core`` layers of transformers' ViT: pre-norm, biases on all projections, GELU.

    Raises:
        UserError: transformers cannot be imported.
    """
    try:
        from transformers.models.vit.modeling_vit import ViTConfig, ViTLayer
    except (ImportError, RuntimeError) as error:  # transformers raises either where another library is broken
        reason = str(error).partition("\n")[0]
        raise UserError(f"a ViT needs Hugging Face transformers ({reason}): pip install 'recurrent-db[hf]'") from None
    shape = ViTConfig(
        hidden_size=config.d_model, num_attention_heads=config.n_heads, intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_core,
    )  # fmt: skip
    shape._attn_implementation = "sdpa"
    return [ViTLayer(shape) for _ in range(config.n_core)]


class ViT(nn.Module):
    """The whole network: images (B, 3, H, W) to logits (B, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patches, self.token = Patches(config), nn.Parameter(torch.empty(config.d_model))
        self.layers = nn.ModuleList(vit_layers(config))
        self.norm, self.head = nn.LayerNorm(config.d_model), nn.Linear(config.d_model, config.n_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        patches_BND = self.patches(images_BCHW)
        x_BND = torch.cat((self.token.expand(len(patches_BND), 1, -1), patches_BND), dim=1)
        for layer in self.layers:
            out = layer(x_BND)
            x_BND = out[0] if isinstance(out, tuple) else out
        return self.head(self.norm(x_BND[:, 0]))


class ClassFrame(Frame):
    """What surrounds a ViT's layers in blocks: the noised class embedding beside the patches, and the read-out.

    The class embeddings are fixed and of length 1, so all blocks have the same targets. They are orthogonal if there are no
    more classes than D.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.patches, self.token = Patches(config), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.n_classes)
        self.targets = nn.Parameter(torch.empty(config.n_classes, width), requires_grad=False)

    def table(self) -> Tensor:
        return self.targets

    def embed(self, view: Tensor, x: Any) -> Tensor:
        return torch.cat((self.token(view)[:, None], self.patches(x)), dim=1)

    def read(self, hidden: Tensor, x: Any) -> Tensor:
        return self.head(self.norm(hidden[:, 0]))
