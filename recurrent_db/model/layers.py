"""The parts of a transformer block: norm, rotary embedding, attention, gated MLP, zero-initialised modulation.

Shapes: B sequences, T positions, D width, H heads, E head size (D = H E), M hidden width of the MLP. Suffixes name
them, as in ``x_BTD``. Blocks are Huginn's (arXiv 2502.05171, and its released configuration): sandwich RMSNorm, gated
SiLU MLP, interleaved RoPE in fp32, learned bias on queries and keys added before RoPE, no other bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_db.model.attention import Visible, attend


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms and rotations compute in: fp32 at least (float64 in a float64 model)."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """A linear layer without initial values: the model's own initialisation writes them."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """An embedding table without initial values, like `Linear`."""

    def reset_parameters(self) -> None:
        pass


def lookup(ids: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of a table, (*ids, D). The table also gets a dense gradient in the same backward, from the tied head.

    On the CPU the rows' gradient is sparse and is added to the dense one, which saves a table of zeros. (On CUDA that sum
    would make the host wait.)
    """
    sparse = table_VD.device.type == "cpu" and not torch.compiler.is_compiling()
    return F.embedding(ids, table_VD, sparse=sparse)


class _NoContext:
    """Stands in for the context of a `torch.autograd.Function` whose backward will not run."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a function with its own backward. Without gradients its forward runs alone, which costs a third less for a
    single position."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


class _ScaledRMS(torch.autograd.Function):
    """x / rms(x) * weight + shift, with a backward of its own.

    Without a fused kernel PyTorch composes its RMS norm from a dozen passes over memory, half of a small model's step on a
    CPU. This takes three passes forward and six backward. x: (..., D) fp32 or wider; weight and shift (or None)
    broadcast to x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.mul_(norm).div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * rstd
        ctx.save_for_backward(unit, weight, rstd)
        ctx.shift_shape = None if shift is None else shift.shape
        return unit * weight if shift is None else torch.addcmul(shift, unit, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (dy,) = grads
        unit, weight, rstd = ctx.saved_tensors
        product = dy * unit
        d_weight = product.sum_to_size(weight.shape)
        d_shift = None if ctx.shift_shape is None else dy.sum_to_size(ctx.shift_shape)
        if weight.ndim == 1:
            mean = (product.flatten(0, -2) @ weight).view(rstd.shape)
        else:
            mean = (product * weight).sum(-1, keepdim=True)
        dx = (dy * weight).addcmul_(unit, mean.div_(-unit.shape[-1])).mul_(rstd)
        return dx, d_weight, d_shift, None


def scaled_rms(x: Tensor, weight: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight + shift over the last axis. Shape (..., D); weight and shift broadcast to it.

    Eager code on the CPU uses `_ScaledRMS`; compiled code and CUDA use PyTorch's own norm.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return cast(Tensor, _applied(_ScaledRMS, x, weight, shift, eps))
    if weight.ndim == 1 and shift is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    unit = F.rms_norm(x, (x.shape[-1],), None, eps)
    return unit * weight if shift is None else torch.addcmul(shift, unit, weight)


NORM_EPS = 1e-6
"""Epsilon of every RMSNorm; Huginn's."""
ROPE_BASE = 50_000.0
"""Base of the rotary position embedding; Huginn's."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 or wider, returned in x's dtype. Shape (..., D).

    With a modulation (scale, shift), broadcastable to x, it is (1 + scale) * norm(x) + shift, at hardly more cost.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        dtype = wide(x.dtype)
        if x.dtype == self.weight.dtype == dtype and scale is None and shift is None:
            return scaled_rms(x, self.weight, None, NORM_EPS)
        weight = self.weight.to(dtype)
        if scale is not None:
            weight = torch.addcmul(weight, weight, scale.to(dtype))
        return scaled_rms(x.to(dtype), weight, None if shift is None else shift.to(dtype), NORM_EPS).to(x.dtype)


def rope_table(
    length: int, head_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864), each (T, E/2) of ``dtype``.

    Pair e of a head turns by position * `ROPE_BASE`^(-2e/E).
    """
    rates = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_BTHE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate neighbouring pairs (0,1), (2,3), ... of each head in fp32 or wider; the result has x's dtype. F = E/2. The
    tables may differ by sequence, (B, T, F)."""
    pairs = x_BTHE.to(wide(x_BTHE.dtype)).unflatten(-1, (-1, 2))
    cos, sin = cos_TF[..., None, :], sin_TF[..., None, :]
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same as one product of complex numbers: one pass over memory instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x_BTHE.dtype)


class _RotatedQKV(torch.autograd.Function):
    """Split the fused projection's output into queries, keys (with their bias, rotated) and values, (B, T, H, E) each. The
    backward writes into one buffer, where PyTorch would stack three.

    qkv: (B, T, 3 D) fp32 or wider; bias: (2, H, E); turn: complex (T, E/2), or (B, T, E/2).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turn)
        parts = qkv.unflatten(-1, (3, *bias.shape[1:]))
        qk = parts[:, :, :2] + bias
        torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(turn[..., None, None, :])
        return qk[:, :, 0], qk[:, :, 1], parts[:, :, 2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (turn,) = ctx.saved_tensors
        back = turn.conj().resolve_conj()[..., None, :]
        dv = grads[2]
        d = dv.new_empty(*dv.shape[:2], 3, *dv.shape[2:])
        pairs = torch.view_as_complex(d.unflatten(-1, (-1, 2)))
        for index in (0, 1):
            gradient = grads[index]
            if gradient.stride(-1) != 1:  # not every attention kernel returns it along the head
                gradient = gradient.contiguous()
            torch.mul(torch.view_as_complex(gradient.unflatten(-1, (-1, 2))), back, out=pairs[:, :, index])
        d[:, :, 2] = dv
        return d.flatten(2), d[:, :, :2].sum((0, 1)), None


QKV = tuple[Tensor, Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, (B, H, S, E) each."""


@dataclass(frozen=True)
class Context:
    """Keys and values of one layer of a context stream, for a second stream that attends to it.

    The second stream's position i sees the context's positions <= i and itself. Nothing of
    size 2T x 2T exists: T queries meet S + T keys, and S is T where nothing came before.
    """

    k_BHSE: Tensor
    v_BHSE: Tensor
    visible: Visible
    """Which of [context keys, own keys] each position sees; all layers share it."""


class Attention(nn.Module):
    """Causal multi-head attention with one fused QKV projection."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.head_size = n_heads, dim // n_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, n_heads, self.head_size))
        self.proj = Linear(dim, dim, bias=False)

    def project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, T, E) each, rotated."""
        qkv_BTD3 = self.qkv(x_BTD)
        if (
            qkv_BTD3.device.type == "cpu"
            and qkv_BTD3.dtype == wide(qkv_BTD3.dtype)
            and not torch.compiler.is_compiling()
        ):
            q_BTHE, k_BTHE, v_BTHE = _applied(_RotatedQKV, qkv_BTD3, self.qk_bias, torch.complex(*rope))
        else:
            q_BTHE, k_BTHE, v_BTHE = qkv_BTD3.unflatten(-1, (3, self.n_heads, self.head_size)).unbind(2)
            q_BTHE = apply_rope(q_BTHE + self.qk_bias[0], *rope).to(v_BTHE.dtype)
            k_BTHE = apply_rope(k_BTHE + self.qk_bias[1], *rope).to(v_BTHE.dtype)
        return q_BTHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visible,
        context: Context | None = None,
        keep: list[KeysValues] | None = None,
    ) -> Tensor:
        """What each position sees of the values, (B, T, D), before the output projection.

        Positions see those of their own stream, and what came before it; with a ``context`` its keys up to their own
        position and their own key, and no other of their stream: see
        `Context`. Where ``keep`` is given, this layer's keys and values are appended to it.
        """
        if context is not None:
            k, v, visible = (
                torch.cat((context.k_BHSE, k), dim=2),
                torch.cat((context.v_BHSE, v), dim=2),
                context.visible,
            )
        else:
            k, v = visible.extend(self, k, v)
            if keep is not None:
                keep.append((k, v))
        return attend(q, k, v, visible).transpose(1, 2).flatten(2)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of the two halves of the last axis. The backward writes into one buffer; PyTorch would make the
    halves' gradients separately and copy them together."""

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
    """proj(silu(gate) * up), gate and up from one fused projection with the gate half first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = Linear(dim, 2 * hidden, bias=False)
        self.proj = Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        both_BTM = self.fc(x_BTD)
        if both_BTM.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.proj(_applied(_SwiGLU, both_BTM))
        gate_BTM, up_BTM = both_BTM.chunk(2, dim=-1)
        return self.proj(F.silu(gate_BTM) * up_BTM)


class Block(nn.Module):
    """Sandwich block: x = n2(attn(n1(x)) + x); x = n4(mlp(n3(x)) + x).

    With a modulation (six tensors broadcastable to (B, T, D): shift, scale, gate for attention, then for the MLP) each
    branch computes (1 + gate) * branch((1 + scale) * norm(x) + shift), so that zeros change nothing (AdaLN, DiT,
    arXiv 2212.09748, with the gate centred on one because Huginn's branches are not gated).
    """

    def __init__(self, dim: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(dim) for _ in range(4))
        self.attn = Attention(dim, n_heads)
        self.mlp = GatedMLP(dim, hidden)
        self.one_position: tuple[Callable[..., QKV], Callable[..., Tensor]] | None = None
        """`before` and `after` compiled for passes over one position each (`LoopedLM.compile_decoding`)."""

    def before(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], modulation: tuple[Tensor, ...] | None) -> QKV:
        """Queries, keys and values of x, (B, H, T, E) each."""
        normed = self.norm_1(x_BTD) if modulation is None else self.norm_1(x_BTD, modulation[1], modulation[0])
        return self.attn.project(normed, rope)

    def after(self, x_BTD: Tensor, mixed_BTD: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        """The block's result from what attention mixed of the values."""
        branch = self.attn.proj(mixed_BTD)
        if modulation is None:
            x_BTD = self.norm_2(branch + x_BTD)
            return self.norm_4(self.mlp(self.norm_3(x_BTD)) + x_BTD)
        _, _, gate_a, shift_m, scale_m, gate_m = modulation
        x_BTD = self.norm_2(torch.addcmul(x_BTD, branch, 1 + gate_a))
        branch = self.mlp(self.norm_3(x_BTD, scale_m, shift_m))
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
        """One block; ``context`` and ``keep`` as in `Attention.mix`."""
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
        """The keys and values that the block's attention would see, without the rest of the block."""
        return visible.extend(self.attn, *self.before(x_BTD, rope, modulation)[1:])


class NoiseEmbedding(nn.Module):
    """From c_noise = ln(sigma)/4 to the modulation of every core block: one matrix product for all of them.

    Fourier features of c_noise (fp32, as EDM's), a hidden layer, then a zero-initialised projection to
    n_blocks * 6 * D numbers, so that a fresh model ignores the noise level exactly.
    """

    def __init__(self, dim: int, n_blocks: int, hidden: int, parts: int = 6) -> None:
        super().__init__()
        self.n_blocks, self.dim, self.n_features, self.parts = n_blocks, dim, hidden, parts
        self.hidden = Linear(hidden, hidden)
        self.out = Linear(hidden, n_blocks * parts * dim)

    def forward(self, c_noise_Bs: Tensor) -> list[tuple[Tensor, ...]]:
        """c_noise: fp32 (B, 1) for one level per sequence or (B, T) per token. Returns, for each block, six (B, 1|T, D)."""
        # Frequencies from 1/4 to 64 cycles per unit of c_noise resolve both its whole range (about 3) and a tenth of a nat.
        half = self.n_features // 2
        rates = torch.exp(torch.linspace(math.log(0.25), math.log(64.0), half, device=c_noise_Bs.device))
        angles = c_noise_Bs.float()[..., None] * rates * 2 * math.pi
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        if self.n_features % 2:
            features = F.pad(features, (0, 1))
        device_type = c_noise_Bs.device.type
        # The noise mathematics stays fp32 under autocast (which the meta device does not know).
        with torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext():
            flat = self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))
        return [block.chunk(self.parts, dim=-1) for block in flat.chunk(self.n_blocks, dim=-1)]


def contexts(
    blocks: nn.ModuleList,
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor],
    visible: Visible,
    modulation: Sequence[tuple[Tensor, ...]] | None = None,
) -> list[Context]:
    """Run a context stream through ``blocks`` and keep each layer's keys and values. Of the last block only these are
    made."""
    kept: list[KeysValues] = []
    for index, block in enumerate(cast(list[Block], blocks)):
        layer = modulation[index] if modulation is not None else None
        if index + 1 < len(blocks):
            x_BTD = block(x_BTD, rope, visible, layer, keep=kept)
        else:
            kept.append(block.keys_values(x_BTD, rope, visible, layer))
    return [Context(k, v, visible.beside) for k, v in kept]
