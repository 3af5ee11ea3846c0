"""Analytic FLOPs of networks for images, equal to PyTorch's counter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from helpers import ROOT
from image_runs import image_batch, image_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.image_flops import image_cost, positions
from recurrent_db.config import Config, load_config
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.objectives import Objective, build_objective
from recurrent_db.rng import Rng

pytestmark = pytest.mark.fast

pytest.importorskip("transformers", reason="transformers is not importable")


def counted(config: Config, objective: Objective, network: torch.nn.Module, step: int, n: int = 3) -> tuple[int, int]:
    """FLOPs of a training step's forward and backward pass."""
    size = tuple(config.model.image_size)
    batch, found = image_batch(n, size, config.model.n_classes), []
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss = objective(network, batch, Rng(0, step), 0.0)[0]
        found.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        found.append(counter.get_total_flops())
    return found[0], found[1]


def check(config: Config, steps: int) -> None:
    network, objective = build_image_network(config, 0), build_objective(config)
    objective.prepare(network)
    for step in range(steps):
        cost = step_cost(config, objective.passes(Rng(0, step), 0.0))
        forward, backward = counted(config, objective, network, step)
        count = 3 * positions(config.model)
        assert count * cost.forward == pytest.approx(forward, rel=1e-9)
        assert count * cost.backward == pytest.approx(backward, rel=1e-9)
        assert cost.total == pytest.approx((forward + backward) / count, rel=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("classes", [10, 3])
def test_classify(size: tuple[int, int], classes: int) -> None:
    check(image_config("classify", size=size, classes=classes), 1)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shared", ["all", "owned", "frozen"])
@pytest.mark.parametrize("objective", ["denoise_class", "denoise_image"])
def test_all_blocks_in_one_process(objective: str, shared: str, n: int) -> None:
    layers = {1: [3], 2: [1, 2], 3: [1, 1, 1]}[n]
    more = ["--blocks.shared", shared, "--model.block_layers", *layers]
    check(image_config(objective, *more, n=n, size=(8, 12)), 4)


@pytest.mark.parametrize("shared", ["all", "owned", "frozen"])
@pytest.mark.parametrize("objective", ["denoise_class", "denoise_image"])
def test_a_block_in_a_process_of_its_own(objective: str, shared: str) -> None:
    for only in (1, 2):
        check(image_config(objective, "--blocks.shared", shared, "--blocks.only", only, "--init.from", "elsewhere"), 1)


@pytest.mark.parametrize("objective", ["classify", "denoise_class", "denoise_image"])
def test_attention_is_both_of_its_products(objective: str) -> None:
    """N x N scores of all heads, and their product with the values: 4 N^2 D forward, twice that backward."""
    config = image_config(objective, n=1)
    count, width = positions(config.model), config.model.d_model
    parts = image_cost(config.model, build_objective(config).passes(Rng(0, 0), 0.0))
    assert count == 16 + (objective != "denoise_image")
    assert parts["core"].attention == 3 * 3 * 4 * count * width
    assert sum(cost.masked for cost in parts.values()) == 0


@pytest.mark.parametrize("preset", ["vit-blocks", "dit-blocks"])
def test_a_sampling_step_costs_that_of_its_block(preset: str) -> None:
    """At B = 3 a step of a walk runs a third of the layers that it runs at B = 1."""
    found = []
    for n in (1, 3):
        config = load_config(ROOT / f"train/configs/{preset}.toml", ["--model.n_blocks", str(n)])
        config.model.image_size, config.model.n_classes = [32, 32], 10
        network, batch = build_image_network(config, 0), image_batch(1, (32, 32))
        assert isinstance(network, DiffusionBlocks)
        vit = config.model.network == "vit"
        eps = torch.randn(1, config.model.d_model) if vit else torch.randn(1, 3, 32, 32)
        given = {"x": batch.images_BCHW} if vit else {"label": batch.labels_B}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network.walk(eps, 6, **given)
        found.append(counter.get_total_flops() / 6)
    assert found[1] <= 0.37 * found[0]
