"""`denoise`: one noise-conditioned pass (DiffusionBlocks, arXiv 2506.14202, section 5.5 and appendix E.5).

The clean target y of position i is the normalised embedding row of token i+1. A step draws sigma, makes
z = y + sigma eps, runs the core once as an EDM-preconditioned denoiser of z given the clean context e, reads its
estimate out through the coda and takes the cross-entropy against token i+1. The loss is not weighted by sigma: EDM's
weight belongs to L2.

Position i sees clean tokens <= i and noisy targets of positions <= i (the core's attention is causal), so the only trace
of the answer is its own z, which fades as sigma grows. Scoring starts from pure noise: see `recurrence.DenoiseWalk`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.denoise.noise import build_density, draw_sigma, share_below, sigma_star
from recurrent_db.denoise.precond import Precond
from recurrent_db.flops import Passes
from recurrent_db.model.looped import LoopedLM
from recurrent_db.objectives.base import Metrics, Stateless, cross_entropy
from recurrent_db.recurrence import DenoiseWalk
from recurrent_db.rng import Rng

WARN_SHARE = 0.75
"""Share of draws below sigma* above which the model mostly learns to copy."""


class Denoise(Stateless):
    """The published method, with its choices as options (config.DenoiseConfig)."""

    def __init__(self, config: Config) -> None:
        self.config = config.objective.denoise
        self.density = build_density(self.config)
        true_sd = self.config.target_norm / math.sqrt(config.model.d_model)
        mute_norm = self.config.target_norm if self.config.mute else 0.0
        self.precond = Precond(self.config.sd or true_sd, mute_norm)
        self.recurrence = DenoiseWalk(
            self.density,
            self.precond,
            self.config.target_norm,
            self.config.sampler,
            self.config.grid,
            self.config.bridge,
        )

    def _sigma(self, batch: Batch, rng: Rng) -> Tensor:
        """Noise levels of a micro-batch, fp32 (B, 1) or (B, T), on the CPU."""
        n_sequences, length = batch.tokens_BT.shape
        if self.config.draw == "batch":
            u = torch.full((n_sequences, 1), rng.scalar("sigma"), dtype=torch.float64)
        else:
            u = rng.uniform(batch.sample_index_B, (length if self.config.draw == "token" else 1,), "sigma")
        return draw_sigma(self.density, self.config.atom, u).float()

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        sigma_Bs = self._sigma(batch, rng).to(batch.tokens_BT.device, non_blocking=True)
        rows_BTD = model.embedding(batch.targets_BT).float()
        y_BTD = torch.nn.functional.normalize(rows_BTD, dim=-1) * self.config.target_norm
        eps_BTD = rng.normal(batch.sample_index_B, tuple(y_BTD.shape[1:]), "noise", y_BTD.device)
        z_BTD = torch.addcmul(y_BTD, sigma_Bs[..., None], eps_BTD)

        e_BTD = model.encode(batch.tokens_BT)
        estimate_BTD = self.precond.denoise(model, z_BTD, sigma_Bs, e_BTD)
        # Dividing by sd brings the estimate to unit scale before the norm's epsilon; the norm itself ignores scale.
        hidden_BTD = model.decode((estimate_BTD / self.precond.sd).to(e_BTD.dtype))
        losses_BT = cross_entropy(model, hidden_BTD, batch.targets_BT)
        # The part of the loss that is a next-token loss: the draws at sigma_max, where z says nothing.
        at_top_BT = (sigma_Bs >= self.config.sigma_max).float().expand_as(losses_BT)
        loss_top = torch.stack(((losses_BT.detach() * at_top_BT).sum(), at_top_BT.sum()))
        return losses_BT.mean(), {"loss_sigma_max": loss_top}

    def passes(self, rng: Rng, progress: float) -> Passes:
        return Passes(core_grad=1)

    def describe(self, model: LoopedLM) -> list[str]:
        """sigma* of the freshly built targets and the share of draws below it."""
        star = sigma_star(self.recurrence.targets(model), self.config.sigma_min, self.config.sigma_max)
        share = share_below(self.density, self.config.atom, star)
        lines = [
            f"denoise: sigma* = {star:.3g}; {share:.0%} of the draws lie below it, where the nearest row is the answer"
        ]
        if share > WARN_SHARE:
            lines.append(
                f"warning: {share:.0%} of the draws teach copying; raise objective.denoise.p_mean or .atom, or keep sd true"
            )
        return lines
