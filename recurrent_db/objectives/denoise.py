"""`denoise`: one core pass conditioned on the noise level (DiffusionBlocks, arXiv 2506.14202, section 5.5, appendix E.5).

The target y of position i is the embedding of token i+1, scaled to length 1. A training step:

1. draws a noise level sigma for each sequence and makes the noised target z = y + sigma eps;
2. runs the core once, with EDM's preconditioning, to estimate y from z and the context e;
3. reads the estimate out through the coda;
4. takes the cross-entropy against token i+1, without a weight over sigma (EDM's weight is meant for the squared error).

Position i sees clean tokens <= i and noised targets of positions <= i, because attention is causal. The only trace of the
answer is its own z, which fades as sigma grows. Scoring starts from pure noise and never sees the answer; see
`recurrence.walk`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.denoise.noise import LogNormal, draw_sigma, share_below, sigma_star
from recurrent_db.denoise.precond import Precond
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.objective_config import DenoiseConfig
from recurrent_db.objectives.base import Metrics, Objective, cross_entropy
from recurrent_db.recurrence.walk import DenoiseWalk, normalised
from recurrent_db.rng import Rng

WARN_SHARE = 0.75
"""Share of draws below sigma* above which `describe` warns that the model mostly learns to copy."""


def mean_pairwise_cosine(table_VD: Tensor, most: int = 256) -> Tensor:
    """Mean cosine between different embeddings, 0-dimensional: near 0 if targets are spread out, near 1 if they collapse.

    Of a large table only evenly spaced rows are used, from ``most`` to twice as many.
    """
    some_ND = table_VD.detach()[:: max(1, len(table_VD) // most)]
    unit = torch.nn.functional.normalize(some_ND.float(), dim=-1)
    n = len(unit)
    return (unit.sum(0).square().sum() - n) / (n * (n - 1))


def noised(rows_BTD: Tensor, eps_BTD: Tensor, sigma_Bs: Tensor) -> Tensor:
    """z = y + sigma eps for the clean targets y of embedding rows, fp32 (B, T, D)."""
    return torch.addcmul(normalised(rows_BTD), sigma_Bs[..., None], eps_BTD)


class Denoise(Objective):
    """Train the core of a looped model as a denoiser.

    Args:
        config: noise levels, conditioning and the walk at inference.
        width: d_model. The target's standard deviation per component is 1 / sqrt(width).
    """

    def __init__(self, config: DenoiseConfig, width: int) -> None:
        self.config = config
        self.two_stream = config.conditioning == "two-stream"
        density = LogNormal(config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
        self.precond = Precond(config.sd or 1 / math.sqrt(width), config.mute)
        self.recurrence: DenoiseWalk = DenoiseWalk(density, self.precond, config)

    def sigma(self, batch: Batch, rng: Rng) -> Tensor:
        """Noise levels of a micro-batch, fp32 (B, 1), on the CPU."""
        u_B1 = rng.uniform(batch.sample_index_B, (1,), "sigma")
        return draw_sigma(self.recurrence.density, self.config.atom, u_B1).float()

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        sigma_B1 = self.sigma(batch, rng).to(batch.tokens_BT.device, non_blocking=True)
        embeddings_BTD = model.embedding_rows(batch.targets_BT).float()
        eps_BTD = rng.normal(batch.sample_index_B, tuple(embeddings_BTD.shape[1:]), "noise", embeddings_BTD.device)
        z_BTD = model.fuse(noised)(embeddings_BTD, eps_BTD, sigma_B1)

        visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(batch.tokens_BT, visible)
        clean = self.recurrence.clean_contexts(model, e_BTD, visible)
        estimate_BTD = model.denoise(self.precond, z_BTD, sigma_B1, e_BTD, clean, visible)
        # The norm ignores scale except for its epsilon. Dividing by sd gives the estimate unit scale, where epsilon is
        # small.
        hidden_BTD = model.decode((estimate_BTD / self.precond.sd).to(e_BTD.dtype), visible=visible)
        loss, losses_BT = cross_entropy(model, hidden_BTD, batch.targets_BT)
        # At sigma_max z carries no information, so the loss of these draws is a next-token loss.
        at_top_BT = (sigma_B1 >= self.config.sigma_max).float().expand_as(losses_BT)
        metrics = {
            "loss_sigma_max": torch.stack(((losses_BT * at_top_BT).sum(), at_top_BT.sum())),
            "loss_cross_entropy": losses_BT.mean(),
            "target_cosine": mean_pairwise_cosine(model.embedding.weight),
        }
        return loss, metrics

    def passes(self, rng: Rng, progress: float) -> Passes:
        return Passes(core_grad=1, clean_grad=int(self.two_stream), beside=self.two_stream, noise_levels=1)

    def cost_rows(self) -> dict[str, dict[Passes, float]]:
        return {
            "denoise": {Passes(core_grad=1, noise_levels=1): 1.0},
            "denoise_two_stream": {Passes(core_grad=1, clean_grad=1, beside=True, noise_levels=1): 1.0},
        }

    def describe(self, model: LoopedLM) -> list[str]:
        """sigma* for the current embedding and the share of draws below it, with a warning if the share is large."""
        star = sigma_star(self.recurrence.targets(model), self.config.sigma_min, self.config.sigma_max)
        share = share_below(self.recurrence.density, self.config.atom, star)
        lines = [
            f"sigma* = {star:.3g}; {share:.0%} of the noise levels are below it, where the model can copy the answer"
        ]
        if share > WARN_SHARE:
            lines.append(
                f"warning: {share:.0%} of the noise levels teach the model to copy; raise objective.denoise.p_mean or"
                " objective.denoise.atom"
            )
        return lines


def own_section(config: Config) -> DenoiseConfig:
    """The configuration's objective section. The objective must be `denoise` or a variant of it."""
    assert isinstance(config.objective.own, DenoiseConfig)
    return config.objective.own


def build(config: Config) -> Denoise:
    return Denoise(own_section(config), config.model.d_model)
