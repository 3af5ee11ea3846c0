"""EDM preconditioning around the core (arXiv 2206.00364, table 1 and eq. 7; arXiv 2506.14202, eq. 8).

    D(z, sigma, e) = c_skip z + c_out F(c_in z, e, c_noise)

sigma and the scalings are fp32 and cast once, where they meet the network; z and D are fp32, or float64 around a float64
network. F is one pass of the core.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_db.model.attention import Visible
from recurrent_db.model.layers import Context, wide
from recurrent_db.model.looped import LoopedLM


@dataclass(frozen=True)
class Precond:
    """The scalings for a clean target whose components have standard deviation ``sd``. sigma: fp32, any shape."""

    sd: float
    mute: bool = False
    """Scale what the network sees of z by 1 / (1 + sigma^2), so that z falls silent where it says nothing: at sigma = 1 the
    noise along any one direction is as large as the whole target. False leaves z at unit variance, as published."""

    def loudness(self, sigma: Tensor) -> Tensor:
        """Factor on the network's view of z, in (0, 1]."""
        return 1 / (1 + sigma**2) if self.mute else torch.ones_like(sigma)

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sd**2 / (sigma**2 + self.sd**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma * self.sd * torch.rsqrt(sigma**2 + self.sd**2)

    def c_in(self, sigma: Tensor) -> Tensor:
        return torch.rsqrt(sigma**2 + self.sd**2)

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        """w(sigma) = (sigma^2 + sd^2) / (sigma sd)^2: makes the L2 loss of every level weigh the same. Not for
        cross-entropy, which it multiplies by up to 10^5 at low noise."""
        return (sigma**2 + self.sd**2) / (sigma * self.sd) ** 2

    def view(self, z_BTD: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees of z: c_in z, muted."""
        return self.c_in(sigma) * self.loudness(sigma) * z_BTD

    def denoise(
        self,
        model: LoopedLM,
        z_BTD: Tensor,
        sigma_Bs: Tensor,
        e_BTD: Tensor,
        beside: list[Context] | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """One conditioned pass of the core: the estimate D of y, fp32 or wider (B, T, D).

        Args:
            z_BTD: fp32 noisy target.
            sigma_Bs: fp32 noise levels, (B, 1) or (B, T).
            e_BTD: clean context from the prelude.
            beside: a context stream that positions see instead of their neighbours.
            visible: who sees whom otherwise; plain causal where not given.
        """
        sigma = sigma_Bs[..., None]
        view_BTD = model.fuse(self.view)(z_BTD, sigma).to(e_BTD.dtype)
        state = model.iterate(view_BTD, e_BTD, 1, self.c_noise(sigma_Bs), beside, visible)
        return model.fuse(self.combine)(z_BTD, state, sigma)

    def combine(self, z_BTD: Tensor, state_BTD: Tensor, sigma: Tensor) -> Tensor:
        """D from z and the network's output, fp32 or wider."""
        return self.c_skip(sigma) * z_BTD + self.c_out(sigma) * state_BTD.to(wide(state_BTD.dtype))
