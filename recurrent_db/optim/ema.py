"""The exponential moving average (EMA) of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """An exponential moving average of a model's parameters, fp32.

    shadow <- d shadow + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) after n updates. The smaller d at the start
    forgets the initial weights quickly. Skipped steps count as updates without effect.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Update the average from the model's weights, except where ``skip`` is true. ``skip``: 0-dimensional bool on the
        weights' device, so that the host does not wait for it."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = dict(model.named_parameters())
        shadow = [self.shadow[name] for name in weights]
        change = torch._foreach_sub(list(weights.values()), shadow)
        torch._foreach_mul_(change, (1 - decay) * ~skip)
        torch._foreach_add_(shadow, change)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Set the average to the model's current weights, and the number of updates to 0."""
        self.updates = 0
        for name, parameter in model.named_parameters():
            self.shadow[name].copy_(parameter)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average. A second call undoes it."""
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)
