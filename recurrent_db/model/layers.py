"""The parts of a transformer layer: norm, rotary embedding, attention, gated MLP, noise conditioning.

Layers follow Huginn (arXiv 2502.05171 and its released configuration): sandwich RMSNorm, gated SiLU MLP, interleaved RoPE in
fp32, a learned bias on queries and keys before RoPE, and no other bias.

Shapes: B sequences, T positions, D width, H heads, E head size (D = H E), M hidden width of the MLP. Suffixes of names give
the shape, as in ``x_BTD``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_db.model.attention import Visible, attend


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and rotations compute: at least fp32 (float64 in a float64 model)."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """A linear layer without initial values; `LoopedLM.initialize` sets them."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """An embedding table without initial values, like `Linear`."""

    def reset_parameters(self) -> None:
        pass


def lookup(ids: Tensor, table_VD: Tensor) -> Tensor:
    """Rows ``ids`` of a table, (*ids.shape, D).

    On the CPU the gradient is sparse. It is added to the dense gradient that the tied head gives the table in the same
    backward, which saves a table of zeros. On CUDA it is dense, because adding a sparse gradient would synchronise.
    """
    sparse = table_VD.device.type == "cpu" and not torch.compiler.is_compiling()
    return F.embedding(ids, table_VD, sparse=sparse)


class _NoContext:
    """Replaces the context of a `torch.autograd.Function` when its backward will not run."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a `torch.autograd.Function`. Without gradients call its forward directly, which takes a third less time for a
    single position."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


class _ScaledRMS(torch.autograd.Function):
    """x / rms(x) * weight + shift, with a hand-written backward.

    Without a fused kernel PyTorch's RMS norm takes a dozen passes over memory, which is half of a small model's step on a
    CPU. This function takes three passes forward and six backward. x: (..., D), fp32 or wider; weight and shift (or None)
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
"""Epsilon of every RMSNorm, as in Huginn."""
ROPE_BASE = 50_000.0
"""Base of the rotary position embedding, as in Huginn."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 or wider, returned in x's dtype. Shape (..., D).

    With ``scale`` and ``shift``, broadcastable to x, the result is (1 + scale) * norm(x) + shift.
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
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864), (T, E/2) each, of ``dtype``.

    Pair e of a head is rotated by the angle position * `ROPE_BASE`^(-2e/E).
    """
    rates = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    """Split the fused projection's output into queries, keys and values, (B, T, H, E) each; add the bias to queries and keys
    and rotate them.

    The hand-written backward writes into one buffer; PyTorch would stack three. qkv: (B, T, 3 D), fp32 or wider. bias:
    (2, H, E). turn: cos + i sin, complex (T, E/2) or (B, T, E/2).
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
            if gradient.stride(-1) != 1:  # some attention kernels return another memory layout
                gradient = gradient.contiguous()
            torch.mul(torch.view_as_complex(gradient.unflatten(-1, (-1, 2))), back, out=pairs[:, :, index])
        d[:, :, 2] = dv
        return d.flatten(2), d[:, :, :2].sum((0, 1)), None


QKV = tuple[Tensor, Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, (B, H, S, E) each."""


@dataclass(frozen=True)
class Context:
    """Keys and values of one layer of a context stream, for a second stream that attends to it (two-stream attention).

    Position i of the second stream sees the context's positions <= i and itself. T queries meet S + T keys, so there is no
    2T x 2T mask. S is T unless a cache holds earlier positions.
    """

    k_BHSE: Tensor
    v_BHSE: Tensor
    visible: Visible
    """Mask over [context keys, own keys]; all layers share it."""


class Attention(nn.Module):
    """Causal multi-head attention with one fused QKV projection."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.head_size = n_heads, dim // n_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, n_heads, self.head_size))
        self.proj = Linear(dim, dim, bias=False)

    def project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, T, E) each; queries and keys are rotated."""
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
        """Attention before the output projection, (B, T, D).

        Args:
            q, k, v: (B, H, T, E) each, from `project`.
            visible: mask, and the keys and values of earlier positions if there are any.
            context: another stream to attend to. Position i sees its positions <= i, and itself.
            keep: list to which this layer's keys and values are appended.
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
            return self.proj(_applied(_SwiGLU, both_BTM))
        gate_BTM, up_BTM = both_BTM.chunk(2, dim=-1)
        return self.proj(F.silu(gate_BTM) * up_BTM)


class Block(nn.Module):
    """One transformer layer with sandwich norms: x = n2(attn(n1(x)) + x); x = n4(mlp(n3(x)) + x).

    The modulation conditions the layer on the noise level (AdaLN, DiT, arXiv 2212.09748). It is six tensors broadcastable to
    (B, T, D): shift, scale and gate for attention, then for the MLP. Each branch computes
    (1 + gate) * branch((1 + scale) * norm(x) + shift), so zeros change nothing. The gate is centred on one, unlike DiT's,
    because Huginn's branches have no gate.
    """

    def __init__(self, dim: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(dim) for _ in range(4))
        self.attn = Attention(dim, n_heads)
        self.mlp = GatedMLP(dim, hidden)
        self.one_position: tuple[Callable[..., QKV], Callable[..., Tensor]] | None = None
        """`before` and `after`, compiled for a single position (`LoopedLM.compile_decoding`)."""

    def before(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], modulation: tuple[Tensor, ...] | None) -> QKV:
        """The work before attention: norm and projection to queries, keys and values, (B, H, T, E) each."""
        normed = self.norm_1(x_BTD) if modulation is None else self.norm_1(x_BTD, modulation[1], modulation[0])
        return self.attn.project(normed, rope)

    def after(self, x_BTD: Tensor, mixed_BTD: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        """The work after attention: output projection, residual, norms and MLP, (B, T, D)."""
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
        """The keys and values of the layer's attention, (B, H, S, E) each, without the rest of the layer."""
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
