"""AdamW with weight decay where it belongs, the exponential moving average of the weights, and what both cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recurrent_db.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: the matrices of linear layers decay; embeddings, norms, biases and per-channel rates do not."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (one kernel for all parameters on CUDA, one pass each on the CPU)."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step that changes nothing where ``skip`` (0-dimensional bool) is true: the fused kernel reads the
    flag on the device, as it does for torch.amp.GradScaler."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def update_flops(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Element-wise FLOPs of one optimizer step, counted from the formulas; independent of the batch.

    Per parameter: the gradient's norm and scaling 3; AdamW 14 (decay 1, first moment 3, second 4, denominator 3,
    step 3); the weight average 3. They are few beside a step's matrix products, but each reads or writes memory.
    """
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "clipping": 3.0 * parameters,
        "adamw": 14.0 * parameters,
        "average": 3.0 * parameters if config.ema_decay else 0.0,
    }


class EMA:
    """An exponential moving average of a model's parameters, fp32, corrected for its start.

    shadow <- d shadow + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)) after n updates, so that early weights
    are forgotten quickly. Skipped steps count as updates that change nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Take the weights in, unless ``skip`` (0-dimensional bool, on their device) says that the step was skipped."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = dict(model.named_parameters())
        shadow = [self.shadow[name] for name in weights]
        change = torch._foreach_sub(list(weights.values()), shadow)
        torch._foreach_mul_(change, (1 - decay) * ~skip)
        torch._foreach_add_(shadow, change)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; call it again to undo."""
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)
