"""How the context e enters the core in each iteration.

Shapes: B sequences, T positions, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recurrent_db.model.layers import Linear


class LinearInjection(nn.Module):
    """Huginn's adapter: W [state, e] without bias, from 2D to D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.adapter = Linear(2 * dim, dim, bias=False)

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        return self.adapter(torch.cat((state_BTD, e_BTD), dim=-1))


class DiagonalInjection(nn.Module):
    """Linear time-invariant injection: a * state + W e, with 0 < a < 1 for each channel (Parcae, arXiv 2604.12946).

    a = exp(-exp(log_rate)), so the state cannot grow whatever the parameter's value. a starts at 0.5.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.full((dim,), math.log(math.log(2.0))))
        self.adapter = Linear(dim, dim, bias=False)

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        decay_D = torch.exp(-torch.exp(self.log_rate))
        return decay_D.to(state_BTD.dtype) * state_BTD + self.adapter(e_BTD)


class AddInjection(nn.Module):
    """state + e. Both come out of a norm, so their scales are comparable."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        return state_BTD + e_BTD


INJECTIONS: dict[str, type[nn.Module]] = {
    "linear": LinearInjection,
    "diagonal": DiagonalInjection,
    "add": AddInjection,
}
