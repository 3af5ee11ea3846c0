"""The conversion of any stack of residual layers into blocks that train alone."""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch import Tensor, nn

from recurrent_db.denoise.convert import DiffusionBlocks, convert
from recurrent_db.denoise.frame import Frame
from recurrent_db.denoise.noise import LogNormal, Uniform
from recurrent_db.errors import UserError

pytestmark = pytest.mark.fast

LAW = LogNormal(-0.4, 1.0, 0.02, 20.0)
WIDTH = 8


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return x + self.out(torch.tanh(self.into(x + shift)))


class Normed(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.inner = norm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Returns(nn.Module):
    """A layer whose output ``change`` makes from its input."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change, self.weight = change, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.change(x * self.weight)


class ImageFrame(Frame):
    """The whole state is noised: images (B, 3, 4, 4) in patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.position = nn.Parameter(torch.randn(4, WIDTH))

    def embed(self, view: Tensor, x: Any) -> Tensor:
        return self.into(F.unfold(view, 2, stride=2).mT) + self.position

    def read(self, hidden: Tensor, x: Any) -> Tensor:
        return F.fold(self.head(hidden).mT, 4, 2, stride=2)


class ClassFrame(Frame):
    """One token is noised: the embedding of one of 5 classes, beside the patches of a clean image."""

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.patch = nn.Embedding(5, 6), nn.Linear(12, WIDTH)
        self.into, self.norm, self.head = nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 5)

    def table(self) -> Tensor:
        return self.labels.weight

    def embed(self, view: Tensor, x: Any) -> Tensor:
        return torch.cat((self.patch(F.unfold(x, 2, stride=2).mT), self.into(view)[:, None]), dim=1)

    def read(self, hidden: Tensor, x: Any) -> Tensor:
        return self.head(self.norm(hidden[:, -1]))


def transformer_layers(count: int = 4) -> list[nn.Module]:
    return [nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True) for _ in range(count)]


def image_batch(n: int = 6) -> dict[str, Tensor]:
    return {"y": torch.randn(n, 3, 4, 4), "u_B": torch.rand(n), "eps": torch.randn(n, 3, 4, 4)}


def class_batch(n: int = 6) -> dict[str, Tensor]:
    y = torch.arange(n) % 5
    return {"y": y, "u_B": torch.rand(n), "eps": torch.randn(n, 6), "x": torch.randn(n, 3, 4, 4)}


def disturb(blocks: DiffusionBlocks) -> DiffusionBlocks:
    """With weights that differ from a fresh conversion's, so that conditions have an effect."""
    with torch.no_grad():
        for number in range(1, blocks.partition.n_blocks + 1):
            for parameter in blocks.block(number).conditioning.out.parameters():
                parameter.normal_(std=0.1)
    return blocks


# ---------------------------------------------------------------------------------------------------------------------
# A fresh conversion computes what the layers compute


def vit_layers() -> list[nn.Module]:
    vit = pytest.importorskip("transformers.models.vit.modeling_vit", reason="transformers is not importable")
    config = vit.ViTConfig(hidden_size=WIDTH, num_attention_heads=2, intermediate_size=16, num_hidden_layers=4)
    return list(
        vit.ViTModel(config).encoder.layer if hasattr(vit.ViTModel(config), "encoder") else vit.ViTModel(config).layers
    )


def timm_layers() -> list[nn.Module]:
    try:  # with torchvision absent or broken, timm raises errors of several kinds
        block = importlib.import_module("timm.models.vision_transformer").Block
    except Exception as error:
        pytest.skip(f"timm is not importable: {error}")
    return [block(WIDTH, 2) for _ in range(4)]


def dit_layers(norm_type: str = "ada_norm_zero") -> list[nn.Module]:
    try:
        block = importlib.import_module("diffusers.models.attention").BasicTransformerBlock
    except Exception as error:
        pytest.skip(f"diffusers is not importable: {error}")
    return [block(WIDTH, 2, 4, num_embeds_ada_norm=10, norm_type=norm_type) for _ in range(4)]


STACKS: dict[str, Callable[[], list[nn.Module]]] = {
    "vit": vit_layers,
    "timm": timm_layers,
    "dit": dit_layers,
    "torch": transformer_layers,
    "torch, norm first": lambda: [
        nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True) for _ in range(4)
    ],
    "mlp": lambda: [Residual(WIDTH) for _ in range(4)],
    "tuples": lambda: [Returns(lambda x: (x + x.sin(), "attention")) for _ in range(4)],
}


class Levels(Frame):
    """A frame that conditions diffusers' layers."""

    def arguments(self, sigma_B: Tensor, label_B: Tensor | None) -> dict[str, Any]:
        return {"timestep": sigma_B.log() * 100, "class_labels": label_B}


@pytest.mark.parametrize("modulation", ["layers", "norms"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_fresh_conversion_computes_what_the_layers_compute(stack: str, modulation: str) -> None:
    torch.manual_seed(0)
    if modulation == "norms" and stack in ("mlp", "tuples"):
        pytest.skip("these layers have no norms")
    layers, dit = STACKS[stack](), stack == "dit"
    original = copy.deepcopy(layers)
    frame = Levels() if dit else None
    blocks = convert(layers, 2, LAW, WIDTH, 0.5, layers=[1, 3], frame=frame, classes=10 * dit, modulation=modulation)
    z, sigma, label = torch.randn(4, 7, WIDTH), torch.full((4,), 0.7), torch.tensor([1, 2, 3, 10])
    arguments: dict[str, Any] = Levels().arguments(sigma, label) if dit else {}
    for layer in (blocks, *original):
        layer.eval()
    for number, part in ((1, original[:1]), (2, original[1:])):
        expected = blocks.precond.view(z, sigma[:, None, None])
        for layer in part:
            found = layer(expected, **arguments)
            expected = found[0] if isinstance(found, tuple) else found
        expected = blocks.precond.combine(z, expected, sigma[:, None, None])
        for grad in (True, False):  # nn.TransformerEncoderLayer has a path of its own without gradients
            with torch.set_grad_enabled(grad):
                out = blocks.denoise(number, z, sigma, label=label if dit else None)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    if stack != "tuples":  # the positive control: a conversion that has learned depends on the level
        disturb(blocks)
        assert (blocks.denoise(2, z, sigma, label=label if dit else None) - expected).abs().amax() > 1e-3
        with torch.no_grad():
            assert (blocks.denoise(2, z, sigma, label=label if dit else None) - expected).abs().amax() > 1e-3


def test_the_layers_stay_the_same_objects_and_take_arguments() -> None:
    layers = [Residual(3) for _ in range(5)]
    blocks = convert(layers, 2, LAW, width=3, sd=0.5, layers=[2, 3])
    assert [layer is blocks.block(2).layers[i] for i, layer in enumerate(layers[2:])] == [True] * 3
    z, sigma = torch.randn(4, 7, 3), torch.full((4,), 0.7)
    expected = blocks.precond.view(z, sigma[:, None, None])
    for layer in layers[:2]:
        expected = layer(expected, 0.25)
    expected = blocks.precond.combine(z, expected, sigma[:, None, None])
    torch.testing.assert_close(blocks.denoise(1, z, sigma, shift=0.25), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Modulation


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_modulation_after_a_norm_by_hand(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    layers = [Normed(norm) for _ in range(2)]
    blocks = disturb(convert(layers, 1, LAW, WIDTH, 0.5, modulation="norms"))
    x, c_noise = torch.randn(3, 5, WIDTH), torch.tensor([0.1, -0.2, 0.3])
    expected = x
    for layer, (shift, scale) in zip(layers, blocks.block(1).conditioning(c_noise), strict=True):
        expected = expected + layer.inner((1 + scale[:, None]) * layer.norm(expected) + shift[:, None])
    torch.testing.assert_close(blocks.block(1)(x, c_noise), expected)
    # Outside a block, the layers are what they were; a copy has hooks of its own.
    torch.testing.assert_close(layers[0](x), x + layers[0].inner(layers[0].norm(x)))
    torch.testing.assert_close(copy.deepcopy(blocks).block(1)(x, c_noise), expected)


def test_modulation_outside_a_layer_by_hand() -> None:
    torch.manual_seed(0)
    layers = [Residual(WIDTH) for _ in range(2)]
    blocks = disturb(convert(layers, 1, LAW, WIDTH, 0.5))
    x, c_noise = torch.randn(3, 5, WIDTH), torch.tensor([0.1, -0.2, 0.3])
    expected = x
    for layer, modulation in zip(layers, blocks.block(1).conditioning(c_noise), strict=True):
        shift, scale, gate = (m[:, None] for m in modulation)
        seen = (1 + scale) * expected + shift
        expected = expected + (1 + gate) * layer.out(torch.tanh(layer.into(seen)))
    torch.testing.assert_close(blocks.block(1)(x, c_noise), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_the_loss_is_edms_in_float64_sample_by_sample() -> None:
    torch.manual_seed(0)
    blocks = disturb(convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=ImageFrame(), gamma=0.1)).double()
    batch = {name: value.double() for name, value in image_batch().items()}
    low, high = blocks.partition.range_of(2)

    def phi(value: float) -> float:
        return 0.5 * (1 + math.erf((math.log(value) + 0.4) / math.sqrt(2)))

    total = 0.0
    for y, u, eps in zip(batch["y"], batch["u_B"].tolist(), batch["eps"], strict=True):
        sigma, ends = 0.0, (math.log(low), math.log(high))
        for _ in range(80):  # the quantile by bisection
            middle = (ends[0] + ends[1]) / 2
            below = phi(math.exp(middle)) < phi(low) + u * (phi(high) - phi(low))
            ends = (middle, ends[1]) if below else (ends[0], middle)
            sigma = math.exp(middle)
        z, c_noise = y + sigma * eps, torch.tensor([math.log(sigma) / 4])
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        frame = blocks.frame
        assert frame is not None
        out = frame.read(blocks.block(2)(frame.embed(z[None] / math.sqrt(sigma**2 + 0.25), None), c_noise), None)[0]
        error = (c_skip * z + c_out * out - y).square().mean().item()
        total += (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * error
    expected = torch.tensor(total / 6, dtype=torch.float64)  # the mean of products, not the product of means
    torch.testing.assert_close(blocks.loss(2, **batch), expected, rtol=1e-6, atol=0)


def test_the_loss_of_a_class_is_plain_cross_entropy_at_normalised_rows() -> None:
    torch.manual_seed(0)
    frame = ClassFrame()
    with torch.no_grad():
        frame.labels.weight.mul_(7)  # rows of other lengths than 1
    blocks = disturb(convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=frame)).eval()
    batch = class_batch()
    y, sigma = batch["y"], blocks.draw(1, batch["u_B"])
    rows = frame.labels.weight / frame.labels.weight.square().sum(-1, keepdim=True).sqrt()
    z = rows[y] + sigma[:, None].float() * batch["eps"]
    logits = blocks.logits(1, z, sigma, x=batch["x"])
    expected = -logits.log_softmax(-1)[torch.arange(6), y].mean()
    torch.testing.assert_close(blocks.loss(1, **batch), expected)
    # The soft bridge is a mean of unit rows.
    estimate = blocks.denoise(1, z, sigma, x=batch["x"])
    torch.testing.assert_close(estimate, torch.einsum("bc,cd->bd", logits.softmax(-1), rows))
    assert estimate.norm(dim=-1).max() <= 1 + 1e-6


def test_dropped_labels_count_as_no_class() -> None:
    torch.manual_seed(0)
    blocks = convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=ImageFrame(), classes=3, label_dropout=0.25)
    disturb(blocks)
    batch, label = image_batch(), torch.tensor([0, 1, 2, 0, 1, 2])
    u_label = torch.tensor([0.2, 0.25, 0.3, 0.24, 0.0, 0.9])
    found = blocks.loss(1, **batch, label=label, u_label_B=u_label)
    blocks.label_dropout = 0.0
    torch.testing.assert_close(found, blocks.loss(1, **batch, label=torch.tensor([3, 1, 2, 3, 3, 2])))
    assert not torch.allclose(found, blocks.loss(1, **batch, label=label))
    assert blocks.block(1).labels.weight.shape[0] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Independence


@pytest.mark.parametrize("kind", ["image", "class"])
@pytest.mark.parametrize(("shared", "owner"), [("owned", 1), ("owned", 2), ("frozen", 1), ("all", 1)])
@pytest.mark.parametrize("modulation", ["layers", "norms"])
def test_training_a_block_touches_only_its_parameters_and_what_it_owns(
    kind: str, shared: str, owner: int, modulation: str
) -> None:
    torch.manual_seed(0)
    frame = ImageFrame() if kind == "image" else ClassFrame()
    if isinstance(frame, ClassFrame) and shared == "all":
        frame.labels.weight.requires_grad_(False)
    blocks = convert(
        transformer_layers(), 2, LAW, WIDTH, 0.5, frame=frame, shared=shared, owner=owner, modulation=modulation
    )
    disturb(blocks)
    flags = {name: p.requires_grad for name, p in blocks.named_parameters()}
    for number in (1, 2):
        before = {name: value.clone() for name, value in blocks.state_dict().items()}
        blocks.zero_grad(set_to_none=True)
        optimizer = torch.optim.AdamW(blocks.parameters(), lr=0.1, weight_decay=0.0)
        blocks.loss(number, **(image_batch() if kind == "image" else class_batch())).backward()
        with_gradient = {id(p) for p in blocks.parameters() if p.grad is not None}
        optimizer.step()
        moved = {name for name, value in blocks.state_dict().items() if not torch.equal(value, before[name])}
        owns = shared == "owned" and number == owner
        assert {name.split(".")[0] for name in moved} == ({"blocks", "frame"} if owns else {"blocks"})
        assert {name.split(".")[1] for name in moved if name.startswith("blocks")} == {str(number)}
        assert with_gradient == {id(p) for p in blocks.trained(number) if p.requires_grad}
        if shared == "all":
            assert any(name.startswith(f"blocks.{number}.frame") for name in moved)
    # Using a frame leaves its flags as they were.
    assert flags == {name: p.requires_grad for name, p in blocks.named_parameters()}
    assert all(module.training for module in blocks.modules())


def test_blocks_that_share_parameters_are_refused() -> None:
    layer = Residual(WIDTH)
    with pytest.raises(UserError, match=r"block 1 and block 2 share the parameter layers\.0\.into\.weight"):
        convert([layer, layer], 2, LAW, WIDTH, 0.5)
    convert([layer, layer], 1, LAW, WIDTH, 0.5)
    frame = Frame()
    frame.head = layer.out  # as diffusers' DiT, whose read-out has the level embedding of its first block
    with pytest.raises(UserError, match=r"block 1 and the frame share the parameter head\.weight"):
        convert([layer, Residual(WIDTH)], 2, LAW, WIDTH, 0.5, frame=frame)
    layers = [Residual(WIDTH), Residual(WIDTH)]
    layers[1].borrowed = [layers[0]]  # not registered
    forward = layers[1].forward
    layers[1].forward = lambda x: forward(layers[1].borrowed[0](x))
    blocks = convert(layers, 2, LAW, WIDTH, 0.5)
    y, u = torch.randn(3, WIDTH), torch.rand(3)
    blocks.loss(1, y, u, y)
    with pytest.raises(UserError, match=r"block 2 reads a parameter that it does not train, blocks\.1\.layers\.0"):
        blocks.loss(2, y, u, y)


def test_a_block_trains_alone_and_the_walk_of_blocks_finds_the_data() -> None:
    """Two points on a line: each block is trained by itself, the other's weights never move, and the walk ends on both."""
    torch.manual_seed(0)
    law = LogNormal(-0.4, 1.2, 0.02, 10.0)
    blocks = convert([Residual(1, 32) for _ in range(4)], 2, law, width=1, sd=1.0, gamma=0.1)
    generator = torch.Generator().manual_seed(1)
    for number in (1, 2):
        before = {name: p.clone() for name, p in blocks.named_parameters()}
        optimizer = torch.optim.Adam(blocks.trained(number), lr=1e-2)
        for _ in range(400):
            y = torch.randint(2, (128, 1), generator=generator) * 2.0 - 1.0
            u, eps = torch.rand(128, generator=generator), torch.randn(128, 1, generator=generator)
            optimizer.zero_grad()
            blocks.loss(number, y, u, eps).backward()
            optimizer.step()
        moved = {name.split(".")[1] for name, p in blocks.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {str(number)}
    samples = blocks.walk(torch.randn(512, 1, generator=generator), 16)[:, 0]
    assert 0.35 < (samples > 0).double().mean() < 0.65
    assert (samples.abs() - 1).abs().mean() < 0.15
    draws = blocks.draw(1, torch.rand(1000, generator=generator))
    low, high = blocks.partition.range_of(1)
    assert low <= draws.min()
    assert draws.max() <= high


def test_a_class_is_learned_from_a_clean_image_beside_it() -> None:
    torch.manual_seed(0)
    frame = ClassFrame()
    blocks = convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=frame)
    centres = torch.randn(5, 3, 4, 4)
    for number in (1, 2):
        optimizer = torch.optim.Adam(blocks.trained(number), lr=1e-2)
        for _ in range(120):
            y = torch.randint(5, (32,))
            x = centres[y] + 0.3 * torch.randn(32, 3, 4, 4)
            optimizer.zero_grad()
            blocks.loss(number, y, torch.rand(32), torch.randn(32, 6), x=x).backward()
            optimizer.step()
    y = torch.arange(50) % 5
    x, eps = centres[y] + 0.3 * torch.randn(50, 3, 4, 4), torch.randn(50, 6)
    for steps in (1, 2, 4):
        found = blocks.eval().read_outs(eps, steps, x=x)
        assert len(found) == steps
        assert all((logits.argmax(-1) == y).double().mean() > 0.9 for logits in found)
    assert blocks.walk(eps, 2, x=x).norm(dim=-1).max() <= 1 + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The walk


class Gaussian(DiffusionBlocks):
    """The exact denoiser of data with standard deviation 0.5 per component, D = z sd^2 / (sd^2 + sigma^2)."""

    visited: list[int]

    def denoise(self, number: int, z: Tensor, sigma_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.visited.append(number)
        return z * 0.25 / (0.25 + sigma_B[:, None] ** 2)


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    blocks = convert([nn.Identity() for _ in range(3)], 3, LogNormal(-0.4, 1.0, 0.2, 5.0), width=2, sd=0.5)
    blocks.__class__ = Gaussian
    assert isinstance(blocks, Gaussian)
    eps = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors: dict[str, list[float]] = {"euler": [], "heun": []}
    for sampler, found in errors.items():
        for steps in (32, 64, 128):
            blocks.visited = []
            levels = blocks.partition.levels(steps)
            last = levels[-1]
            # dz/dsigma = (z - D)/sigma has the solution z = z_0 sqrt((sd^2 + sigma^2) / (sd^2 + sigma_0^2)).
            at_last = eps * 5.0 * math.sqrt((0.25 + last**2) / (0.25 + 25))
            exact = at_last * 0.25 / (0.25 + last**2)  # the last step, to sigma 0, is D itself
            found.append((blocks.walk(eps, steps, sampler) - exact).abs().amax().item())
            assert blocks.visited == sorted(blocks.visited)
            assert len(blocks.visited) == (steps if sampler == "euler" else 2 * steps - 1)
            if sampler == "euler":
                assert blocks.visited == [blocks.partition.block_of(sigma) for sigma in levels]
    for sampler, order in (("euler", 1), ("heun", 2)):
        first, second, third = errors[sampler]
        assert math.log2(first / second) == pytest.approx(order, abs=0.3)
        assert math.log2(second / third) == pytest.approx(order, abs=0.2)


def test_guidance_is_the_formula() -> None:
    torch.manual_seed(0)
    blocks = convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=ImageFrame(), classes=3, label_dropout=0.1)
    disturb(blocks).eval()
    eps, label, none = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 2]), torch.full((3,), 3)
    z = eps * 20.0
    for number, (sigma, following) in enumerate(
        ((20.0, blocks.partition.edges[1]), (blocks.partition.edges[1], 0.0)), 1
    ):
        sigma_B = torch.full((3,), sigma, dtype=torch.float64)
        with torch.no_grad():
            conditional, free = (blocks.denoise(number, z, sigma_B, label=which) for which in (label, none))
        estimate = free + 2.5 * (conditional - free)
        z = z + (following - sigma) * (z - estimate) / sigma
    torch.testing.assert_close(blocks.walk(eps, 2, label=label, guidance=2.5), z, rtol=1e-4, atol=1e-4)
    plain = blocks.walk(eps, 2, label=label)
    assert not torch.allclose(plain, z, atol=1e-3)
    torch.testing.assert_close(plain, blocks.walk(eps, 2, label=label, guidance=1.0))
    torch.testing.assert_close(blocks.walk(eps, 3, label=label, guidance=0.0), blocks.walk(eps, 3, label=none))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(WIDTH, 1), r"layer 1 \(Linear\) must keep its input's shape: \(2, 4, 8\) became \(2, 4, 1\)"),
        (Returns(lambda x: (x[..., :2], x)), r"must keep its input's shape"),
        (Returns(lambda x: {"hidden": x}), r"must return a tensor, or a tuple that starts with one, got dict"),
        (Returns(lambda x: (None, x)), "must return a tensor, or a tuple that starts with one, got NoneType"),
        (Returns(lambda x: ()), "must return a tensor, or a tuple that starts with one, got tuple"),
        (Returns(lambda x: None), "got NoneType"),
        (nn.Conv2d(WIDTH, WIDTH, 3, padding=1), r"layer 1 \(Conv2d\) is channel-first"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, WIDTH)), "is channel-first"),
        (nn.GroupNorm(2, WIDTH), "is channel-first"),
        (nn.TransformerEncoderLayer(WIDTH, 2), "must have batch_first=True"),
        ("layer", "is not a torch.nn.Module"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layer: Any, message: str) -> None:
    y, u = torch.randn(2, 4, WIDTH), torch.rand(2)
    with pytest.raises(UserError, match=message) as error:
        convert([layer], 1, LAW, WIDTH, 0.5).loss(1, y, u, y)
    one_line(error)


def test_a_layer_that_moves_its_channels_itself_is_right() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.convolution(x.mT)).mT

    layer = Moves()
    before = copy.deepcopy(layer.state_dict())
    blocks = convert([layer], 1, LAW, WIDTH, 0.5)
    for name, value in layer.state_dict().items():  # the look at the layer left no trace
        assert torch.equal(value, before[name])
    assert layer.training and layer.norm.training
    y = torch.randn(2, 4, WIDTH)
    assert blocks.loss(1, y, torch.rand(2), y).isfinite()
    mixer = nn.Conv1d(4, 4, 1)  # over tokens
    convert([mixer], 1, LAW, WIDTH, 0.5).loss(1, y, torch.rand(2), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sd": 0.0}, "sd, the data's standard deviation, must be above 0, got 0.0"),
        ({"sd": -1.0}, "sd, the data's standard deviation"),
        ({"sd": math.nan}, "sd, the data's standard deviation"),
        ({"sd": math.inf}, "sd, the data's standard deviation"),
        ({"noise": Uniform(0.0, 1.0)}, r"sigma_min must be above 0 and below sigma_max: Uniform\(sigma_min=0.0"),
        ({"noise": LogNormal(-1.2, 1.2, 80.0, 0.002)}, "sigma_min must be above 0 and below sigma_max"),
        ({"d_condition": 0}, "width and d_condition must be at least 1, got 8 and 0"),
        ({"frame": nn.Identity()}, "frame must be a Frame, got Identity"),
        ({"gamma": -0.1}, "gamma, the overlap, must be at least 0, got -0.1"),
        ({"network": nn.Identity()}, "network must be a list of layers, got Identity"),
        ({"n_blocks": 3}, "2 layers cannot be cut into 3 blocks"),
        ({"n_blocks": 0}, "2 layers cannot be cut into 0 blocks"),
        ({"shared": "mine"}, "shared must be one of owned, frozen, all, got 'mine'"),
        ({"owner": 3}, "the owner must be a block from 1 to 2, got 3"),
        ({"owner": 0}, "the owner must be a block from 1 to 2, got 0"),
        ({"classes": -1}, "classes must be at least 0, got -1"),
        ({"classes": 3, "label_dropout": 1.0}, "label_dropout must be at least 0 and below 1, got 1.0"),
        ({"classes": 3, "label_dropout": -0.1}, "label_dropout must be"),
        ({"label_dropout": 0.1}, "label_dropout needs classes"),
        ({"modulation": "outside"}, "modulation must be layers, norms, inside, got 'outside'"),
        (
            {"modulation": "norms"},
            r"modulation='norms' needs norms of size 8 in each layer: layer 1 \(Residual\) has none",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    layers = [Residual(WIDTH), Residual(WIDTH)]
    with pytest.raises(UserError, match=message) as error:
        convert(**{"network": layers, "n_blocks": 2, "noise": LAW, "width": WIDTH, "sd": 0.5, **options})
    one_line(error)


def test_mistakes_in_use_are_refused() -> None:
    plain = convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=ImageFrame())
    labelled = convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=ImageFrame(), classes=3)
    classes = convert(transformer_layers(), 2, LAW, WIDTH, 0.5, frame=ClassFrame())
    small = convert(transformer_layers(), 2, LAW, WIDTH, 0.5)
    image, named, eps, zeros = image_batch(), class_batch(), torch.randn(2, 3, 4, 4), torch.zeros(6).long()
    channels = torch.randn(2, WIDTH, 4, 4)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: plain.walk(eps, guidance=2.0), "guidance needs blocks trained with label_dropout above 0"),
        (lambda: labelled.walk(eps, label=zeros[:2], guidance=2.0), "guidance needs blocks trained with label_dropout"),
        (lambda: plain.walk(eps, guidance=math.nan), "guidance must be a finite number, got nan"),
        (lambda: plain.walk(eps, sampler="dpm"), "there is no sampler 'dpm' here: choose from euler, heun"),
        (lambda: plain.walk(eps, sampler="ancestral"), "there is no sampler 'ancestral' here"),
        (lambda: plain.walk(eps, -1), "steps must be a whole number, at least 0, got -1"),
        (lambda: plain.read_outs(eps), "this frame reads out an estimate, not logits"),
        (lambda: plain.loss(1, **image, label=zeros), "the blocks have no class condition"),
        (lambda: labelled.loss(1, **image), "conditioned on a class: give label, with 3 for no class"),
        (lambda: labelled.loss(1, **image, label=zeros - 1), "label must be from 0 to 3, got -1 to -1"),
        (lambda: labelled.loss(1, **image, label=zeros + 4), "label must be from 0 to 3, got 4 to 4"),
        (lambda: labelled.loss(1, **image, label=zeros.float()), "label must be whole numbers"),
        (lambda: classes.loss(1, **{**named, "y": zeros - 100}), "y, the classes, must be from 0 to 4, got -100"),
        (lambda: classes.loss(1, **{**named, "y": zeros + 5}), "y, the classes, must be from 0 to 4, got 5"),
        (lambda: plain.loss(1, **{**image, "eps": eps}), r"eps must have the target's shape \(6, 3, 4, 4\)"),
        (lambda: plain.loss(1, **{**image, "u_B": torch.rand(1)}), r"u must have shape \(6,\), got \(1,\)"),
        (lambda: labelled.loss(1, **image, label=zeros[:1]), r"label must have shape \(6,\), got \(1,\)"),
        (lambda: labelled.loss(1, **image, label=[0] * 6), r"label must have shape \(6,\), got list"),
        (lambda: plain.denoise(1, eps, torch.ones(1)), r"sigma must have shape \(2,\), got \(1,\)"),
        (lambda: plain.loss(1, **{**image, "y": image["y"].long()}), "y must be floating point"),
        (lambda: small.loss(1, channels, torch.rand(2), channels), "channels must come last"),
    ]
    for use, message in cases:
        with pytest.raises(UserError, match=message) as error:
            use()
        one_line(error)
    for number in (0, -1, 3):  # blocks are counted from 1
        for method in (lambda n: plain.loss(n, **image), plain.block, plain.trained, plain.partition.range_of):
            with pytest.raises(ValueError, match=f"no block {number}: blocks are counted from 1 to 2"):
                method(number)


def test_frames_that_do_not_fit_are_refused() -> None:
    y, u = torch.randn(2, 4, WIDTH), torch.rand(2)
    for method, change, message in (
        ("embed", lambda view, x: view[..., :4], r"layers need \(2, ..., 8\), got \(2, 4, 4\)"),
        ("embed", lambda view, x: [view], "the frame's embed must return a tensor, got list"),
        ("read", lambda hidden, x: hidden[:, 0], r"the frame's read must return \(2, 4, 8\), got \(2, 8\)"),
        ("read", lambda hidden, x: (hidden,), r"the frame's read must return \(2, 4, 8\), got tuple"),
    ):
        frame = Frame()
        setattr(frame, method, change)
        with pytest.raises(UserError, match=message) as error:
            convert([Residual(WIDTH)], 1, LAW, WIDTH, 0.5, frame=frame).loss(1, y, u, y)
        one_line(error)


def test_a_layer_with_a_level_of_its_own_needs_it_from_the_frame() -> None:
    layer = Residual(WIDTH)
    layer.norm_type = "ada_norm_zero"  # diffusers' name
    y, u = torch.randn(2, 4, WIDTH), torch.rand(2)
    with pytest.raises(
        UserError, match=r"layer 1 \(Residual\) has its own level conditioning: return its timestep"
    ) as error:
        convert([layer], 1, LAW, WIDTH, 0.5).loss(1, y, u, y)
    one_line(error)


def test_norms_and_gradient_checkpointing_do_not_go_together() -> None:
    layer = Normed()
    layer.gradient_checkpointing = True
    y, u = torch.randn(2, 4, WIDTH), torch.rand(2)
    with pytest.raises(UserError, match="does not work with gradient checkpointing"):
        convert([layer], 1, LAW, WIDTH, 0.5, modulation="norms").loss(1, y, u, y)


# ---------------------------------------------------------------------------------------------------------------------
# The guide


def test_the_documents_conversion_trains_its_block_alone() -> None:
    codes = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/blocks.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(codes[0], names)
    trained = [any(p.grad is not None for p in block.parameters()) for block in names["blocks"].blocks.values()]
    assert trained == [False, True, False, False]
    assert names["samples"].shape == (16, 64)
    for code in codes[1:]:
        exec(code, names)
    assert names["logits"].shape == (16, 10)
