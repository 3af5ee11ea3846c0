"""ViT and DiT: shapes, initial weights, and their outputs against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from image_runs import image_batch, image_config
from torch import Tensor, nn

from recurrent_db.config import Config, validate
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.errors import UserError
from recurrent_db.model.build import build_network
from recurrent_db.model.dit import DiTLayer, ImageFrame
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.model.vit import ClassFrame, Patches, ViT, patch_count, sine_positions

pytestmark = pytest.mark.fast

transformers = pytest.importorskip("transformers", reason="transformers is not importable")
IN_BLOCKS = ("denoise_class", "denoise_image")
SIZES = ((8, 8), (8, 12))


def blocks_of(config: Config, seed: int = 0) -> DiffusionBlocks:
    network = build_image_network(config, seed)
    assert isinstance(network, DiffusionBlocks)
    return network


def moved(network: nn.Module) -> nn.Module:
    """The network in float64, each parameter off its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return network


@pytest.mark.parametrize("size", SIZES)
def test_shapes(size: tuple[int, int]) -> None:
    batch = image_batch(3, size, classes=7)
    vit = build_image_network(image_config("classify", size=size, classes=7), 0)
    assert isinstance(vit, ViT)
    assert vit(batch.images_BCHW).shape == (3, 7)
    sigma_B = torch.full((3,), 0.4)
    class_blocks = blocks_of(image_config("denoise_class", size=size, classes=7))
    image_blocks = blocks_of(image_config("denoise_image", size=size, classes=7))
    for block in (1, 2, 3):
        assert class_blocks.logits(block, torch.randn(3, 32), sigma_B, x=batch.images_BCHW).shape == (3, 7)
        estimate = image_blocks.denoise(block, batch.images_BCHW, sigma_B, label=batch.labels_B)
        assert estimate.shape == (3, 3, *size)


@pytest.mark.parametrize("shared", ["owned", "frozen", "all"])
@pytest.mark.parametrize("objective", IN_BLOCKS)
def test_a_block_starts_with_the_weights_that_it_has_in_the_whole_network(objective: str, shared: str) -> None:
    more = ["--blocks.shared", shared, "--init.from", "elsewhere"]
    whole = dict(build_network(image_config(objective, *more), 5).named_parameters())
    found: dict[str, Tensor] = {}
    for only in (1, 2, 3):
        alone = dict(build_network(image_config(objective, *more, "--blocks.only", only), 5).named_parameters())
        assert alone.keys() == {name for name in whole if not name.startswith("blocks.") or f"blocks.{only}." in name}
        for name, value in alone.items():
            assert torch.equal(value, whole[name]), name
        found |= alone
    assert found.keys() == whole.keys()
    other = dict(build_network(image_config(objective, *more), 6).named_parameters())
    drawn = [name for name in whole if not torch.equal(whole[name], other[name])]
    same = [name for name in whole if name not in drawn]
    fixed = (".norm", "layernorm", "bias", ".out.", ".position")
    assert all(any(part in name for part in fixed) for name in same)
    # Equal layers of two blocks, and of one block, start with other values; copies of the frame start equal.
    for name in drawn:
        if ".frame." in name:
            assert torch.equal(whole[name], whole[name.replace("blocks.2.", "blocks.1.")])
        elif "blocks.2." in name:
            assert not torch.equal(whole[name], whole[name.replace("blocks.2.", "blocks.1.")]), name


def test_the_scale_of_initial_weights() -> None:
    """Matrices are Glorot-uniform; nothing is left without a value."""
    for objective in ("classify", *IN_BLOCKS):
        network = build_image_network(image_config(objective, "--model.d_model", 64, "--blocks.shared", "all"), 0)
        for name, value in network.named_parameters():
            assert torch.isfinite(value).all()
            if value.ndim == 2 and name.endswith(("up.weight", "intermediate.dense.weight")):
                bound = math.sqrt(6 / sum(value.shape))
                assert 0.9 * bound < value.abs().max() <= bound
            if name.endswith("bias"):
                assert not value.any(), name


@pytest.mark.parametrize("width", [16, 30])
def test_positions_start_as_sines(width: int) -> None:
    """Entry by entry, and near patches are more alike than far ones."""
    rows, columns = 3, 4
    found = sine_positions((rows, columns), width)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            expected = []
            for wave, at in ((math.sin, row), (math.cos, row), (math.sin, column), (math.cos, column)):
                expected += [wave(at / 10_000 ** (i / quarter)) for i in range(quarter)]
            expected += [0.0] * (width - 4 * quarter)
            assert found[row * columns + column].tolist() == pytest.approx(expected, abs=1e-6)
    alike = found @ found[0]
    assert alike[0] > alike[1] > alike[2]
    assert alike[0] > alike[columns] > alike[2 * columns]
    network = build_image_network(image_config("classify", size=(6, 8)), 0)
    torch.testing.assert_close(network.get_parameter("patches.position"), sine_positions((3, 4), 32))


def test_class_targets_are_orthonormal_and_the_same_in_all_blocks() -> None:
    network = blocks_of(image_config("denoise_class", "--blocks.shared", "all"))
    for block in (1, 2, 3):
        rows_CD = network.targets(block, torch.arange(10))
        torch.testing.assert_close(rows_CD @ rows_CD.mT, torch.eye(10), rtol=0, atol=1e-5)
        assert torch.equal(rows_CD, network.targets(1, torch.arange(10)))
        assert not any(p.requires_grad for name, p in network.named_parameters() if name.endswith("targets"))
    many = blocks_of(image_config("denoise_class", classes=50)).targets(1, torch.arange(50))
    torch.testing.assert_close(many.norm(dim=-1), torch.ones(50))
    assert (many @ many.mT - torch.eye(50)).abs().max() < 0.8


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_vit_is_that_of_transformers(size: tuple[int, int]) -> None:
    config = image_config("classify", size=size, classes=7)
    ours = moved(build_image_network(config, 0))
    shape = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=3, image_size=size, patch_size=2,
        num_labels=7, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(shape).double().eval()
    weights = dict(ours.named_parameters())
    renamed = {f"vit.encoder.layer.{name[7:]}": value for name, value in weights.items() if name.startswith("layers.")}
    if not any(name.startswith("vit.encoder.") for name in theirs.state_dict()):
        renamed = {name.replace("vit.encoder.layer.", "vit.layers."): value for name, value in renamed.items()}
    position = torch.cat((torch.zeros(1, 32, dtype=torch.float64), weights["patches.position"]))
    theirs.load_state_dict({
        **renamed,
        "vit.embeddings.cls_token": weights["token"].view(1, 1, -1),
        "vit.embeddings.position_embeddings": position[None],
        "vit.embeddings.patch_embeddings.projection.weight": weights["patches.embed.weight"].view(32, 3, 2, 2),
        "vit.embeddings.patch_embeddings.projection.bias": weights["patches.embed.bias"],
        "vit.layernorm.weight": weights["norm.weight"], "vit.layernorm.bias": weights["norm.bias"],
        "classifier.weight": weights["head.weight"], "classifier.bias": weights["head.bias"],
    })  # fmt: skip
    theirs.vit.layernorm.eps = 1e-5
    images_BCHW = image_batch(3, size).images_BCHW.double()
    # Their softmax is fp32.
    torch.testing.assert_close(
        ours(images_BCHW), theirs(images_BCHW, interpolate_pos_encoding=False).logits, rtol=1e-5, atol=1e-5
    )


def test_a_fresh_dit_returns_a_part_of_its_input() -> None:
    network = blocks_of(image_config("denoise_image"))
    z = 3 * image_batch().images_BCHW
    for block, sigma in ((1, 20.0), (2, 0.3), (3, 0.01)):
        estimate = network.denoise(block, z, torch.full((4,), sigma), label=torch.tensor([0, 1, 9, 10]))
        torch.testing.assert_close(estimate, 0.25 / (sigma**2 + 0.25) * z)


def normed(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def test_a_dit_layer_against_numpy() -> None:
    layer = moved(DiTLayer(12, 3, 20))
    w = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    generator = np.random.default_rng(0)
    x, modulation = generator.normal(size=(2, 5, 12)), generator.normal(size=(6, 2, 1, 12))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    seen = normed(x) * (1 + scale) + shift
    q, k, v = np.split(seen @ w["qkv.weight"].T + w["qkv.bias"], 3, axis=-1)
    heads = []
    for head in range(3):
        own = slice(4 * head, 4 * head + 4)
        scores = np.exp(q[..., own] @ k[..., own].swapaxes(1, 2) / 2)
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., own])
    h = x + gate * (np.concatenate(heads, -1) @ w["proj.weight"].T + w["proj.bias"])
    u = (normed(h) * (1 + scale_mlp) + shift_mlp) @ w["up.weight"].T + w["up.bias"]
    gelu = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    expected = h + gate_mlp * (gelu @ w["down.weight"].T + w["down.bias"])
    ours = layer(torch.from_numpy(x), tuple(torch.from_numpy(modulation)))
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    unchanged = layer(torch.from_numpy(x), (torch.zeros(2, 1, 12, dtype=torch.float64),) * 6)
    assert np.array_equal(unchanged.detach().numpy(), x)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_cut_into_patches_and_put_together_again(size: tuple[int, int]) -> None:
    config = image_config("denoise_image", "--model.d_model", 12, size=size).model  # a patch has 12 numbers
    frame = ImageFrame(config)
    with torch.no_grad():
        for linear in (frame.patches.embed, frame.out):
            linear.weight.copy_(torch.eye(12))
            linear.bias.zero_()
        frame.patches.position.zero_()
    frame.norm = nn.Identity()
    images_BCHW = image_batch(2, size).images_BCHW
    patches_BND = frame.embed(images_BCHW, None)
    height, width = size
    assert patches_BND.shape == (2, height * width // 4, 12) == (2, patch_count(config), 12)
    # Patches are in reading order: the second is to the right of the first.
    assert torch.equal(patches_BND[:, 1], images_BCHW[:, :, :2, 2:4].flatten(1))
    assert torch.equal(patches_BND[:, width // 2], images_BCHW[:, :, 2:4, :2].flatten(1))
    assert torch.equal(frame.read(patches_BND, None), images_BCHW)


def test_the_read_out_of_a_class_sees_its_token_and_the_image() -> None:
    """Each patch and the noised embedding change the logits; the order of patches matters by position alone."""
    network = moved(blocks_of(image_config("denoise_class", "--blocks.shared", "all")))
    z, images, sigma_B = torch.randn(1, 32).double(), image_batch(1).images_BCHW.double(), torch.tensor([0.2])
    z.requires_grad_()
    images.requires_grad_()
    network.logits(2, z, sigma_B, x=images).square().sum().backward()
    assert z.grad is not None and images.grad is not None
    assert (z.grad != 0).all() and (images.grad != 0).all()
    frame = network.block(2).frame
    assert isinstance(frame, ClassFrame)
    embedded = frame.embed(z, images)
    assert torch.equal(embedded[:, 0], frame.token(z)) and torch.equal(embedded[:, 1:], frame.patches(images))


@pytest.mark.parametrize("objective", ["classify", "denoise_image"])
def test_heads_may_have_an_odd_size(objective: str) -> None:
    """Only the rotary embeddings of language models need pairs."""
    config = image_config(objective)
    config.model.d_model, config.model.n_heads = 9, 3
    validate(config)
    build_image_network(config, 0)


def test_networks_that_cannot_be_built() -> None:
    config = image_config("classify")
    config.model.image_size = []
    with pytest.raises(UserError, match="the size and classes of the images are not set"):
        build_image_network(config, 0)
    with pytest.raises(UserError, match="3 layers cannot be cut into 4 blocks"):
        image_config("denoise_class", n=4)
    assert isinstance(build_network(image_config("denoise_image"), None, "meta").frame, ImageFrame)
    assert Patches(image_config("classify").model).position.shape == (16, 32)
