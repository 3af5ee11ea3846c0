"""Analytic FLOPs against PyTorch's counter on the meta device, for every way of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.config import ModelConfig, load_config
from recurrent_db.flops import Passes, cost_per_token, inference_cost, step_cost, total
from recurrent_db.model import build_model

CONFIGS = Path(__file__).parents[1] / "train/configs"
MODEL = ModelConfig(vocab_size=101, d_model=32, n_heads=2, n_prelude=1, n_core=2, n_coda=1, d_mlp=40, d_condition=24)
B, T = 2, 12


def counted(config: ModelConfig, length: int, no_grad: int, grad: int, levels: int = 0, batch: int = B) -> float:
    """FLOPs per token that the counter sees in a training step with this realised depth."""
    model = build_model(config, None, "meta")
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
@pytest.mark.parametrize(("no_grad", "grad"), [(0, 1), (0, 5), (3, 4), (24, 8), (32, 8)])
def test_unrolled_and_next_token(injection: str, no_grad: int, grad: int) -> None:
    config = dataclasses.replace(MODEL, injection=injection, noise_conditioning=False)
    ours = total(cost_per_token(config, T, Passes(core_no_grad=no_grad, core_grad=grad))).total
    assert ours == pytest.approx(counted(config, T, no_grad, grad), rel=1e-3)


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
        clean, _ = model.core_contexts(torch.zeros_like(e_BTD), e_BTD)
        state = model.iterate(e_BTD, e_BTD, 1, torch.zeros(B, 1, device="meta"), clean)
        model.logits(model.decode(state)).sum().backward()
    ours = total(cost_per_token(config, T, Passes(core_grad=1, clean_grad=1, beside=True))).total
    assert ours == pytest.approx(counter.get_total_flops() / (B * T), rel=1e-3)


def test_known_neighbours() -> None:
    config = dataclasses.replace(MODEL, noise_conditioning=True)
    model = build_model(config, None, "meta")
    tokens, level = torch.zeros(B, T, dtype=torch.long, device="meta"), torch.zeros(B, 1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        e_BTD = model.encode(tokens)
        core, state = model.core_contexts(e_BTD, e_BTD, level, strict=True, finish=True)
        coda = model.coda_contexts(state, strict=True)
        model.logits(model.decode(model.iterate(e_BTD, e_BTD, 1, level, core), coda))
    passes = Passes(core_no_grad=1, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False,
                    known_no_grad=1, beside=True)  # fmt: skip
    assert inference_cost(config, T, passes) == pytest.approx(counter.get_total_flops() / (B * T), rel=1e-3)


@pytest.mark.parametrize("preset", ["tiny", "pythia-70m-looped", "looped-1b", "huginn-3.5b"])
def test_presets(preset: str) -> None:
    config = load_config(CONFIGS / f"{preset}.toml")
    model, length = config.model, config.data.sequence_length
    model.vocab_size = model.vocab_size or 2048
    for conditioned in (False, True):
        model.noise_conditioning = conditioned
        ours = total(cost_per_token(model, length, Passes(core_no_grad=2, core_grad=1))).total
        assert ours == pytest.approx(counted(model, length, 2, 1, int(conditioned), batch=1), rel=1e-3)


def test_a_step_is_the_sum_of_its_parts_and_kinds() -> None:
    config = load_config(CONFIGS / "tiny.toml")
    config.model.vocab_size = 100
    parts = cost_per_token(config.model, config.data.sequence_length, Passes(core_no_grad=3, core_grad=2))
    whole = step_cost(config, Passes(core_no_grad=3, core_grad=2))
    assert whole.total == pytest.approx(sum(c.forward + c.backward_input + c.backward_weight for c in parts.values()))
    assert parts["core"].backward == pytest.approx(parts["core"].forward * 2 * 2 / 5)  # two of five iterations


def test_inference_costs_forward_passes_alone() -> None:
    model = build_model(dataclasses.replace(MODEL, noise_conditioning=False), None, "meta")
    tokens = torch.zeros(B, T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, 4)
    passes = Passes(core_no_grad=4, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False)
    assert inference_cost(model.config, T, passes) == pytest.approx(counter.get_total_flops() / (B * T), rel=1e-3)
