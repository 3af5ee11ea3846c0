"""`denoise`: one noise-conditioned pass (DiffusionBlocks, arXiv 2506.14202, section 5.5 and appendix E.5).

The clean target y of position i is the normalised target row of token i+1. A step draws sigma, makes
z = y + sigma eps, runs the core once as an EDM-preconditioned denoiser of z given the clean context e, reads its
estimate out through the coda and takes the cross-entropy against token i+1, by default without a weight over sigma:
EDM's weight belongs to the squared error.

Position i sees clean tokens <= i and noisy targets of positions <= i (the core's attention is causal), so the only trace
of the answer is its own z, which fades as sigma grows. Scoring starts from pure noise: see `recurrence.DenoiseWalk`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_db.accounting.flops import Passes
from recurrent_db.config import Config, DenoiseConfig
from recurrent_db.data import Batch
from recurrent_db.denoise.noise import AdaptiveFit, build_density, draw_sigma, share_below, sigma_star
from recurrent_db.denoise.precond import Precond
from recurrent_db.model.looped import LoopedLM
from recurrent_db.objectives.base import Metrics, NeverGrows, Reduce, cross_entropy
from recurrent_db.recurrence.walk import DenoiseWalk, normalised
from recurrent_db.rng import Rng

WARN_SHARE = 0.75
"""Share of draws below sigma* above which the model mostly learns to copy."""


def mean_pairwise_cosine(rows_VD: Tensor, most: int = 256) -> Tensor:
    """Mean cosine between different rows: near 0 for spread-out targets, towards 1 as they collapse. 0-dimensional.
    Of a larger table, ``most`` to twice as many evenly spaced rows are taken."""
    rows_VD = rows_VD.detach()[:: max(1, len(rows_VD) // most)]
    unit = torch.nn.functional.normalize(rows_VD.float(), dim=-1)
    n = len(unit)
    return (unit.sum(0).square().sum() - n) / (n * (n - 1))


def noised(rows_BTD: Tensor, eps_BTD: Tensor, sigma_Bs: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Clean targets y and z = y + sigma eps, fp32 (B, T, D), of target rows."""
    y_BTD = normalised(rows_BTD, norm)
    return y_BTD, torch.addcmul(y_BTD, sigma_Bs[..., None], eps_BTD)


def own_section(config: Config) -> DenoiseConfig:
    """The options of a run whose objective denoises the token."""
    section = config.objective.own
    assert isinstance(section, DenoiseConfig)
    return section


class Denoise(NeverGrows):
    """The published method, with its choices as options (config.DenoiseConfig)."""

    def __init__(self, config: Config) -> None:
        self.config, self.length = own_section(config), config.data.sequence_length
        self.density = build_density(self.config)
        self.fit = AdaptiveFit(self.config.sigma_min, self.config.sigma_max)
        self.tally: Tensor | None = None
        true_sd = self.config.target_norm / math.sqrt(config.model.d_model)
        mute_norm = self.config.target_norm if self.config.mute else 0.0
        self.precond = Precond(self.config.sd or true_sd, mute_norm)

    @property
    def recurrence(self) -> DenoiseWalk:
        return DenoiseWalk(self.density, self.precond, self.config)

    def _sigma(self, batch: Batch, rng: Rng) -> Tensor:
        """Noise levels of a micro-batch, fp32 (B, 1) or (B, T), on the CPU."""
        n_sequences, length = batch.tokens_BT.shape
        if self.config.draw == "batch":
            u = torch.full((n_sequences, 1), rng.scalar("sigma"), dtype=torch.float64)
        else:
            u = rng.uniform(batch.sample_index_B, (length if self.config.draw == "token" else 1,), "sigma")
        return draw_sigma(self.density, self.config.atom, u).float()

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        drawn_Bs = self._sigma(batch, rng)
        sigma_Bs = drawn_Bs.to(batch.tokens_BT.device, non_blocking=True)
        rows_BTD = model.target_rows_of(batch.targets_BT).float()
        eps_BTD = rng.normal(batch.sample_index_B, tuple(rows_BTD.shape[1:]), "noise", rows_BTD.device)
        y_BTD, z_BTD = model.fuse(noised)(rows_BTD, eps_BTD, sigma_Bs, self.config.target_norm)

        visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(batch.tokens_BT, visible)
        clean = self.recurrence.clean_contexts(model, e_BTD, visible)
        estimate_BTD = self.precond.denoise(model, z_BTD, sigma_Bs, e_BTD, clean, visible)
        read_BTD = estimate_BTD.detach() if self.config.loss == "l2" else estimate_BTD
        # Dividing by sd brings the estimate to unit scale before the norm's epsilon; the norm itself ignores scale.
        hidden_BTD = model.decode((read_BTD / self.precond.sd).to(e_BTD.dtype), visible=visible)
        weights_Bs = self.precond.weight(sigma_Bs) if self.config.weight == "edm" else None
        loss, losses_BT = cross_entropy(model, hidden_BTD, batch.targets_BT, weights_Bs)
        if self.config.loss == "l2":
            # The targets do not move towards their estimates: all rows in one place would be a perfect answer.
            error_BT = (estimate_BTD - y_BTD.detach()).square().mean(-1)
            loss = loss + (self.precond.weight(sigma_Bs) * error_BT).mean()
        if self.config.density == "adaptive":
            tally = self.fit.tally(drawn_Bs.expand_as(losses_BT), losses_BT)
            self.tally = tally if self.tally is None else self.tally + tally
        # The part of the loss that is a next-token loss: the draws at sigma_max, where z says nothing.
        at_top_BT = (sigma_Bs >= self.config.sigma_max).float().expand_as(losses_BT)
        metrics = {
            "loss_sigma_max": torch.stack(((losses_BT * at_top_BT).sum(), at_top_BT.sum())),
            "loss_cross_entropy": losses_BT.mean(),
            "target_cosine": mean_pairwise_cosine(model.target_rows()),
        }
        return loss, metrics

    def after_step(self, taken: Tensor, reduce: Reduce) -> None:
        if self.tally is not None and bool(taken):  # the next draws need the fit, so an adaptive density waits for it
            self.fit.update(reduce(self.tally))
            self.density = self.fit.density()
        self.tally = None

    def passes(self, rng: Rng, progress: float) -> Passes:
        two_stream = self.config.conditioning == "two-stream"
        levels = self.length if self.config.draw == "token" else 1
        return Passes(core_grad=1, clean_grad=int(two_stream), beside=two_stream, noise_levels=levels)

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

    def state_dict(self) -> dict[str, Any]:
        if self.config.density != "adaptive":
            return {}
        return {"sums": self.fit.sums.tolist(), "counts": self.fit.counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.config.density != "adaptive":
            if state:
                raise ValueError(f"a fixed density keeps no state, got {sorted(state)}")
            return
        sums, counts = (np.array(state[name], dtype=np.float64) for name in ("sums", "counts"))
        if (
            not sums.shape == counts.shape == (self.fit.n_bins,)
            or not np.isfinite([sums, counts]).all()
            or (counts < 0).any()
        ):
            raise ValueError(f"sums and counts must be {self.fit.n_bins} finite numbers each")
        self.fit.sums, self.fit.counts = sums, counts
        self.density = self.fit.density()
