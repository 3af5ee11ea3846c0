"""Builds networks for images: `vit.ViT`, or layers of a ViT or DiT in blocks (`denoise.convert.DiffusionBlocks`)."""

from __future__ import annotations

import math

import torch
from torch import nn

from recurrent_db.config import Config
from recurrent_db.denoise.convert import DiffusionBlocks, convert
from recurrent_db.denoise.noise import LogNormal
from recurrent_db.errors import UserError
from recurrent_db.model.dit import DiTLayer, ImageFrame
from recurrent_db.model.vit import ClassFrame, Patches, ViT, sine_positions, vit_layers
from recurrent_db.objective_config import ImageBlocksConfig
from recurrent_db.rng import key

PIXEL_SD = 0.5
"""Standard deviation assumed for pixels in [-1, 1], as in EDM (arXiv 2206.00364) and the paper."""


def build_image_network(config: Config, seed: int | None, device: torch.device | str = "cpu") -> ViT | DiffusionBlocks:
    """Build the network of a configuration for images. With ``blocks.only`` it holds that block alone.

    Args:
        config: with ``model.image_size`` and ``model.n_classes`` set.
        seed: seed of the initial weights; None leaves them uninitialised. Each block's weights depend on the seed and the
            block's number only.
        device: weights are drawn on the CPU. On ``meta`` the network has no storage.

    Raises:
        UserError: the image size or number of classes is not set, or transformers is missing.
    """
    if len(config.model.image_size) != 2 or config.model.n_classes < 1:
        raise UserError("the size and classes of the images are not set: set data.path to use its images'")
    with torch.device("meta"):
        network = _blocks(config) if config.model.n_blocks else ViT(config.model)
    if torch.device(device).type == "meta":
        return network
    network = network.to_empty(device="cpu")
    if seed is not None:
        initialize(network, key(seed, "weights"))
    return network.to(device)


def _blocks(config: Config) -> DiffusionBlocks:
    model, own, blocks = config.model, config.objective.own, config.blocks
    assert isinstance(own, ImageBlocksConfig)
    classify = model.network == "vit"
    layers = (
        vit_layers(model)
        if classify
        else [DiTLayer(model.d_model, model.n_heads, model.d_mlp) for _ in range(model.n_core)]
    )
    network = convert(
        layers, model.n_blocks, LogNormal(own.p_mean, own.p_std, own.sigma_min, own.sigma_max), model.d_model,
        sd=1 / math.sqrt(model.d_model) if classify else PIXEL_SD,
        layers=model.block_layers, gamma=blocks.gamma, uniform=blocks.partition == "uniform", d_condition=model.d_condition,
        frame=ClassFrame(model) if classify else ImageFrame(model), shared=blocks.shared, owner=blocks.owner,
        classes=0 if classify else model.n_classes, label_dropout=own.label_dropout,
        modulation="norms" if classify else "inside", atom=own.atom, mute=classify,
    )  # fmt: skip
    if blocks.only:
        network.keep(blocks.only)
    return network


@torch.no_grad()
def initialize(network: ViT | DiffusionBlocks, seed: int) -> None:
    """Draw initial weights, in place, on the CPU.

    Matrices are Glorot-uniform, as in ViT and DiT. Biases are zero and norms one. Class embeddings are orthonormal as far as
    there is room, else normal. Positions start as sines, with which attention finds neighbours early. Noise conditioning and
    a DiT's output layer start at zero.
    """
    if isinstance(network, ViT):
        return _initialize(network, torch.Generator().manual_seed(key(seed, "network")))
    for number in network.held():
        block, frame = network.block(number), network.block(number).frame
        block.frame = None
        _initialize(block, torch.Generator().manual_seed(key(seed, "block", number)))
        block.frame = frame
        # Copies of the frame start equal, so all blocks have the same targets.
        if frame is not None:
            _initialize(frame, torch.Generator().manual_seed(key(seed, "frame")))
    if network.frame is not None:
        _initialize(network.frame, torch.Generator().manual_seed(key(seed, "frame")))


def _initialize(part: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in part.named_parameters():
        owner = part.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.LayerNorm) and name.endswith("weight"):
            nn.init.ones_(parameter)
        elif name.startswith("conditioning.out.") or name.startswith("out.") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif isinstance(owner, Patches) and name.endswith("position"):
            parameter.copy_(sine_positions(owner.grid, parameter.shape[1]))
        elif name.endswith(("token", "labels.weight")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name == "conditioning.hidden.weight":
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif name == "targets":
            rows = torch.randn(parameter.shape, generator=generator)
            if len(rows) <= rows.shape[1]:
                rows = torch.linalg.qr(rows.mT.double()).Q.mT.to(rows.dtype)
            parameter.copy_(nn.functional.normalize(rows, dim=-1))
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
