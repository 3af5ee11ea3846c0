"""A looped language model for Hugging Face transformers: prelude -> core x K -> coda.

    tokens --embed, prelude--> e                         once
    state_0 --core(inject(state, e))--> ... state_K      K times: `num_recurrence`
    state_K --final norm, coda, final norm--> hidden     once
    hidden --embedding matrix--> logits

The architecture is Huginn's (arXiv:2502.05171). K is ``config.num_recurrence``, or an argument of ``forward`` and
``generate``. ``config.initial_state`` is the start of the K iterations:

- ``zeros``;
- ``random``: a truncated normal, as in Huginn's training;
- ``noise``: the iterations are a reverse diffusion over K noise levels (arXiv:2506.14202). K = 1 is the read-out at the
  highest level.

Random starts depend only on ``config.seed``, the row in the batch, and the position. The same call therefore gives the same
result, with or without a cache. Row 0 equals the text of `recurrent_db.generate` with the same seed.

Every iteration has its own keys and values. The cache therefore has one layer for each visit to a block, and must be able
to grow (`DynamicCache`). A cache works for one K only.

Shapes: B rows, T positions of a pass, S positions so far, D width, H heads, E head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_recurrent_db import RecurrentDBConfig

# Name of the cache in the output; it depends on the version of transformers.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"

NORM_EPS, ROPE_BASE = 1e-6, 50_000.0

Modulation = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Randomness as a function of (seed, row, position)


def key(*parts: int | str) -> int:
    """Hash the parts into a 63-bit seed (BLAKE2b)."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Noise:
    """fp32 random numbers by row and position. They are drawn in pages, so they do not depend on the text's length."""

    def __init__(self, seed: int, page: int) -> None:
        self.seed, self.page = seed, page
        self.kept: dict[tuple[int, int, str, torch.device], Tensor] = {}
        """Pages of the last call. Consecutive positions usually need the same page again."""

    def __call__(self, positions_BT: Tensor, width: int, stream: str, normal: bool) -> Tensor:
        """Random numbers, (B, T, width): standard normal, or uniform in [0, 1)."""
        rows, before, self.kept = [], self.kept, {}
        for row, positions_T in enumerate(positions_BT.tolist()):
            first, last = min(positions_T) // self.page, max(positions_T) // self.page
            places = [(row, page, stream, positions_BT.device) for page in range(first, last + 1)]
            pages = [before[place] if place in before else self._page(*place, width, normal) for place in places]
            self.kept.update(zip(places, pages, strict=True))
            rows.append(torch.cat(pages)[positions_BT[row] - first * self.page])
        return torch.stack(rows)

    def _page(self, row: int, page: int, stream: str, device: torch.device, width: int, normal: bool) -> Tensor:
        generator = torch.Generator(device=device)
        generator.manual_seed(key(self.seed, -1, row, f"{stream}/draw0/page{page}"))
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


class Pass:
    """One forward pass over T positions after those in the cache: rotations, attention mask, and the cache's next layer."""

    def __init__(self, positions_BT: Tensor, mask_BS: Tensor | None, seen: int, cache: Any, config: Any) -> None:
        self.positions_BT, self.cache, self.visits = positions_BT, cache, itertools.count()
        self.length, self.total = positions_BT.shape[1], seen + positions_BT.shape[1]
        head_size, device = config.hidden_size // config.num_attention_heads, positions_BT.device
        rates = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
        angles = positions_BT[..., None].double() * rates
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask: Tensor | None = None  # None is the causal mask
        causal = torch.arange(self.total, device=device) <= torch.arange(seen, self.total, device=device)[:, None]
        if mask_BS is not None:  # padding is visible to padding only
            real_BS = mask_BS.bool()
            self.mask = (causal & (real_BS[:, None, :] == real_BS[:, seen:, None]))[:, None]
        elif seen and self.length > 1:
            self.mask = causal

    def attend(self, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        if self.cache is not None:
            k_BHTE, v_BHTE = self.cache.update(k_BHTE, v_BHTE, self._layer())
            if k_BHTE.shape[2] != self.total:
                raise ValueError("this model needs a cache that grows (DynamicCache), used with one K")
        causal = self.mask is None and self.length > 1
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=self.mask, is_causal=causal)

    def _layer(self) -> int:
        index, layers = next(self.visits), getattr(self.cache, "layers", None)
        while layers and len(layers) <= index:  # the cache was created with one layer per block
            layers.append(type(layers[0])())
        return index


class Attention(nn.Module):
    """Causal attention: fused projection of queries, keys and values; bias on queries and keys; interleaved RoPE."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, n_heads, dim // n_heads))
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BTD: Tensor, here: Pass) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.n_heads, -1))
        qk, dtype = qkv[:, :, :2] + self.qk_bias, wide(x_BTD.dtype)
        turn = torch.complex(here.cos.to(dtype), here.sin.to(dtype))[:, :, None, None]
        turned = torch.view_as_complex(qk.to(dtype).unflatten(-1, (-1, 2))) * turn
        q, k = torch.view_as_real(turned).flatten(-2).to(x_BTD.dtype).unbind(2)
        out_BHTE = here.attend(q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2))
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


class Block(nn.Module):
    """Sandwich block: x = n2(attn(n1(x)) + x); x = n4(mlp(n3(x)) + x). A modulation scales, shifts and gates both branches
    (AdaLN with gates centred on one)."""

    def __init__(self, config: RecurrentDBConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(width, NORM_EPS) for _ in range(4))
        self.attn = Attention(width, config.num_attention_heads)
        self.mlp = GatedMLP(width, config.intermediate_size)

    def forward(self, x_BTD: Tensor, here: Pass, modulation: Modulation | None = None) -> Tensor:
        if modulation is None:
            x_BTD = self.norm_2(self.attn(self.norm_1(x_BTD), here) + x_BTD)
            return self.norm_4(self.mlp(self.norm_3(x_BTD)) + x_BTD)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x_BTD = self.norm_2(torch.addcmul(x_BTD, self.attn(self.norm_1(x_BTD, scale_a, shift_a), here), 1 + gate_a))
        return self.norm_4(torch.addcmul(x_BTD, self.mlp(self.norm_3(x_BTD, scale_m, shift_m)), 1 + gate_m))


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
            state_BTD = block(state_BTD, here, modulation[index] if modulation else None)
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


# ---------------------------------------------------------------------------------------------------------------------
# The model


class RecurrentDBForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. The module's docstring describes it."""

    config_class = RecurrentDBConfig
    base_model_prefix = ""
    _no_split_modules = ["Block", "Core"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: RecurrentDBConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.n_prelude))
        self.core = Core(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.n_coda))
        self.final_norm = RMSNorm(width, NORM_EPS)
        features = config.noise_features
        self.noise_embedding = NoiseEmbedding(width, config.n_core, features) if features else None
        self.noise = Noise(config.seed, config.max_position_embeddings)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> None:
        return None

    def encode(self, tokens_BT: Tensor, here: Pass) -> Tensor:
        """Prelude: the context e, (B, T, D)."""
        x_BTD = self.embedding(tokens_BT) * math.sqrt(self.config.hidden_size)
        for block in self.prelude:
            x_BTD = block(x_BTD, here)
        return x_BTD

    def decode(self, state_BTD: Tensor, here: Pass) -> Tensor:
        """Final norm, coda, final norm: the hidden vectors for the head, (B, T, D)."""
        x_BTD = self.final_norm(state_BTD)
        for block in self.coda:
            x_BTD = block(x_BTD, here)
        return self.final_norm(x_BTD)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V)."""
        return F.linear(hidden, self.embedding.weight)

    def recur(self, e_BTD: Tensor, k: int, here: Pass) -> Tensor:
        """K core iterations, then the read-out's hidden vectors. The state starts from zeros or from a random normal with
        standard deviation sqrt(2/5), truncated at three of them."""
        state = torch.zeros_like(e_BTD)
        if self.config.initial_state == "random":
            tail = 0.0013498980316301  # Phi(-3)
            u = self.noise(here.positions_BT, e_BTD.shape[-1], "state", normal=False)
            state = (math.sqrt(2 / 5) * torch.special.ndtri(tail + u * (1 - 2 * tail))).to(e_BTD.dtype)
        for _ in range(k):
            state = self.core(state, e_BTD, here)
        return self.decode(state, here)

    def walk(self, e_BTD: Tensor, k: int, here: Pass) -> Tensor:
        """Reverse diffusion over K noise levels. Each position moves its own z from noise towards the embedding of the next
        token. A level is one conditioned pass of the core. Before the last level, a bridge turns its read-out into the
        estimate that the step moves towards. Uses EDM's scalings (arXiv:2206.00364)."""
        law, embed_noise = self.config.walk, self.noise_embedding
        sd = law["sd"]
        assert embed_noise is not None
        z = self.noise(here.positions_BT, e_BTD.shape[-1], "noise", normal=True) * law["sigma_max"]
        for level, following in itertools.pairwise([*noise_levels(law, k), 0.0]):
            sigma = torch.full((len(z), 1, 1), level, dtype=torch.float32, device=z.device)
            mute = 1 / (1 + sigma**2) if law["mute"] else 1.0
            view = torch.rsqrt(sigma**2 + sd**2) * mute * z
            modulation = embed_noise(sigma[..., 0].log() / 4)
            state = self.core(view.to(e_BTD.dtype), e_BTD, here, modulation)
            c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd * torch.rsqrt(sigma**2 + sd**2)
            estimate = c_skip * z + c_out * state.to(wide(state.dtype))
            if following:
                ratio = following / level
                z = ratio * z + (1 - ratio) * self._bridge(estimate, here)
        return self.decode((estimate / sd).to(e_BTD.dtype), here)

    def _bridge(self, estimate: Tensor, here: Pass) -> Tensor:
        """The estimate that a step moves towards, (B, T, D): the core's own (state), or the expected (soft) or most likely
        (hard) normalised target under its read-out."""
        law = self.config.walk
        if law["bridge"] == "state":
            return estimate
        logits_BTV = self.head(self.decode((estimate / law["sd"]).to(self.embedding.weight.dtype), here))
        table_VD = self.embedding.weight
        rows = table_VD if law["bridge"] == "soft" else table_VD[logits_BTV.argmax(-1)]
        rows = F.normalize(rows.to(wide(rows.dtype)), dim=-1)
        return logits_BTV.to(rows.dtype).softmax(-1) @ rows if law["bridge"] == "soft" else rows

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_recurrence: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for the token after each position.

        Args:
            input_ids: int64 (B, T).
            attention_mask: 1 for tokens and 0 for padding, over all positions so far, (B, S).
            position_ids: int64 (B, T). By default counted from the first token of each row.
            cache: keys and values of the earlier positions. Older versions of transformers call it ``past_key_values``.
            labels: int64 (B, T). They are shifted here; -100 is ignored.
            logits_to_keep: number of last positions to return; 0 returns all.
            num_recurrence: number of core iterations K; ``config.num_recurrence`` by default.
        """
        k = self.config.num_recurrence if num_recurrence is None else int(num_recurrence)
        if k < 1:
            raise ValueError(f"num_recurrence must be 1 or more, got {k}")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("attention_mask must be (batch, positions), 1 for tokens and 0 for padding")
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            else:
                position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        position_ids = position_ids.expand(input_ids.shape).long()
        here = Pass(position_ids, attention_mask, seen, cache, self.config)
        e_BTD = self.encode(input_ids, here)
        hidden_BTD = (self.walk if self.config.initial_state == "noise" else self.recur)(e_BTD, k, here)
        if cache is not None:
            visits = next(here.visits)
            if seen and getattr(cache, "visits", visits) != visits:
                raise ValueError("this cache was made with another K")
            cache.visits = visits
        logits = self.head(hidden_BTD[:, -logits_to_keep:] if logits_to_keep else hidden_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
