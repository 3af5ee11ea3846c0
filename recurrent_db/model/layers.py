"""The parts of a transformer layer: rotary embedding, attention, MLP, noise conditioning.

By default layers follow Huginn (arXiv 2502.05171 and its released configuration): sandwich RMSNorm, gated SiLU MLP,
interleaved RoPE in fp32, a learned bias on queries and keys before RoPE, and no other bias. `config.ModelConfig.layer`
chooses the layers of Llama or GPT-NeoX instead.

Shapes: B sequences, T positions, D width, H heads, G heads of keys and values, E head size, M hidden width of the MLP.
Suffixes of names give the shape, as in ``x_BTD``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_db.config import ModelConfig
from recurrent_db.model.attention import Visible, attend
from recurrent_db.model.norms import LayerNorm, RMSNorm, applied, wide


class Linear(nn.Linear):
    """A linear layer without initial values; `LoopedLM.initialize` sets them."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """An embedding table without initial values, like `Linear`."""

    def reset_parameters(self) -> None:
        pass


def lookup(ids: Tensor, table_VD: Tensor, tied: bool = True) -> Tensor:
    """Rows ``ids`` of a table, (*ids.shape, D).

    On the CPU the gradient of a table that is ``tied`` to the head is sparse. It is added to the dense gradient that the
    head gives the table in the same backward, which saves a table of zeros. On CUDA it is dense, because adding a sparse
    gradient would synchronise.
    """
    sparse = tied and table_VD.device.type == "cpu" and not torch.compiler.is_compiling()
    return F.embedding(ids, table_VD, sparse=sparse)


def rope_table(
    config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864), (T, E/2) each, of ``dtype``.

    Pair e of a head is rotated by the angle position * rope_base^(-2e/R), where R is rope_size or E. Pairs from R/2 on are
    not rotated.

    Angles are float64 in Huginn's layers. In the others they have ``dtype``, as in transformers: the rounding of fp32 angles
    changes logits at long range, and imported weights were trained with it.
    """
    size, huginn = config.rope_size or config.d_head, config.layer == "huginn"
    exact = torch.float64 if huginn else dtype
    exponents = torch.arange(0, size, 2, dtype=exact, device=device) / size
    rates = config.rope_base**-exponents if huginn else 1.0 / config.rope_base**exponents
    rates = F.pad(rates, (0, (config.d_head - size) // 2))
    angles = torch.arange(length, dtype=exact, device=device)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def build_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """A norm over the residual stream."""
    return (LayerNorm if config.layer == "neox" else RMSNorm)(config.d_model, config.norm_eps)


def apply_rope(x_BTHE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate neighbouring pairs (0,1), (2,3), ... of each head, in fp32 or wider; the result has x's dtype.

    F = E/2. The tables may also be (B, T, F), if positions differ between sequences.
    """
    pairs = x_BTHE.to(wide(x_BTHE.dtype)).unflatten(-1, (-1, 2))
    cos, sin = cos_TF[..., None, :], sin_TF[..., None, :]
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same as one complex product: one pass over memory instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x_BTHE.dtype)


class _RotatedQKV(torch.autograd.Function):
    """Split the fused projection's output into queries (B, T, H, E) and keys and values, (B, T, G, E) each; add the bias to
    queries and keys and rotate them.

    The hand-written backward writes into one buffer; PyTorch would stack three. qkv: (B, T, (H + 2G) E), fp32 or wider.
    bias: (H + G, E). turn: cos + i sin, complex (T, E/2) or (B, T, E/2).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turn)
        parts = qkv.unflatten(-1, (-1, bias.shape[-1]))
        kv_heads = parts.shape[2] - len(bias)
        qk = parts[:, :, :-kv_heads] + bias
        torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(turn[..., None, :])
        return qk[:, :, :-kv_heads], qk[:, :, -kv_heads:], parts[:, :, -kv_heads:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (turn,) = ctx.saved_tensors
        back = turn.conj().resolve_conj()[..., None, :]
        dq, dk, dv = grads
        heads, both = dq.shape[2], dq.shape[2] + dk.shape[2]
        d = dv.new_empty(*dv.shape[:2], both + dv.shape[2], dv.shape[3])
        pairs = torch.view_as_complex(d.unflatten(-1, (-1, 2)))
        for gradient, place in ((dq, slice(0, heads)), (dk, slice(heads, both))):
            if gradient.stride(-1) != 1:  # some attention kernels return another memory layout
                gradient = gradient.contiguous()
            torch.mul(torch.view_as_complex(gradient.unflatten(-1, (-1, 2))), back, out=pairs[:, :, place])
        d[:, :, both:] = dv
        return d.flatten(2), d[:, :, :both].sum((0, 1)), None


QKV = tuple[Tensor, Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, (B, G, S, E) each."""


@dataclass(frozen=True)
class Context:
    """Keys and values of one layer of a context stream, for a second stream that attends to it (two-stream attention).

    Position i of the second stream sees the context's positions <= i and itself. T queries meet S + T keys, so there is no
    2T x 2T mask. S is T unless a cache holds earlier positions.
    """

    k_BGSE: Tensor
    v_BGSE: Tensor
    visible: Visible
    """Mask over [context keys, own keys]; all layers share it."""


class Attention(nn.Module):
    """Causal multi-head attention with one fused QKV projection. Query heads share heads of keys and values in groups
    (GQA, arXiv 2305.13245) if there are fewer of those."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads, size = config.n_heads, config.kv_heads, config.d_head
        self.sizes = heads, kv_heads, kv_heads
        self.qkv = Linear(config.d_model, config.d_qkv, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(heads + kv_heads, size))
        all_biased = config.layer == "neox"
        self.v_bias = nn.Parameter(torch.zeros(kv_heads, size)) if config.v_bias or all_biased else None
        self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps) if config.qk_norm else None for _ in range(2))
        self.proj = Linear(heads * size, config.d_model, bias=all_biased)

    def project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E), keys and values, (B, G, T, E) each; queries and keys are rotated."""
        qkv_BTX, bias = self.qkv(x_BTD), self.qk_bias
        if (
            qkv_BTX.device.type == "cpu"
            and qkv_BTX.dtype == wide(qkv_BTX.dtype)
            and self.q_norm is None
            and not torch.compiler.is_compiling()
        ):
            q_BTHE, k_BTGE, v_BTGE = applied(_RotatedQKV, qkv_BTX, bias, torch.complex(*rope))
        else:
            q_BTHE, k_BTGE, v_BTGE = qkv_BTX.unflatten(-1, (-1, bias.shape[-1])).split(self.sizes, dim=2)
            q_BTHE, k_BTGE = q_BTHE + bias[: self.sizes[0]], k_BTGE + bias[self.sizes[0] :]
            if self.q_norm is not None and self.k_norm is not None:
                q_BTHE, k_BTGE = self.q_norm(q_BTHE), self.k_norm(k_BTGE)
            q_BTHE, k_BTGE = (apply_rope(x, *rope).to(v_BTGE.dtype) for x in (q_BTHE, k_BTGE))
        if self.v_bias is not None:
            v_BTGE = v_BTGE + self.v_bias.to(v_BTGE.dtype)
        return q_BTHE.transpose(1, 2), k_BTGE.transpose(1, 2), v_BTGE.transpose(1, 2)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visible,
        context: Context | None = None,
        keep: list[KeysValues] | None = None,
    ) -> Tensor:
        """Attention before the output projection, (B, T, H E).

        Args:
            q, k, v: from `project`.
            visible: mask, and the keys and values of earlier positions if there are any.
            context: another stream to attend to. Position i sees its positions <= i, and itself.
            keep: list to which this layer's keys and values are appended.
        """
        if context is not None:
            k, v, visible = (
                torch.cat((context.k_BGSE, k), dim=2),
                torch.cat((context.v_BGSE, v), dim=2),
                context.visible,
            )
        else:
            k, v = visible.extend(self, k, v)
            if keep is not None:
                keep.append((k, v))
        return attend(q, k, v, visible).transpose(1, 2).flatten(2)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, where gate and up are the halves of the last axis.

    The hand-written backward writes both gradients into one buffer; PyTorch would compute them apart and copy them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(x, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (dy,) = grads
        x, active = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.mul(dy, active, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return dx


class GatedMLP(nn.Module):
    """proj(silu(gate) * up). One fused projection gives gate (first half) and up (second half)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = Linear(dim, 2 * hidden, bias=False)
        self.proj = Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        both_BTM = self.fc(x_BTD)
        if both_BTM.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.proj(applied(_SwiGLU, both_BTM))
        gate_BTM, up_BTM = both_BTM.chunk(2, dim=-1)
        return self.proj(F.silu(gate_BTM) * up_BTM)


class PlainMLP(nn.Module):
    """proj(gelu(fc(x))), both with a bias."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc, self.proj = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x_BTD)))


class Block(nn.Module):
    """One transformer layer, of the kind `config.ModelConfig.layer`:

    - huginn, with sandwich norms: x = n2(attn(n1(x)) + x); x = n4(mlp(n3(x)) + x).
    - llama: x = attn(n1(x)) + x; x = mlp(n3(x)) + x.
    - neox, with parallel branches: x = attn(n1(x)) + mlp(n3(x)) + x.

    The modulation conditions the layer on the noise level (AdaLN, DiT, arXiv 2212.09748). It is six tensors broadcastable to
    (B, T, D): shift, scale and gate for attention, then for the MLP. Each branch computes
    (1 + gate) * branch((1 + scale) * norm(x) + shift), so zeros change nothing. The gate is centred on one, unlike DiT's,
    because Huginn's branches have no gate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        before = lambda: build_norm(config)  # noqa: E731
        after = before if config.layer == "huginn" else nn.Identity
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = before(), after(), before(), after()
        self.attn = Attention(config)
        self.parallel = config.layer == "neox"
        self.mlp = (PlainMLP if self.parallel else GatedMLP)(config.d_model, config.d_mlp)
        self.one_position: tuple[Callable[..., QKV], Callable[..., Tensor]] | None = None
        """`before` and `after`, compiled for a single position (`LoopedLM.compile_decoding`)."""

    def before(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], modulation: tuple[Tensor, ...] | None) -> QKV:
        """The work before attention: norm and projection to queries, keys and values; see `Attention.project`."""
        normed = self.norm_1(x_BTD) if modulation is None else self.norm_1(x_BTD, modulation[1], modulation[0])
        return self.attn.project(normed, rope)

    def after(self, x_BTD: Tensor, mixed_BTX: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        """The work after attention: output projection, residual, norms and MLP, (B, T, D)."""
        branch, first_BTD = self.attn.proj(mixed_BTX), x_BTD
        if modulation is None:
            x_BTD = self.norm_2(branch + x_BTD)
            return self.norm_4(self.mlp(self.norm_3(first_BTD if self.parallel else x_BTD)) + x_BTD)
        _, _, gate_a, shift_m, scale_m, gate_m = modulation
        x_BTD = self.norm_2(torch.addcmul(x_BTD, branch, 1 + gate_a))
        branch = self.mlp(self.norm_3(first_BTD if self.parallel else x_BTD, scale_m, shift_m))
        return self.norm_4(torch.addcmul(x_BTD, branch, 1 + gate_m))

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        modulation: tuple[Tensor, ...] | None = None,
        context: Context | None = None,
        keep: list[KeysValues] | None = None,
    ) -> Tensor:
        """Apply the layer, (B, T, D) to (B, T, D). ``context`` and ``keep`` as in `Attention.mix`."""
        before, after = self.before, self.after
        if self.one_position is not None and x_BTD.shape[1] == 1 and not self.training:
            before, after = self.one_position
        q, k, v = before(x_BTD, rope, modulation)
        return after(x_BTD, self.attn.mix(q, k, v, visible, context, keep), modulation)

    def keys_values(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        modulation: tuple[Tensor, ...] | None = None,
    ) -> KeysValues:
        """The keys and values of the layer's attention, (B, G, S, E) each, without the rest of the layer."""
        return visible.extend(self.attn, *self.before(x_BTD, rope, modulation)[1:])


def contexts(
    blocks: nn.ModuleList,
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor],
    visible: Visible,
    modulation: Sequence[tuple[Tensor, ...]] | None = None,
) -> list[Context]:
    """Run a context stream through ``blocks`` and return each layer's keys and values. The last layer computes no more."""
    kept: list[KeysValues] = []
    for index, block in enumerate(cast(list[Block], blocks)):
        layer = modulation[index] if modulation is not None else None
        if index + 1 < len(blocks):
            x_BTD = block(x_BTD, rope, visible, layer, keep=kept)
        else:
            kept.append(block.keys_values(x_BTD, rope, visible, layer))
    return [Context(k, v, visible.beside) for k, v in kept]
