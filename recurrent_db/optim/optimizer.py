"""AdamW with weight decay where it belongs, Muon beside it, and what they cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurrent_db.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the matrices of linear layers decay; embeddings, norms, biases and per-channel rates do not."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


CLIP_NORM = 1.0
"""Global gradient norm above which gradients are scaled down."""
BETAS = (0.9, 0.95)
"""AdamW's decays of the first and second moment."""
EPSILON = 1e-8


def fused_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """One kernel for all parameters on CUDA, one pass each on the CPU."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPSILON, fused=True)


NEWTON_SCHULZ_STEPS = 5
"""Iterations of Muon's orthogonalisation; PyTorch's default."""


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """What Muon updates: the weights of the linear layers of blocks and adapter, fused ones (QKV, gate and up) whole.

    The noise embedding's linear layers are left to AdamW. A gradient of theirs has no more directions than the batch
    has noise levels, and to orthogonalise it would blow the rounding errors in all others up to the same size.
    """
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [layer.weight for name, layer in layers if "noise_embedding." not in name]


class MuonAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for `hidden_matrices` and fused AdamW for everything else, as one optimizer.

    Muon's updates have the RMS of AdamW's (arXiv 2502.16982), so that one learning rate and one weight decay serve both.
    As with fused AdamW, a step with ``found_inf`` = 1 (a 0-dimensional tensor on the parameters' device) changes nothing,
    and the host does not wait to learn whether it did.
    """

    found_inf: Tensor | None = None

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        hidden = hidden_matrices(model)
        own = {id(p) for p in hidden}
        rest = parameter_groups(model, config.weight_decay)
        for group in rest:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        options: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw", "ns_steps": NEWTON_SCHULZ_STEPS}
        # One for each matrix, so that a step that may be taken back needs a copy of one matrix at a time.
        self.muons = [torch.optim.Muon([p], config.lr, config.weight_decay, **options) for p in hidden]
        self.adamw = fused_adamw(rest, config)
        parts = [*self.muons, self.adamw]
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:  # the groups are the parts' own, and so is the state
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        for muon in self.muons:
            (weight,) = muon.param_groups[0]["params"]
            if self.found_inf is None:
                muon.step()
                continue
            momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
            before = weight.clone(), momentum.clone()
            muon.step()
            for now, then in zip((weight, momentum), before, strict=True):
                now.copy_(torch.where(self.found_inf > 0, then, now))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW | MuonAdamW:
    """The optimizer that ``config.name`` names. Its steps honour the attribute ``found_inf``, see `MuonAdamW`."""
    if config.name == "muon":
        return MuonAdamW(model, config)
    return fused_adamw(parameter_groups(model, config.weight_decay), config)


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step that changes nothing where ``skip`` (0-dimensional bool) is true: the fused kernel reads the
    flag on the device, as it does for torch.amp.GradScaler."""
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def update_flops(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """FLOPs of one optimizer step, counted from the formulas; independent of the batch.

    Element-wise, per parameter: the gradient's norm and scaling 3; AdamW 14 (decay 1, first moment 3, second 4,
    denominator 3, step 3) or Muon 12 (momentum 3, Nesterov's 3, norm and scaling 3, decay 1, step 2); the weight average
    3. They are few beside a step's matrix products, but each reads or writes memory. Muon's own matrix products
    (``newton_schulz``): for a matrix X of a rows and b >= a columns, or its transpose, X X', its square, and their
    combination times X.
    """
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = [sorted(p.shape) for p in hidden_matrices(model)] if config.name == "muon" else []
    by_muon = sum(a * b for a, b in shapes)
    flops = {
        "clipping": 3.0 * parameters,
        "adamw": 14.0 * (parameters - by_muon),
        "average": 3.0 * parameters if config.ema_decay else 0.0,
    }
    if shapes:
        products = sum(2 * a * a * b + 2 * a**3 + 2 * a * a * b for a, b in shapes)
        flops |= {"muon": 12.0 * by_muon, "newton_schulz": float(NEWTON_SCHULZ_STEPS * products)}
    return flops
