"""Counts the FLOPs of networks for images, by the rules of `flops`. All figures are per position of an image.

Shapes: N positions, D width, M hidden width of the MLP, P patch size, C classes.
"""

from __future__ import annotations

from dataclasses import replace

from recurrent_db.accounting.cost import Cost, part_cost
from recurrent_db.config import ModelConfig
from recurrent_db.denoise.adaln import MODULATIONS
from recurrent_db.model.passes import Passes
from recurrent_db.model.vit import patch_count


def positions(model: ModelConfig) -> int:
    """Positions of an image: its patches, and in a ViT the token of the class."""
    return patch_count(model) + (model.network == "vit")


def image_cost(model: ModelConfig, passes: Passes) -> dict[str, Cost]:
    """FLOPs per position by part of the network.

    Args:
        passes: how often each part runs. ``core_layers`` are the layers of the block, ``tables_grad`` says whether the patch
            embedding and the read-out are trained.
    """
    width, patch = model.d_model, 3 * model.patch_size**2
    count, patches, vit = positions(model), patch_count(model), model.network == "vit"
    layers = passes.core_layers or model.n_core
    runs, reads = (passes.core_no_grad, passes.core_grad), (passes.readouts_no_grad, passes.readouts_grad)
    layer = 4 * width * width + 2 * width * model.d_mlp
    conditioning = Cost()
    if passes.noise_levels:
        first = part_cost(model.d_condition**2, 0, 0, *runs)  # the Fourier features and labels need no product
        places = layers * (2 * MODULATIONS["norms"] if vit else MODULATIONS["inside"])
        out = part_cost(model.d_condition * places * width, 0, 0, *runs)
        conditioning = 1 / count * (Cost(first.forward, 0.0, first.backward_weight) + out)
    embedded = patches * patch * width + (width * width if vit and passes.noise_levels else 0)
    embedding = part_cost(embedded, 0, 0, *runs)  # images need no gradient
    read = part_cost(model.n_classes * width if vit else patches * width * patch, 0, 0, *reads)
    if not passes.tables_grad:
        embedding, read = replace(embedding, backward_weight=0.0), replace(read, backward_weight=0.0)
    return {
        "embedding": 1 / count * replace(embedding, backward_input=0.0),
        "core": part_cost(layers * layer, layers * 4 * width * count, 0, *runs),
        "conditioning": conditioning,
        "head": 1 / count * read,
        "bridge": Cost(forward=passes.bridges * 2 * model.n_classes * width / count),
    }


def forward_flops(model: ModelConfig, layers: int = 0) -> float:
    """Forward FLOPs of evaluating a network once for one image.

    Args:
        layers: layers of the block that is evaluated, in a network in blocks. In a ViT its read-out is followed by a soft
            bridge.
    """
    conditioned = int(model.n_blocks > 0)
    passes = Passes(
        core_no_grad=1, core_grad=0, readouts_no_grad=1, readouts_grad=0, core_layers=layers, noise_levels=conditioned,
        bridges=conditioned if model.network == "vit" else 0,
    )  # fmt: skip
    return positions(model) * sum(cost.forward for cost in image_cost(model, passes).values())
