"""What the K iterations do at inference: one contract, and its two ways.

A recurrence turns the prelude's output into hidden vectors after K core iterations, for each K asked for. Scoring,
generation and lm-eval go through it and through nothing else, so they agree by construction.

- `PlainRecurrence`: Huginn's loop. K iterations of the core from one initial state, read out at the end.
- `DenoiseWalk`: a reverse diffusion over K noise levels from sigma_max down. Position i walks its own z; what the other
  positions hold at step k is their own walk's z (for K = 1 that is pure noise, which training saw at sigma_max).

Both start from noise or zeros, never from the answer, so position i of every result depends on tokens <= i alone.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from recurrent_db.denoise.noise import GRIDS, Density
from recurrent_db.denoise.precond import Precond
from recurrent_db.denoise.sampler import EVALUATIONS, STEPS, STOCHASTIC
from recurrent_db.flops import Passes
from recurrent_db.model.looped import STATE_STD, LoopedLM
from recurrent_db.rng import Rng


@dataclass(frozen=True)
class NoiseSource:
    """Draws for scoring and generation: a function of (seed, request, position, stream) and the draw's number.

    Rows are drawn in pages of ``page`` positions, so that position i's noise does not depend on how long the sequence
    is. ``offset`` is the absolute position of the first row.
    """

    rng: Rng
    requests: Tensor
    page: int
    draw: int = 0
    offset: int = 0

    def _pages(self, length: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        first, last = self.offset // self.page, (self.offset + length - 1) // self.page
        pages = []
        for page in range(first, last + 1):
            name, shape = f"{stream}/draw{self.draw}/page{page}", (self.page, width)
            pages.append(
                self.rng.normal(self.requests, shape, name, device)
                if normal
                else self.rng.uniform(self.requests, shape, name, device, torch.float32)
            )
        start = self.offset - first * self.page
        return torch.cat(pages, dim=1)[:, start : start + length]

    def normal(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """fp32 standard normals (B, length, width)."""
        return self._pages(length, width, stream, device, normal=True)

    def uniform(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """fp32 uniforms in [0, 1) (B, length, width)."""
        return self._pages(length, width, stream, device, normal=False)


class Recurrence(Protocol):
    """K-iteration inference of a checkpoint."""

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on the noise, so that draws can be averaged."""
        ...

    def hidden(
        self, model: LoopedLM, e_BTD: Tensor, ks: Sequence[int], noise: NoiseSource
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (K, hidden_BTD) for each K of ``ks`` in rising order. ``model.logits(hidden)`` predicts the next
        token."""
        ...

    def passes(self, k: int) -> Passes:
        """What K iterations compute, for the FLOP count."""
        ...


def truncated_normal(u: Tensor, std: float) -> Tensor:
    """Uniforms to a normal of standard deviation ``std`` before it is cut at three of them (Huginn's state)."""
    tail = 0.0013498980316301  # Phi(-3)
    return std * torch.special.ndtri(tail + u * (1 - 2 * tail))


@dataclass(frozen=True)
class PlainRecurrence:
    """Huginn's loop, from zeros or from a truncated normal with std sqrt(2/5)."""

    initial: Literal["zeros", "random"]

    @property
    def stochastic(self) -> bool:
        return self.initial == "random"

    def hidden(
        self, model: LoopedLM, e_BTD: Tensor, ks: Sequence[int], noise: NoiseSource
    ) -> Iterator[tuple[int, Tensor]]:
        state = torch.zeros_like(e_BTD)
        if self.initial == "random":
            u = noise.uniform(e_BTD.shape[1], e_BTD.shape[2], "state", e_BTD.device)
            state = truncated_normal(u, STATE_STD).to(e_BTD.dtype)
        done = 0
        for k in sorted(set(ks)):
            state = model.iterate(state, e_BTD, k - done)
            done = k
            yield k, model.decode(state)

    def passes(self, k: int) -> Passes:
        return Passes(core_no_grad=k, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False)


@dataclass(frozen=True)
class DenoiseWalk:
    """Reverse diffusion over K noise levels; each level is one conditioned pass and one read-out.

    K = 1 is the read-out at sigma_max. For K > 1 a bridge turns each read-out into the estimate of y that the next
    step moves towards: the expected target row (``soft``), the most likely one (``hard``), or a sampled one
    (``sample``).
    """

    density: Density
    precond: Precond
    target_norm: float
    sampler: str
    grid: str
    bridge: str
    stochastic: bool = True

    def targets(self, model: LoopedLM) -> Tensor:
        """Clean targets of all tokens: L2-normalised embedding rows times the target norm, fp32 (V, D)."""
        return torch.nn.functional.normalize(model.embedding.weight.float(), dim=-1) * self.target_norm

    def read(self, model: LoopedLM, z_BTD: Tensor, sigma: float, e_BTD: Tensor) -> Tensor:
        """Hidden vectors (B, T, D) that a noisy target at one level reads out to."""
        sigma_B1 = torch.full((z_BTD.shape[0], 1), sigma, dtype=torch.float32, device=z_BTD.device)
        estimate = self.precond.denoise(model, z_BTD, sigma_B1, e_BTD)
        return model.decode((estimate / self.precond.sd).to(e_BTD.dtype))

    def _bridge(self, logits_BTV: Tensor, rows_VD: Tensor, u_BT1: Tensor) -> Tensor:
        if self.bridge == "hard":
            return rows_VD[logits_BTV.argmax(-1)]
        probabilities = logits_BTV.float().softmax(-1)
        if self.bridge == "soft":
            return probabilities @ rows_VD
        picks = (probabilities.cumsum(-1) < u_BT1).sum(-1).clamp(max=len(rows_VD) - 1)
        return rows_VD[picks]

    def hidden(
        self, model: LoopedLM, e_BTD: Tensor, ks: Sequence[int], noise: NoiseSource
    ) -> Iterator[tuple[int, Tensor]]:
        length, width = e_BTD.shape[1:]
        start = noise.normal(length, width, "noise", e_BTD.device) * self.density.sigma_max
        rows_VD = self.targets(model)
        for k in sorted(set(ks)):
            sigmas = GRIDS[self.grid](self.density, k)
            z, reads = start, 0

            def denoise(z: Tensor, sigma: float) -> Tensor:
                nonlocal reads
                reads += 1
                u = noise.uniform(length, 1, f"bridge/{reads}", z.device) if self.bridge == "sample" else z
                return self._bridge(model.logits(self.read(model, z, sigma, e_BTD)), rows_VD, u)

            for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
                eps = noise.normal(length, width, f"step/{index}", z.device) if self.sampler in STOCHASTIC else None
                z = STEPS[self.sampler](denoise, z, sigma, following, eps)
            yield k, self.read(model, z, sigmas[-1], e_BTD)

    def passes(self, k: int) -> Passes:
        reads = EVALUATIONS[self.sampler] * (k - 1) + 1
        return Passes(
            core_no_grad=reads,
            core_grad=0,
            readouts_no_grad=reads,
            readouts_grad=0,
            prelude_grad=False,
            bridges=reads - 1,
        )
