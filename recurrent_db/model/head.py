"""The head and its loss in one: cross-entropy of a linear layer without ever holding all logits.

Shapes: N rows (positions), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_CHUNK = 256
"""Rows below which the matrix products no longer fill two cores."""


def chunk_rows(n_rows: int) -> int:
    """Rows of logits that are held at once, twice with their copy: a thirty-second of the whole, so that the peak is
    below an eighth of it; of fewer than 8,192 rows a larger part, so that the products stay large."""
    return max(SMALLEST_CHUNK, -(-n_rows // 32))


SoftmaxLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def softmax_loss(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies, fp32 or wider (R,), and the gradient of their weighted sum, (R, V) in the logits' dtype:
    (softmax - one_hot) * weight, made in place."""
    wide, targets_R1 = torch.promote_types(logits_RV.dtype, torch.float32), targets_R[:, None]
    log_p_RV = F.log_softmax(logits_RV, dim=-1, dtype=wide)
    losses_R = -log_p_RV.gather(1, targets_R1)[:, 0]
    d_RV = log_p_RV.exp_()
    d_RV.scatter_add_(1, targets_R1, torch.full_like(targets_R1, -1, dtype=wide))
    return losses_R, d_RV.mul_(weights_R[:, None]).to(logits_RV.dtype)


def softmax_loss_to_fuse(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax_loss` in the form that a compiler makes few passes of: no scatter, nothing in place."""
    wide, targets_R1 = torch.promote_types(logits_RV.dtype, torch.float32), targets_R[:, None]
    log_p_RV = F.log_softmax(logits_RV, dim=-1, dtype=wide)
    here_RV = torch.arange(logits_RV.shape[1], device=logits_RV.device) == targets_R1
    d_RV = (log_p_RV.exp() - here_RV.to(wide)) * weights_R[:, None]
    return -log_p_RV.gather(1, targets_R1)[:, 0], d_RV.to(logits_RV.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses by chunks of rows, and in the same pass the gradients of their weighted sum, so that nothing of size
    N x V outlives its chunk and the backward recomputes nothing."""

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
            elif start == 0:  # the first chunk writes where the others add
                torch.mm(d_RV.T, hidden[part], out=d_table)
            else:
                torch.addmm(d_table, d_RV.T, hidden[part], out=d_table)
            del d_RV  # not held beside the next chunk
        ctx.gradients = d_hidden, d_table
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a linear cross-entropy are handed out once: run it again")
        # Handed out and forgotten, so that what else flows to the table is added in place.
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
    """Cross-entropy in nats of the logits ``hidden @ table.T`` against ``targets`` (int64).

    Returns the sum over rows of ``weights`` times losses, to differentiate by hidden and table (not by the weights), and
    the losses themselves, fp32 or wider (N,), detached. The products run in autocast's dtype where it is on, softmax and
    losses in fp32. ``softmax`` is `softmax_loss`, or a compiled `softmax_loss_to_fuse`.
    """
    device_type = hidden_ND.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else table_VD.dtype
    arguments = hidden_ND, table_VD, targets_N, weights_N.detach(), dtype, rows or chunk_rows(len(hidden_ND)), softmax
    if not autocast:
        return cast(tuple[Tensor, Tensor], _LinearCrossEntropy.apply(*arguments))
    with torch.autocast(device_type, enabled=False):
        return cast(tuple[Tensor, Tensor], _LinearCrossEntropy.apply(*arguments))
