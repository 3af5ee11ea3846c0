"""The network against an independent one, its initialisation, its size, and what position i may see."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import with_values
from torch import Tensor

from recurrent_db.config import ModelConfig, load_config
from recurrent_db.errors import UserError
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.depth import poisson_quantile, sample_depth
from recurrent_db.model.head import linear_cross_entropy
from recurrent_db.model.layers import Attention, GatedMLP, apply_rope, rope_table
from recurrent_db.model.norms import scaled_rms
from recurrent_db.rng import Rng

pytestmark = pytest.mark.fast

SMALL = ModelConfig(vocab_size=31, d_model=16, n_heads=2, n_prelude=1, n_core=2, n_coda=1, d_mlp=24, max_seq_len=16)
CONFIGS = Path(__file__).parents[2] / "train/configs"


def perturbed(config: ModelConfig, seed: int = 0) -> LoopedLM:
    """A float64 model none of whose parameters has its special initial value."""
    model = build_model(config, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


class Reference:
    """The forward pass written again with numpy, complex rotary pairs and explicit loops over heads and positions."""

    def __init__(self, model: LoopedLM) -> None:
        self.config = model.config
        self.p = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        bias = self.p.get(name.removesuffix("weight") + "bias")
        if bias is not None:
            x = x - x.mean(-1, keepdims=True)
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_eps) * self.p[name]
        return normed if bias is None else normed + bias

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.p[name + ".weight"].T + self.p.get(name + ".bias", 0)

    def attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        length, width = x.shape
        heads, size = self.config.n_heads, self.config.head_size or width // self.config.n_heads
        groups = self.config.n_kv_heads or heads
        cuts = [heads * size, (heads + groups) * size]
        q, k, v = np.split(x @ self.p[prefix + "qkv.weight"].T, cuts, axis=-1)
        v = v + np.ravel(self.p.get(prefix + "v_bias", 0))
        out = np.zeros((length, heads * size))
        turned = self.config.rope_size or size
        rates = np.zeros(size // 2)
        rates[: turned // 2] = self.config.rope_base ** (-np.arange(0, turned, 2) / turned)
        turn = np.exp(1j * np.arange(length)[:, None] * rates)
        biases = self.p[prefix + "qk_bias"].reshape(-1, size)
        for h in range(heads):
            group = h * groups // heads
            part, of_group = slice(h * size, (h + 1) * size), slice(group * size, (group + 1) * size)
            qh, kh = q[:, part] + biases[h], k[:, of_group] + biases[heads + group]
            if self.config.qk_norm:
                qh, kh = self.norm(qh, prefix + "q_norm.weight"), self.norm(kh, prefix + "k_norm.weight")
            qc, kc = (qh[:, 0::2] + 1j * qh[:, 1::2]) * turn, (kh[:, 0::2] + 1j * kh[:, 1::2]) * turn
            for i in range(length):
                scores = np.array([(qc[i] * kc[j].conj()).sum().real for j in range(i + 1)]) / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[i, part] = (weights / weights.sum()) @ v[: i + 1, of_group]
        return self.linear(out, prefix + "proj")

    def mlp(self, x: np.ndarray, prefix: str) -> np.ndarray:
        if self.config.layer == "neox":
            hidden = self.linear(x, prefix + "fc")
            return self.linear(
                hidden * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2)(hidden), prefix + "proj"
            )
        gate, up = np.split(x @ self.p[prefix + "fc.weight"].T, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up) @ self.p[prefix + "proj.weight"].T

    def block(self, x: np.ndarray, prefix: str) -> np.ndarray:
        if self.config.layer != "huginn":
            middle = x + self.attention(self.norm(x, prefix + "norm_1.weight"), prefix + "attn.")
            read = middle if self.config.layer == "llama" else x
            return middle + self.mlp(self.norm(read, prefix + "norm_3.weight"), prefix + "mlp.")
        x = self.norm(
            self.attention(self.norm(x, prefix + "norm_1.weight"), prefix + "attn.") + x, prefix + "norm_2.weight"
        )
        return self.norm(
            self.mlp(self.norm(x, prefix + "norm_3.weight"), prefix + "mlp.") + x, prefix + "norm_4.weight"
        )

    def __call__(self, tokens: list[int], iterations: int) -> np.ndarray:
        table = self.p["embedding.weight"]
        huginn = self.config.layer == "huginn"
        e = table[tokens] * (math.sqrt(self.config.d_model) if huginn else 1)
        for i in range(self.config.n_prelude):
            e = self.block(e, f"prelude.{i}.")
        state = np.zeros_like(e)
        for _ in range(iterations):
            match self.config.injection:
                case "linear":
                    state = np.concatenate([state, e], axis=-1) @ self.p["core.injection.adapter.weight"].T
                case "diagonal":
                    decay = np.exp(-np.exp(self.p["core.injection.log_rate"]))
                    state = decay * state + e @ self.p["core.injection.adapter.weight"].T
                case "add":
                    state = state + e
            for i in range(self.config.n_core):
                state = self.block(state, f"core.blocks.{i}.")
        x = self.norm(state, "final_norm.weight") if huginn else state
        for i in range(self.config.n_coda):
            x = self.block(x, f"coda.{i}.")
        return self.norm(x, "final_norm.weight") @ self.p.get("head.weight", table).T


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_logits_equal_an_independent_implementation(injection: str, iterations: int) -> None:
    model = perturbed(dataclasses.replace(SMALL, injection=injection))
    tokens = [3, 14, 15, 9, 2, 6, 5]
    ours = model(torch.tensor([tokens]), iterations)[0].detach().numpy()
    np.testing.assert_allclose(ours, Reference(model)(tokens, iterations), rtol=0, atol=1e-11)


OTHER_LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"layer": "llama", "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_base": 1e4, "tied": False},
    "qwen2": {"layer": "llama", "n_heads": 4, "n_kv_heads": 1, "v_bias": True},
    "qwen3": {"layer": "llama", "n_heads": 4, "n_kv_heads": 2, "head_size": 6, "qk_norm": True},
    "neox": {"layer": "neox", "rope_size": 2, "norm_eps": 1e-5, "tied": False},
}
"""Shapes that imported models have."""


@pytest.mark.parametrize("name", OTHER_LAYERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_other_layers_equal_an_independent_implementation(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturbed(dataclasses.replace(SMALL, **OTHER_LAYERS[name]))
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    if compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what compiled code runs
    with torch.no_grad():
        ours = model(torch.tensor([tokens]), 2)[0].numpy()
    np.testing.assert_allclose(ours, Reference(model)(tokens, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_other_layers_have_the_right_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-written backwards against PyTorch's own, and one gradient for each parameter."""
    model = perturbed(dataclasses.replace(SMALL, **OTHER_LAYERS[name], noise_conditioning=True))
    tokens, level = torch.arange(12).view(1, 12), torch.full((1, 1), 0.3)

    def gradients() -> list[Tensor]:
        e_BTD = model.encode(tokens)
        hidden_BTD = model.decode(model.iterate(e_BTD, e_BTD, 2, level))
        ones = torch.ones(12, dtype=torch.float64)
        loss, _ = linear_cross_entropy(hidden_BTD[0], model.head_weight, tokens[0], ones)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    ours = gradients()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what compiled code runs
    for mine, theirs in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(mine.to_dense(), theirs.to_dense())


def test_shapes_that_no_layer_has_are_refused() -> None:
    for words, match in (
        (["--model.n_kv_heads", "3"], "not divisible by model.n_kv_heads = 3"),
        (["--model.head_size", "3"], "head size 3"),
        (["--model.rope_size", "64"], "model.rope_size = 64"),
        (["--model.layer", "gpt"], "model.layer|layer"),
    ):
        with pytest.raises(UserError, match=match):
            load_config(CONFIGS / "tiny.toml", words)


def test_fresh_conditioning_is_the_identity_bit_for_bit() -> None:
    tokens = torch.arange(12).view(1, 12)
    plain = build_model(SMALL, 0)
    conditioned = build_model(dataclasses.replace(SMALL, noise_conditioning=True), 0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, conditioned.get_parameter(name)), name
        e_BTD = plain.encode(tokens)
        state = torch.randn(e_BTD.shape, generator=torch.Generator().manual_seed(1))
        unconditioned = plain.iterate(state, e_BTD)
        for c_noise in (-1.5, 0.0, 1.1):
            noisy = conditioned.iterate(state, e_BTD, 1, torch.full((1, 1), c_noise))
            torch.testing.assert_close(noisy, unconditioned, rtol=0, atol=0)
        assert torch.equal(conditioned.iterate(state, e_BTD), unconditioned)


def test_trained_conditioning_tells_noise_levels_apart() -> None:
    model = perturbed(dataclasses.replace(SMALL, noise_conditioning=True)).float()
    e_BTD = model.encode(torch.arange(12).view(1, 12))
    low, high = (model.iterate(e_BTD, e_BTD, 1, torch.full((1, 1), c)) for c in (-0.5, 0.5))
    assert (low - high).abs().max() > 1e-3


def test_conditioning_without_the_parts_for_it_is_refused() -> None:
    model = build_model(SMALL, 0)
    e_BTD = model.encode(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(UserError, match="without noise conditioning"):
        model.iterate(e_BTD, e_BTD, 1, torch.zeros(1, 1))


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
def test_position_i_sees_tokens_up_to_i(injection: str) -> None:
    model = perturbed(dataclasses.replace(SMALL, injection=injection))
    tokens = torch.arange(10).view(1, 10)
    changed = tokens.clone()
    changed[0, 6:] = 30
    before, after = model(tokens, 3), model(changed, 3)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])  # the positive control: the perturbation does reach the logits


def test_initialisation_is_huginns() -> None:
    config = dataclasses.replace(SMALL, d_model=256, n_heads=4, d_mlp=512, vocab_size=500, expected_depth=32, n_prelude=2,
                                 n_core=4, n_coda=2)  # fmt: skip
    model = build_model(config, 0)
    # The standard deviation of a normal that is cut at three of them is .98658 of it.
    std = math.sqrt(2 / (5 * 256)) * 0.98658
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            assert parameter.std().item() == pytest.approx(std / math.sqrt(2 * 132), rel=0.02), name
        elif "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("qk_bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert parameter.abs().max() <= 3 * math.sqrt(2 / (5 * 256))
    embedded = model.embedding.weight * 16
    assert embedded.std().item() == pytest.approx(math.sqrt(2 / 5) * 0.98658, rel=0.02)


def test_initialisation_is_a_function_of_the_seed() -> None:
    first, again, other = (build_model(SMALL, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize(
    ("preset", "shape", "millions"),
    [
        ("tiny", (128, 1, 2, 1, 384), 0.9),
        ("pythia-70m-looped", (512, 2, 4, 2, 1408), 26),
        ("looped-1b", (3072, 2, 4, 2, 8192), 925),
        ("huginn-3.5b", (5280, 2, 4, 2, 17920), 3219),
    ],
)
def test_preset_sizes_without_the_embedding(preset: str, shape: tuple[int, ...], millions: float) -> None:
    config = load_config(CONFIGS / f"{preset}.toml").model
    config.vocab_size = config.vocab_size or 2048
    d, prelude, core, coda, m = shape
    block = 4 * d * d + 3 * d * m + 2 * d + 4 * d  # matrices, bias of queries and keys, four norms
    expected = (prelude + core + coda) * block + 2 * d * d + d
    counts = build_model(config, None, "meta").parameter_counts()
    assert counts["total"] - counts["embedding"] == expected
    assert expected / 1e6 == pytest.approx(millions, rel=0.02)


def test_linear_injection_is_needed_for_huginns_count() -> None:
    config = load_config(CONFIGS / "huginn-3.5b.toml").model
    counts = build_model(config, None, "meta").parameter_counts()
    assert round(counts["total"] / 1e6) == 3565
    assert counts["adapter"] == 2 * 5280 * 5280


def test_diagonal_decay_stays_inside_the_unit_interval() -> None:
    model = build_model(dataclasses.replace(SMALL, injection="diagonal"), 0)
    with torch.no_grad():
        model.core.injection.log_rate.copy_(torch.linspace(-20, 20, 16))
        state = torch.ones(1, 4, 16)
        out = model.core.injection(state, torch.zeros_like(state))
    assert ((out >= 0) & (out <= 1)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Depth


def test_poisson_quantile_is_the_inverse_distribution_function() -> None:
    from scipy.stats import poisson

    for mean in (0.3, 4.0, 32.0, 300.0):
        for u in (1e-9, 0.01, 0.5, 0.9, 0.9999):
            assert poisson_quantile(u, mean) == poisson.ppf(u, mean)


def test_depths_follow_huginns_law() -> None:
    draws = [sample_depth(Rng(0, step), 32, 8) for step in range(20_000)]
    depths = np.array([sum(d) for d in draws])
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(33, abs=0.4)  # E[Poisson(tau)] + 1 with E[tau] = 32
    # Var = E[tau] + Var(tau) = 32 + 32^2 (e^{1/4} - 1)
    assert depths.std() == pytest.approx(math.sqrt(32 + 32**2 * (math.exp(0.25) - 1)), rel=0.03)
    assert all(with_gradient == min(8, without + with_gradient) for without, with_gradient in draws)


def test_full_backpropagation_keeps_the_depth() -> None:
    for step in range(50):
        without, with_gradient = sample_depth(Rng(0, step), 8, 0)
        assert without == 0
        assert with_gradient == sum(sample_depth(Rng(0, step), 8, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Written-out kernels and compilation


@pytest.mark.parametrize("weight_shape", [(6,), (2, 1, 6), (2, 3, 6)])
@pytest.mark.parametrize("shifted", [False, True])
def test_scaled_rms_and_its_backward(weight_shape: tuple[int, ...], shifted: bool) -> None:
    """Against the formula (arXiv 1910.07467) and, for the backward, against finite differences."""
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 6), weight_shape, (2, 1, 6))
    )
    add = shift if shifted else None
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + (shift if shifted else 0)
    torch.testing.assert_close(scaled_rms(x, weight, add, 1e-6), expected)
    inputs = (x, weight, shift) if shifted else (x, weight)
    assert torch.autograd.gradcheck(lambda x, w, *s: scaled_rms(x, w, s[0] if s else None, 1e-6), inputs)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_queries_keys_and_values_and_their_backward(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(d_model=8, n_heads=4, n_kv_heads=kv_heads, head_size=4)
    attention = with_values(Attention(config)).double()
    rope = rope_table(config, 3, torch.device("cpu"), torch.float64)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    inputs = (x, attention.qk_bias, attention.qkv.weight)
    assert torch.autograd.gradcheck(lambda x, *_: attention.project(x, rope), inputs)
    ours = attention.project(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what compiled code runs
    for a, b in zip(ours, attention.project(x, rope), strict=True):
        torch.testing.assert_close(a, b)


def test_the_forward_without_gradients_is_the_same() -> None:
    """Written-out kernels skip what they keep for the backward; no number changes."""
    for conditioned in (False, True):
        model = perturbed(dataclasses.replace(SMALL, noise_conditioning=conditioned)).float()
        tokens, level = torch.arange(12).view(1, 12), torch.full((1, 1), 0.3) if conditioned else None
        results = []
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                e_BTD = model.encode(tokens)
                results.append(model.decode(model.iterate(e_BTD, e_BTD, 2, level)))
        assert results[0].requires_grad
        assert not results[1].requires_grad
        assert torch.equal(*results)


def test_scaled_rms_of_silence_and_of_large_numbers() -> None:
    weight = torch.ones(8)
    zero = torch.zeros(1, 8, requires_grad=True)
    out = scaled_rms(zero, weight, None, 1e-6)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(1, 8))
    assert zero.grad is not None
    assert torch.isfinite(zero.grad).all()
    torch.testing.assert_close(scaled_rms(torch.full((1, 8), 1e15), weight, None, 1e-6), torch.ones(1, 8))


def test_rotation_as_complex_product_equals_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tables = rope_table(ModelConfig(d_model=8, n_heads=1), 5, torch.device("cpu"))
    ours = apply_rope(x, *tables)
    (gradient,) = torch.autograd.grad(ours.square().sum() + ours.sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what compiled code runs
    real = apply_rope(x, *tables)
    torch.testing.assert_close(ours, real)
    torch.testing.assert_close(gradient, torch.autograd.grad(real.square().sum() + real.sum(), x)[0])


def test_gated_product_and_its_backward() -> None:
    mlp = with_values(GatedMLP(4, 3)).double()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    gate, up = mlp.fc(x).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.proj(torch.nn.functional.silu(gate) * up))
    assert torch.autograd.gradcheck(mlp, x)
