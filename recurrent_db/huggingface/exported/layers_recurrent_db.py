"""The parts of a looped language model: its noise, its blocks and its noise levels. `modeling_recurrent_db` puts them
together.

Shapes: B rows, T positions of a pass, S positions so far, D width, H heads, G heads of
keys and values, E head size.
"""

from __future__ import annotations

import functools
import itertools
import math
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_recurrent_db import RecurrentDBConfig

Modulation = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Randomness as a function of (seed, position)


def key(*parts: int | str) -> int:
    """Hash the parts into a 63-bit seed (BLAKE2b)."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Noise:
    """fp32 random numbers by position. They are drawn in pages, so they do not depend on the text's length."""

    def __init__(self, seed: int, page: int) -> None:
        self.seed, self.page = seed, page
        self.kept: dict[tuple[int, str, torch.device], Tensor] = {}
        """Pages of the last call. Consecutive positions usually need the same page again."""

    def __call__(self, positions_BT: Tensor, width: int, stream: str, normal: bool) -> Tensor:
        """Random numbers, (B, T, width): standard normal, or uniform in [0, 1)."""
        pages, which_BT = (positions_BT // self.page).unique(return_inverse=True)
        places = [(page, stream, positions_BT.device) for page in pages.tolist()]
        self.kept = {
            place: self.kept[place] if place in self.kept else self._page(*place, width, normal) for place in places
        }
        return torch.stack(list(self.kept.values()))[which_BT, positions_BT % self.page]

    def _page(self, page: int, stream: str, device: torch.device, width: int, normal: bool) -> Tensor:
        generator = torch.Generator(device=device)
        generator.manual_seed(key(self.seed, -1, 0, f"{stream}/draw0/page{page}"))
        out = torch.empty(self.page, width, device=device)
        return out.normal_(generator=generator) if normal else out.uniform_(generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a block


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norms and rotations: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight. With a modulation: (1 + scale) * norm(x) + shift."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        dtype = wide(x.dtype)
        weight = self.weight.to(dtype)
        if scale is not None:
            weight = torch.addcmul(weight, weight, scale.to(dtype))
        wide_x = x.to(dtype)
        norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        unit = wide_x * (norm * norm / x.shape[-1] + self.eps).rsqrt()
        return (unit * weight if shift is None else torch.addcmul(shift.to(dtype), unit, weight)).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm in fp32 or wider. With a modulation: (1 + scale) * norm(x) + shift."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        dtype = wide(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        normed = F.layer_norm(x.to(dtype), (x.shape[-1],), weight, bias, self.eps)
        if scale is not None:
            normed = torch.addcmul(normed, normed, scale.to(dtype))
        return (normed if shift is None else normed + shift.to(dtype)).to(x.dtype)


def build_norm(config: RecurrentDBConfig) -> nn.Module:
    """A norm over the residual stream."""
    return (LayerNorm if config.layer == "neox" else RMSNorm)(config.hidden_size, config.norm_eps)


class Pass:
    """One forward pass over T positions after those in the cache: rotations, attention mask, the cache's next layer, and the
    outputs of the blocks.

    ``outputs`` receives the output of each block unless it is None. ``checkpoint`` runs a block without keeping its
    activations for the backward pass; None keeps them."""

    def __init__(self, positions_BT: Tensor, mask_BS: Tensor | None, seen: int, cache: Any, config: Any) -> None:
        self.positions_BT, self.cache, self.visits = positions_BT, cache, itertools.count()
        self.outputs: list[Tensor] | None = None
        self.checkpoint: Any = None
        self.length, self.total = positions_BT.shape[1], seen + positions_BT.shape[1]
        size, device = config.rope_size or config.head_dim, positions_BT.device
        # Angles are float64 in Huginn's layers, and fp32 in the others, as in transformers.
        huginn = config.layer == "huginn"
        exact = torch.float64 if huginn else torch.float32
        exponents = torch.arange(0, size, 2, dtype=exact, device=device) / size
        rates = config.rope_base**-exponents if huginn else 1.0 / config.rope_base**exponents
        rates = F.pad(rates, (0, (config.head_dim - size) // 2))
        angles = positions_BT[..., None].to(exact) * rates
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask: Tensor | None = None  # None is the causal mask
        causal = torch.arange(self.total, device=device) <= torch.arange(seen, self.total, device=device)[:, None]
        if mask_BS is not None:  # padding is visible to padding only
            real_BS = mask_BS.bool()
            self.mask = (causal & (real_BS[:, None, :] == real_BS[:, seen:, None]))[:, None]
        elif seen and self.length > 1:
            self.mask = causal

    def run(self, block: nn.Module, x_BTD: Tensor, modulation: Modulation = ()) -> Tensor:
        """The output of a block."""
        # Reentrant checkpointing only sees tensors that are arguments of their own.
        run = functools.partial(self.checkpoint, block) if self.checkpoint else block
        x_BTD = run(x_BTD, self, *modulation)
        if self.outputs is not None:
            self.outputs.append(x_BTD)
        return x_BTD

    def attend(self, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        if self.cache is not None:
            k_BHTE, v_BHTE = self.cache.update(k_BHTE, v_BHTE, self._layer())
            if k_BHTE.shape[2] != self.total:
                raise ValueError("this model needs a cache that grows (DynamicCache), used with one K")
        causal = self.mask is None and self.length > 1
        grouped = q_BHTE.shape[1] != k_BHTE.shape[1]
        return F.scaled_dot_product_attention(
            q_BHTE, k_BHTE, v_BHTE, attn_mask=self.mask, is_causal=causal, enable_gqa=grouped
        )

    def _layer(self) -> int:
        index, layers = next(self.visits), getattr(self.cache, "layers", None)
        while layers and len(layers) <= index:  # the cache was created with one layer per block
            layers.append(type(layers[0])())
        return index


class Attention(nn.Module):
    """Causal attention: fused projection of queries, keys and values; bias on queries and keys; interleaved RoPE. If there
    are fewer heads of keys and values, each serves a group of query heads."""

    def __init__(self, config: RecurrentDBConfig) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.n_heads, self.kv_heads, all_biased = heads, kv_heads, config.layer == "neox"
        self.qkv = nn.Linear(config.hidden_size, (heads + 2 * kv_heads) * size, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(heads + kv_heads, size))
        self.v_bias = nn.Parameter(torch.zeros(kv_heads, size)) if config.v_bias or all_biased else None
        self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps) if config.qk_norm else None for _ in range(2))
        self.proj = nn.Linear(heads * size, config.hidden_size, bias=all_biased)

    def forward(self, x_BTD: Tensor, here: Pass) -> Tensor:
        bias, both = self.qk_bias, self.n_heads + self.kv_heads
        qkv, dtype = self.qkv(x_BTD).unflatten(-1, (-1, bias.shape[-1])), wide(x_BTD.dtype)
        qk, v = qkv[:, :, :both] + bias, qkv[:, :, both:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, : self.n_heads]), self.k_norm(qk[:, :, self.n_heads :])), dim=2)
        if self.v_bias is not None:
            v = v + self.v_bias
        turn = torch.complex(here.cos.to(dtype), here.sin.to(dtype))[:, :, None]
        turned = torch.view_as_complex(qk.to(dtype).unflatten(-1, (-1, 2))) * turn
        q, k = torch.view_as_real(turned).flatten(-2).to(x_BTD.dtype).split((self.n_heads, self.kv_heads), dim=2)
        out_BHTE = here.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out_BHTE.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """proj(silu(gate) * up). One fused projection, gate half first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 2 * hidden, bias=False)
        self.proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.fc(x_BTD).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class PlainMLP(nn.Module):
    """proj(gelu(fc(x))), both with a bias."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x_BTD)))


class Block(nn.Module):
    """One transformer layer of the kind ``config.layer``:

    - huginn, with sandwich norms: x = n2(attn(n1(x)) + x); x = n4(mlp(n3(x)) + x).
    - llama: x = attn(n1(x)) + x; x = mlp(n3(x)) + x.
    - neox, with parallel branches: x = attn(n1(x)) + mlp(n3(x)) + x.

    A modulation scales, shifts and gates both branches (AdaLN with gates centred on one).
    """

    def __init__(self, config: RecurrentDBConfig) -> None:
        super().__init__()
        after = nn.Identity if config.layer != "huginn" else lambda: build_norm(config)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = build_norm(config), after(), build_norm(config), after()
        self.attn = Attention(config)
        self.parallel = config.layer == "neox"
        self.mlp = (PlainMLP if self.parallel else GatedMLP)(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, here: Pass, *modulation: Tensor) -> Tensor:
        first_BTD = x_BTD
        if not modulation:
            x_BTD = self.norm_2(self.attn(self.norm_1(x_BTD), here) + x_BTD)
            return self.norm_4(self.mlp(self.norm_3(first_BTD if self.parallel else x_BTD)) + x_BTD)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x_BTD = self.norm_2(torch.addcmul(x_BTD, self.attn(self.norm_1(x_BTD, scale_a, shift_a), here), 1 + gate_a))
        branch = self.mlp(self.norm_3(first_BTD if self.parallel else x_BTD, scale_m, shift_m))
        return self.norm_4(torch.addcmul(x_BTD, branch, 1 + gate_m))


class Injection(nn.Module):
    """Feeds the context e to the core. linear: W [state, e]; diagonal: a * state + W e; add: state + e."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "add":
            self.adapter = nn.Linear(2 * dim if kind == "linear" else dim, dim, bias=False)
        if kind == "diagonal":
            self.log_rate = nn.Parameter(torch.full((dim,), math.log(math.log(2.0))))

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.adapter(torch.cat((state_BTD, e_BTD), dim=-1))
        if self.kind == "diagonal":
            return torch.exp(-torch.exp(self.log_rate)).to(state_BTD.dtype) * state_BTD + self.adapter(e_BTD)
        return state_BTD + e_BTD


class Core(nn.Module):
    """One iteration of the weight-tied core."""

    def __init__(self, config: RecurrentDBConfig) -> None:
        super().__init__()
        self.injection = Injection(config.injection, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_core))

    def forward(
        self, state_BTD: Tensor, e_BTD: Tensor, here: Pass, modulation: list[Modulation] | None = None
    ) -> Tensor:
        state_BTD = self.injection(state_BTD, e_BTD)
        for index, block in enumerate(self.blocks):
            state_BTD = here.run(block, state_BTD, modulation[index] if modulation else ())
        return state_BTD


class NoiseEmbedding(nn.Module):
    """Maps c_noise = ln(sigma)/4, fp32 (B, 1), to six tensors (B, 1, D) for each core block."""

    def __init__(self, dim: int, n_blocks: int, features: int) -> None:
        super().__init__()
        self.n_blocks, self.n_features = n_blocks, features
        self.hidden = nn.Linear(features, features)
        self.out = nn.Linear(features, n_blocks * 6 * dim)

    def forward(self, c_noise_B1: Tensor) -> list[Modulation]:
        half = self.n_features // 2
        rates = torch.exp(torch.linspace(math.log(0.25), math.log(64.0), half, device=c_noise_B1.device))
        angles = c_noise_B1[..., None] * rates * 2 * math.pi
        features = F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, self.n_features % 2))
        flat = self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))
        return [block.chunk(6, dim=-1) for block in flat.chunk(self.n_blocks, dim=-1)]


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels of a K-step walk, from sigma_max down


def _quantiles(law: dict[str, Any], u: Tensor) -> list[float]:
    """Quantiles of the training distribution of the noise level, at the probabilities u (float64)."""
    low, high = law["sigma_min"], law["sigma_max"]
    mean, std = law["p_mean"], law["p_std"]
    q = [0.5 * math.erfc(-(math.log(sigma) - mean) / (std * math.sqrt(2))) for sigma in (low, high)]
    sigma = torch.exp(mean + std * torch.special.ndtri(q[0] + u * (q[1] - q[0])))
    return sigma.clamp(low, high).tolist()


def noise_levels(law: dict[str, Any], k: int) -> list[float]:
    """K noise levels, highest first. K = 1 has only sigma_max."""
    low, high = law["sigma_min"], law["sigma_max"]
    if k == 1:
        return [high]
    if law["grid"] == "equal-probability":
        inner = _quantiles(law, torch.linspace(1, 0, k, dtype=torch.float64))
        return [high, *inner[1:-1], low]
    if law["grid"] == "karras":
        top, bottom = high ** (1 / 7.0), low ** (1 / 7.0)
        return [(top + i / (k - 1) * (bottom - top)) ** 7.0 for i in range(k)]
    return [high * (low / high) ** (i / (k - 1)) for i in range(k)]
