"""Head and loss as one function: cross-entropy of a linear layer, computed in chunks so that all logits never exist at once.

Shapes: N positions, R positions of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_CHUNK = 256
"""Smallest number of positions whose matrix products keep two CPU cores busy."""


def chunk_rows(n_rows: int) -> int:
    """Number of positions per chunk: one thirty-second of all, at least `SMALLEST_CHUNK`.

    A chunk exists twice (logits and a copy), so the peak stays below an eighth of all logits. With fewer than 8,192
    positions the share is larger, so that matrix products stay large.
    """
    return max(SMALLEST_CHUNK, -(-n_rows // 32))


SoftmaxLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Type of `softmax_loss`."""


def softmax_loss(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and its gradient.

    Returns:
        Losses, fp32 or wider (R,); gradient of their weighted sum, (softmax - one_hot) * weight, (R, V) in the logits'
        dtype.
    """
    wide, targets_R1 = torch.promote_types(logits_RV.dtype, torch.float32), targets_R[:, None]
    log_p_RV = F.log_softmax(logits_RV, dim=-1, dtype=wide)
    losses_R = -log_p_RV.gather(1, targets_R1)[:, 0]
    d_RV = log_p_RV.exp_()
    d_RV.scatter_add_(1, targets_R1, torch.full_like(targets_R1, -1, dtype=wide))
    return losses_R, d_RV.mul_(weights_R[:, None]).to(logits_RV.dtype)


def softmax_loss_to_fuse(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax_loss` in a form that compiles to few passes over memory: without scatter and in-place operations."""
    wide, targets_R1 = torch.promote_types(logits_RV.dtype, torch.float32), targets_R[:, None]
    log_p_RV = F.log_softmax(logits_RV, dim=-1, dtype=wide)
    here_RV = torch.arange(logits_RV.shape[1], device=logits_RV.device) == targets_R1
    d_RV = (log_p_RV.exp() - here_RV.to(wide)) * weights_R[:, None]
    return -log_p_RV.gather(1, targets_R1)[:, 0], d_RV.to(logits_RV.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes losses and the gradients of their weighted sum chunk by chunk, both in the forward.

    Nothing of size N x V is kept, and the backward recomputes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        table_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        dtype: torch.dtype,
        rows: int,
        softmax: SoftmaxLoss,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_table = ctx.needs_input_grad[:2]
        wide = torch.promote_types(dtype, torch.float32)
        hidden, table = hidden_ND.to(dtype), table_VD.to(dtype)
        losses_N = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        in_place = need_table and table_VD.dtype == dtype and len(hidden) > 0
        d_table = None if not need_table else torch.empty_like(table_VD) if in_place else torch.zeros_like(table_VD)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            losses_N[part], d_RV = softmax(hidden[part] @ table.T, targets_N[part], weights_N[part])
            if d_hidden is not None:
                d_hidden[part] = d_RV @ table
            if d_table is None:
                pass
            elif not in_place:
                d_table += d_RV.T @ hidden[part]
            elif start == 0:  # the first chunk writes, later chunks add
                torch.mm(d_RV.T, hidden[part], out=d_table)
            else:
                torch.addmm(d_table, d_RV.T, hidden[part], out=d_table)
            del d_RV  # free the memory before the next chunk
        ctx.gradients = d_hidden, d_table
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy supports a single backward: compute the loss again")
        # Giving up the reference lets autograd add the table's other gradients in place.
        (d_hidden, d_table), ctx.gradients, scale = ctx.gradients, None, grads[0]
        d_hidden = None if d_hidden is None else d_hidden.mul_(scale.to(d_hidden.dtype))
        d_table = None if d_table is None else d_table.mul_(scale.to(d_table.dtype))
        return d_hidden, d_table, None, None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor,
    table_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    rows: int | None = None,
    softmax: SoftmaxLoss = softmax_loss,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the logits ``hidden @ table.T`` against ``targets``.

    Under autocast the matrix products use its dtype. Softmax and losses are fp32 or wider.

    Args:
        hidden_ND: input of the head.
        table_VD: weights of the head.
        targets_N: int64 tokens.
        weights_N: factors on the losses. They get no gradient.
        rows: positions per chunk; by default from `chunk_rows`.
        softmax: `softmax_loss`, or a compiled `softmax_loss_to_fuse`.

    Returns:
        The sum of weights times losses, 0-dimensional, with gradient for hidden and table; the losses, fp32 or wider (N,),
        detached.
    """
    device_type = hidden_ND.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else table_VD.dtype
    arguments = hidden_ND, table_VD, targets_N, weights_N.detach(), dtype, rows or chunk_rows(len(hidden_ND)), softmax
    if not autocast:
        return cast(tuple[Tensor, Tensor], _LinearCrossEntropy.apply(*arguments))
    with torch.autocast(device_type, enabled=False):
        return cast(tuple[Tensor, Tensor], _LinearCrossEntropy.apply(*arguments))
