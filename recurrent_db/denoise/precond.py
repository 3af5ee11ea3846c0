"""EDM preconditioning around the core (arXiv 2206.00364, table 1 and eq. 7; arXiv 2506.14202, eq. 8).

    D(z, sigma, e) = c_skip z + c_out F(c_in z, e, c_noise)

F is one pass of the core. sigma and the scalings are fp32 and are cast once, at the network's input. z and D are fp32, or
float64 for a float64 network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precond:
    """EDM's scalings as functions of sigma, which is fp32 of any shape."""

    sd: float
    """Standard deviation of the target per component."""
    mute: bool = False
    """Whether to scale the network's input by a further 1 / (1 + sigma^2), which removes z where it carries no information:
    at sigma = 1 the noise along any direction is as large as the whole target. False keeps unit variance, as published."""

    def loudness(self, sigma: Tensor) -> Tensor:
        """Factor on the network's input, in (0, 1]; 1 unless ``mute``."""
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
        """Weight (sigma^2 + sd^2) / (sigma sd)^2 that gives the squared error equal importance at every level.

        Do not use it for cross-entropy, which it would multiply by up to 10^5 at low noise.
        """
        return (sigma**2 + self.sd**2) / (sigma * self.sd) ** 2

    def view(self, z_BTD: Tensor, sigma: Tensor) -> Tensor:
        """The network's input from z: c_in z, times `loudness`."""
        return self.c_in(sigma) * self.loudness(sigma) * z_BTD

    def combine(self, z_BTD: Tensor, state_BTD: Tensor, sigma: Tensor) -> Tensor:
        """D = c_skip z + c_out F, fp32 or wider. ``state_BTD`` is the network's output F."""
        return self.c_skip(sigma) * z_BTD + self.c_out(sigma) * state_BTD.to(
            torch.promote_types(state_BTD.dtype, torch.float32)
        )
