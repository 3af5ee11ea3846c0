"""Analytic FLOPs against PyTorch's counter on the meta device, for every way of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OBJECTIVES, micro_config, micro_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from recurrent_db.accounting.flops import cost_per_token, inference_cost, step_cost, total
from recurrent_db.commands import flops
from recurrent_db.config import ModelConfig, OptimConfig, load_config
from recurrent_db.data import Batch
from recurrent_db.model import build_model
from recurrent_db.model.attention import Rule
from recurrent_db.model.passes import Passes
from recurrent_db.optim.optimizer import update_flops
from recurrent_db.rng import Rng

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).parents[2] / "train/configs"
MODEL = ModelConfig(vocab_size=101, d_model=32, n_heads=2, n_prelude=1, n_core=2, n_coda=1, d_mlp=40, d_condition=24)
B, T = 2, 12


def counted(
    config: ModelConfig, length: int, no_grad: int, grad: int, levels: int = 0, batch: int = B,
    checkpointing: bool = False,
) -> float:  # fmt: skip
    """FLOPs per token that the counter sees in a training step with this realised depth."""
    model = build_model(config, None, "meta")
    model.core.checkpointing = checkpointing
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        e_BTD = model.encode(tokens)
        state = torch.zeros_like(e_BTD)
        c_noise = torch.zeros(batch, levels, device="meta") if levels else None
        with torch.no_grad():
            for _ in range(no_grad):
                state = model.iterate(state, e_BTD, 1, c_noise)
        for _ in range(grad):
            state = model.iterate(state, e_BTD, 1, c_noise)
        model.logits(model.decode(state)).sum().backward()
    return counter.get_total_flops() / (batch * length)


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
@pytest.mark.parametrize(("no_grad", "grad"), [(0, 1), (0, 3), (3, 2)])
def test_unrolled_and_next_token(injection: str, no_grad: int, grad: int) -> None:
    config = dataclasses.replace(MODEL, injection=injection, noise_conditioning=False)
    ours = total(cost_per_token(config, T, Passes(core_no_grad=no_grad, core_grad=grad))).total
    assert ours == pytest.approx(counted(config, T, no_grad, grad), rel=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        {"layer": "llama", "n_heads": 4, "n_kv_heads": 2, "head_size": 6, "qk_norm": True, "tied": False},
        {"layer": "neox", "rope_size": 4, "v_bias": True},
    ],
)
def test_other_layers(shape: dict[str, Any]) -> None:
    config = dataclasses.replace(MODEL, **shape)
    ours = total(cost_per_token(config, T, Passes(core_no_grad=2, core_grad=1))).total
    assert ours == pytest.approx(counted(config, T, 2, 1), rel=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 8, 9, 20])
def test_every_realised_depth(depth: int) -> None:
    config = dataclasses.replace(MODEL, noise_conditioning=False, n_core=1)
    no_grad, grad = max(0, depth - 8), min(depth, 8)
    ours = total(cost_per_token(config, T, Passes(core_no_grad=no_grad, core_grad=grad))).total
    assert ours == pytest.approx(counted(config, T, no_grad, grad), rel=1e-3)


@pytest.mark.parametrize("depth", [1, 8])
def test_full_backpropagation(depth: int) -> None:
    config = dataclasses.replace(MODEL, noise_conditioning=False)
    ours = total(cost_per_token(config, T, Passes(core_grad=depth))).total
    assert ours == pytest.approx(counted(config, T, 0, depth), rel=1e-3)


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
@pytest.mark.parametrize(("no_grad", "grad"), [(0, 1), (1, 2)])
def test_checkpointed_iterations_are_counted_as_recomputation(injection: str, no_grad: int, grad: int) -> None:
    config = dataclasses.replace(MODEL, injection=injection, noise_conditioning=False)
    passes = Passes(core_no_grad=no_grad, core_grad=grad)
    kept = total(cost_per_token(config, T, passes))
    again = total(cost_per_token(config, T, passes, checkpointing=True))
    assert again.total == kept.total
    # The meta device knows no fused attention, hence no scores made again: the difference is checkpointing alone.
    counted_again = counted(config, T, no_grad, grad, checkpointing=True) - counted(config, T, no_grad, grad)
    assert counted_again > 0
    assert again.recomputed - kept.recomputed == pytest.approx(counted_again, rel=1e-3)


def test_fused_attention_makes_its_scores_again() -> None:
    """On real tensors the fused CPU kernel runs; PyTorch counts its backward as five products, where four are model
    FLOPs."""
    config = dataclasses.replace(MODEL, noise_conditioning=False)
    model = build_model(config, 0)
    tokens = torch.zeros(B, T, dtype=torch.long)
    ops = torch.ops.aten
    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
            q, k, v
        ),
        ops._scaled_dot_product_flash_attention_for_cpu_backward: lambda d, q, k, v, *_, out_shape=None, **__: (
            sdpa_backward_flop_count(d, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(tokens, 3).sum().backward()
    ours = total(cost_per_token(config, T, Passes(core_grad=3)))
    assert ours.recomputed > 0
    assert ours.hardware == pytest.approx(counter.get_total_flops() / (B * T), rel=1e-3)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_masked_pairs_are_those_that_the_masks_hide(length: int) -> None:
    """Attention's FLOPs on hidden pairs, against a count over the masks themselves."""
    model = dataclasses.replace(MODEL, n_prelude=0, n_core=1, n_coda=0)
    plain = total(cost_per_token(model, length, Passes(core_grad=1)))
    hidden = 1 - torch.ones(length, length).tril().mean().item()
    assert plain.masked == pytest.approx(hidden * plain.attention)
    assert plain.causal == pytest.approx(plain.total - plain.masked)
    beside = Passes(core_no_grad=1, core_grad=0, beside=True)
    rule = Rule(length, length, stream="beside")
    seen = rule.mask(torch.device("cpu")).float().mean().item()
    both = cost_per_token(model, length, beside)["core"]
    assert both.masked == pytest.approx((1 - seen) * 2 * length * 4 * model.d_model)


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
@pytest.mark.parametrize("levels", [1, T])
def test_denoise_with_a_level_per_sequence_and_per_token(injection: str, levels: int) -> None:
    config = dataclasses.replace(MODEL, injection=injection, noise_conditioning=True)
    ours = total(cost_per_token(config, T, Passes(core_grad=1, noise_levels=levels))).total
    assert ours == pytest.approx(counted(config, T, 0, 1, levels), rel=1e-3)


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
def test_two_streams(injection: str) -> None:
    config = dataclasses.replace(MODEL, injection=injection, noise_conditioning=True)
    model = build_model(config, None, "meta")
    tokens = torch.zeros(B, T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        e_BTD = model.encode(tokens)
        clean = model.core_contexts(torch.zeros_like(e_BTD), e_BTD)
        state = model.iterate(e_BTD, e_BTD, 1, torch.zeros(B, 1, device="meta"), clean)
        model.logits(model.decode(state)).sum().backward()
    ours = total(cost_per_token(config, T, Passes(core_grad=1, clean_grad=1, beside=True, noise_levels=1))).total
    assert ours == pytest.approx(counter.get_total_flops() / (B * T), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        *([name] for name in OBJECTIVES),
        ["unrolled", "--objective.unrolled.truncation", "0"],
        ["one_step", "--objective.one_step.skip_core", "0"],
        ["one_step", "--objective.one_step.next_token_share", "0"],
        ["one_step", "--objective.one_step.next_token_share", "0", "--objective.one_step.state", "carried"],
        ["denoise_paper"],
        ["denoise", "--objective.denoise.conditioning", "two-stream"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize(("injection", "steps"), [("linear", 4), ("diagonal", 1), ("add", 1)])
def test_what_an_objective_says_it_runs_is_what_it_runs(options: list[str], injection: str, steps: int) -> None:
    """The objective itself, forward and backward, against the counter, at several draws and points of the budget."""
    config = micro_config("--objective.name", *options, "--model.injection", injection)
    model, objective = micro_model(config)
    length = config.data.sequence_length
    ids = torch.randint(61, (2, length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]), torch.arange(2))
    for step, progress in enumerate((0.0, 0.5, 0.95, 1.0)[:steps]):
        objective.grow(model, progress)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            objective(model, batch, Rng(0, step), progress)[0].backward()
        ours = step_cost(config, objective.passes(Rng(0, step), progress)).total
        assert ours == pytest.approx(counter.get_total_flops() / (2 * length), rel=1e-3)


@pytest.mark.parametrize("preset", ["tiny", "pythia-70m-looped", "looped-1b", "huginn-3.5b"])
def test_presets(preset: str) -> None:
    config = load_config(CONFIGS / f"{preset}.toml")
    model, length = config.model, config.data.sequence_length
    model.vocab_size = model.vocab_size or 2048
    for conditioned in (False, True):
        model.noise_conditioning = conditioned
        ours = total(
            cost_per_token(model, length, Passes(core_no_grad=2, core_grad=1, noise_levels=int(conditioned)))
        ).total
        assert ours == pytest.approx(counted(model, length, 2, 1, int(conditioned), batch=1), rel=1e-3)


def test_a_step_is_the_sum_of_its_parts_and_kinds() -> None:
    config = load_config(CONFIGS / "tiny.toml")
    config.model.vocab_size = 100
    parts = cost_per_token(config.model, config.data.sequence_length, Passes(core_no_grad=3, core_grad=2))
    whole = step_cost(config, Passes(core_no_grad=3, core_grad=2))
    assert whole.total == pytest.approx(sum(c.forward + c.backward_input + c.backward_weight for c in parts.values()))
    assert parts["core"].backward == pytest.approx(parts["core"].forward * 2 * 2 / 5)  # two of five iterations
    assert whole.total == pytest.approx(whole.matmul + whole.attention)
    assert list(parts) == ["embedding", "prelude", "adapter", "core", "conditioning", "coda", "head", "bridge"]


def test_weights_and_attention_apart() -> None:
    """The published rule: 6 FLOPs per weight and token, and 12 T D per layer for attention (arXiv 2204.02311, app. B)."""
    model = dataclasses.replace(MODEL, noise_conditioning=False, injection="add")
    whole = total(cost_per_token(model, T, Passes(core_grad=1)))
    layers = model.n_prelude + model.n_core + model.n_coda
    built = build_model(model, None, "meta")
    weights = sum(p.numel() for name, p in built.named_parameters() if "norm" not in name and "bias" not in name)
    assert whole.matmul == 6 * weights  # the tied table counts once, as the head
    assert whole.attention == layers * 12 * T * model.d_model


def test_update_is_counted_apart() -> None:
    model = build_model(dataclasses.replace(MODEL, noise_conditioning=False), None, "meta")
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(update_flops(model, OptimConfig()).values()) == 17 * parameters
    assert update_flops(model, OptimConfig(ema_decay=0.99))["average"] == 3 * parameters


def test_the_largest_preset_is_counted() -> None:
    table = flops.table(load_config(CONFIGS / "huginn-3.5b.toml"), 3.0, 2)
    assert table["parameters"]["total"] > 3.5e9


def test_inference_costs_forward_passes_alone() -> None:
    model = build_model(dataclasses.replace(MODEL, noise_conditioning=False), None, "meta")
    tokens = torch.zeros(B, T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, 4)
    passes = Passes(core_no_grad=4, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False)
    assert inference_cost(model.config, T, passes) == pytest.approx(counter.get_total_flops() / (B * T), rel=1e-3)
