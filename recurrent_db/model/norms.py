"""Norms: RMSNorm and LayerNorm, which a noise level may modulate.

Shapes: D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and rotations compute: at least fp32 (float64 in a float64 model)."""
    return torch.promote_types(dtype, torch.float32)


class _NoContext:
    """Replaces the context of a `torch.autograd.Function` when its backward will not run."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
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
        return cast(Tensor, applied(_ScaledRMS, x, weight, shift, eps))
    if weight.ndim == 1 and shift is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    unit = F.rms_norm(x, (x.shape[-1],), None, eps)
    return unit * weight if shift is None else torch.addcmul(shift, unit, weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 or wider, returned in x's dtype. Shape (..., D).

    With ``scale`` and ``shift``, broadcastable to x, the result is (1 + scale) * norm(x) + shift.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        dtype = wide(x.dtype)
        if x.dtype == self.weight.dtype == dtype and scale is None and shift is None:
            return scaled_rms(x, self.weight, None, self.eps)
        weight = self.weight.to(dtype)
        if scale is not None:
            weight = torch.addcmul(weight, weight, scale.to(dtype))
        return scaled_rms(x.to(dtype), weight, None if shift is None else shift.to(dtype), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias, computed in fp32 or wider, returned in x's dtype.

    Shape, scale and shift as in `RMSNorm`."""

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
