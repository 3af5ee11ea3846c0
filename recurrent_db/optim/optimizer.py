"""The optimizers AdamW and Muon, which parameters decay, and the FLOPs of an update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurrent_db.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices of linear layers with weight decay; embeddings, norms, biases and per-channel rates
    without."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


CLIP_NORM = 1.0
"""Global gradient norm above which gradients are scaled down to it."""
BETAS = (0.9, 0.95)
"""AdamW's decay rates of the first and second moments."""
EPSILON = 1e-8


def fused_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with PyTorch's fused kernel."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPSILON, fused=True)


NEWTON_SCHULZ_STEPS = 5
"""Iterations of Muon's orthogonalisation, as in PyTorch's default."""


NOT_HIDDEN = (".noise_embedding.", ".conditioning.", ".frame.", ".patches.", ".head.")
"""Parts of the names of modules whose matrices AdamW updates in a run with Muon."""


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that Muon updates: linear layers of the transformer layers and the adapter, each fused matrix (QKV, gate
    and up) as a whole.

    AdamW updates the noise embedding. The rank of its gradient is at most the number of noise levels in the batch, and
    orthogonalisation would scale rounding errors in all other directions up to the same size. In networks for images it also
    updates what surrounds the layers, such as the patch embedding and the head.
    """
    layers = ((f".{name}.", m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [layer.weight for name, layer in layers if not any(part in name for part in NOT_HIDDEN)]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for `hidden_matrices` and fused AdamW for all other parameters, as one optimizer.

    Muon's updates are scaled to the RMS of AdamW's (arXiv 2502.16982), so both use one learning rate and one weight decay.
    """

    found_inf: Tensor | None = None
    """0-dimensional tensor on the parameters' device; where it is 1, a step changes nothing. The host does not wait for its
    value. Same meaning as in fused AdamW."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        hidden = hidden_matrices(model)
        own = {id(p) for p in hidden}
        rest = parameter_groups(model, config.weight_decay)
        for group in rest:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        options: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw", "ns_steps": NEWTON_SCHULZ_STEPS}
        # One optimizer per matrix, so that undoing a skipped step needs a copy of only one matrix at a time.
        self.muons = [torch.optim.Muon([p], config.lr, config.weight_decay, **options) for p in hidden]
        self.adamw = fused_adamw(rest, config)
        parts = [*self.muons, self.adamw]
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:  # this optimizer and its parts share groups and state
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
            for current, saved in zip((weight, momentum), before, strict=True):
                current.copy_(torch.where(self.found_inf > 0, saved, current))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW | MuonAdamW:
    """Build the optimizer ``config.name``. Its steps obey the attribute ``found_inf``; see `MuonAdamW`."""
    if config.name == "muon":
        return MuonAdamW(model, config)
    return fused_adamw(parameter_groups(model, config.weight_decay), config)


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer step, without effect where ``skip`` (0-dimensional bool on the device) is true.

    The fused kernel reads the flag on the device, as it does for torch.amp.GradScaler, so the host does not wait.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def update_flops(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """FLOPs of one optimizer step by part, counted from the formulas. They do not depend on the batch.

    Element-wise operations per parameter: ``clipping`` 3 (norm and scaling of the gradient); ``adamw`` 14 (decay 1, first
    moment 3, second 4, denominator 3, step 3); ``muon`` 12 (momentum 3, Nesterov 3, norm and scaling 3, decay 1, step 2);
    ``average`` 3 (EMA). These are few compared to the matrix products of a training step, but each moves memory.

    ``newton_schulz`` counts Muon's matrix products. For a matrix X (or its transpose) of a rows and b >= a columns these are
    X X', its square, and their combination times X.
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
