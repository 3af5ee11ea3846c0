"""The walk: inference of a denoiser by reverse diffusion over K noise levels, one core pass per level.

Each position has its own z, which starts as noise at sigma_max and is denoised level by level. With one stream, a position
sees the z of earlier positions at the same level; with two streams it sees only the clean context. The walk never sees the
answer, so position i of every result depends on tokens <= i only.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recurrent_db.denoise.bound import walk_log_weight
from recurrent_db.denoise.noise import GRIDS, Density
from recurrent_db.denoise.precond import Precond
from recurrent_db.denoise.sampler import EVALUATIONS, STEPS, STOCHASTIC
from recurrent_db.model.attention import Visible
from recurrent_db.model.layers import Context
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.norms import wide
from recurrent_db.model.passes import Passes
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.objective_config import DenoiseConfig


def normalised(rows: Tensor) -> Tensor:
    """Targets y: embeddings (..., D) scaled to length 1, fp32 or wider."""
    return torch.nn.functional.normalize(rows.to(wide(rows.dtype)), dim=-1)


@dataclass(frozen=True)
class DenoiseWalk:
    """A walk over K noise levels, one core pass each. Implements `model.recurrence.Recurrence`.

    K = 1 is the read-out at sigma_max. For K > 1 a bridge turns each level's result into an estimate of y, towards which the
    step moves: the expected target under the read-out (``soft``), the most likely target (``hard``), a sampled target
    (``sample``), or the core's output itself (``state``), which needs no read-out before the last level.
    """

    density: Density
    precond: Precond
    config: DenoiseConfig
    stochastic: bool = True
    targets_VD: Tensor | None = None
    """All targets, precomputed by `ready`; None computes them from the model."""
    loop: None = None

    @property
    def walk(self) -> DenoiseWalk:
        return self

    def targets(self, model: LoopedLM) -> Tensor:
        """The targets of all tokens, fp32 or wider (V, D)."""
        return normalised(model.embedding.weight) if self.targets_VD is None else self.targets_VD

    @torch.no_grad()
    def ready(self, model: LoopedLM) -> DenoiseWalk:
        return replace(self, targets_VD=self.targets(model) if self.config.bridge == "soft" else None)

    def at(self, model: LoopedLM, sigma: float) -> LoopedLM:
        """The network that denoises at a noise level: the model. A subclass for a model in blocks returns a block."""
        return model

    def levels(self, k: int) -> list[float]:
        return GRIDS[self.config.grid](self.density, k)

    def start(self, like_BTD: Tensor, noise: NoiseSource) -> Tensor:
        return noise.normal(like_BTD.shape[1], like_BTD.shape[2], "noise", like_BTD.device) * self.density.sigma_max

    def clean_contexts(self, model: LoopedLM, e_BTD: Tensor, visible: Visible | None = None) -> list[Context] | None:
        """Keys and values of the clean stream in two-stream attention, which all noise levels read; None for one stream.

        The clean stream is one core pass over e from a zero state, without noise conditioning.
        """
        if self.config.conditioning != "two-stream":
            return None
        return model.core_contexts(torch.zeros_like(e_BTD), e_BTD, visible=visible)

    def estimate(
        self,
        model: LoopedLM,
        z_BTD: Tensor,
        sigma: float,
        e_BTD: Tensor,
        beside: list[Context] | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """The denoiser's estimate D of y at one noise level, fp32 or wider (B, T, D)."""
        sigma_B1 = torch.full((z_BTD.shape[0], 1), sigma, dtype=torch.float32, device=z_BTD.device)
        return model.denoise(self.precond, z_BTD, sigma_B1, e_BTD, beside, visible)

    def read(self, model: LoopedLM, estimate_BTD: Tensor, dtype: torch.dtype, visible: Visible | None = None) -> Tensor:
        """Run the coda on an estimate of y. Returns the head's input, (B, T, D)."""
        return model.decode((estimate_BTD / self.precond.sd).to(dtype), visible)

    def _bridge(self, model: LoopedLM, logits_BTV: Tensor, targets_VD: Tensor | None, u_BT1: Tensor | None) -> Tensor:
        """Turn a read-out into an estimate of y, (B, T, D): soft with ``targets_VD``, sampled with uniforms ``u_BT1``, hard
        with neither."""
        if targets_VD is None and u_BT1 is None:
            picks_BT = logits_BTV.argmax(-1)
        else:
            probabilities_BTV = logits_BTV.to(wide(logits_BTV.dtype)).softmax(-1)
            if targets_VD is not None:
                return probabilities_BTV @ targets_VD
            assert u_BT1 is not None
            picks_BT = (probabilities_BTV.cumsum(-1) < u_BT1).sum(-1).clamp(max=logits_BTV.shape[-1] - 1)
        return normalised(model.embedding.weight[picks_BT])

    def reader(self, model: LoopedLM, e_BTD: Tensor, visible: Visible) -> Callable[[Tensor, float], Tensor]:
        """A function from (z, sigma) to the log-probabilities of the walk's read-out there, fp32 or wider (B, T, V)."""
        clean = functools.cache(lambda part: self.clean_contexts(part, e_BTD, visible))

        def read(z_BTD: Tensor, sigma: float) -> Tensor:
            part = self.at(model, sigma)
            estimate_BTD = self.estimate(part, z_BTD, sigma, e_BTD, clean(part), visible)
            logits_BTV = model.logits(self.read(part, estimate_BTD, e_BTD.dtype, visible))
            return logits_BTV.to(wide(logits_BTV.dtype)).log_softmax(-1)

        return read

    def log_weight(
        self,
        model: LoopedLM,
        targets_BT: Tensor,
        e_BTD: Tensor,
        k: int,
        noise: NoiseSource,
        visible: Visible | None = None,
    ) -> Tensor:
        """The log weight of one draw for the target tokens, fp32 or wider (B, T).

        Its mean is a lower bound on the log-likelihood of a walk of K ancestral steps with a sampled bridge, whatever
        sampler and bridge this walk has (`denoise.bound`). With one stream, earlier positions hold their own noised targets,
        so position i depends on tokens up to i.
        """
        length, width = e_BTD.shape[1:]
        read = self.reader(model, e_BTD, visible or model.visible(length))
        table_VD = self.targets(model)

        def normals(stream: str) -> Tensor:
            return noise.normal(length, width, stream, e_BTD.device).to(table_VD.dtype)

        start_BTD = self.start(e_BTD, noise).to(table_VD.dtype)
        return walk_log_weight(
            read, table_VD, targets_BT, start_BTD, self.levels(k), lambda index: normals(f"step/{index}")
        )

    def hidden(
        self,
        model: LoopedLM,
        tokens_BT: Tensor,
        e_BTD: Tensor,
        ks: Sequence[int],
        noise: NoiseSource,
        probe: Probe | None = None,
        visible: Visible | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        length, width = e_BTD.shape[1:]
        visible = visible or model.visible(length)
        start = self.start(e_BTD, noise)
        steps = _Steps(self, model, e_BTD, noise, visible, probe, soft=max(ks, default=1) > 1)
        for k in sorted(set(ks)):
            sigmas = self.levels(k)
            z, steps.reads = start, 0
            for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
                random = self.config.sampler in STOCHASTIC
                eps = noise.normal(length, width, f"step/{index}", z.device) if random else None
                z = STEPS[self.config.sampler](steps.target, z, sigma, following, eps)
            if probe is not None and probe.edit is not None:
                z = probe.edit(z)
            part, estimate = steps.estimate(z, sigmas[-1])
            yield k, self.read(part, estimate, e_BTD.dtype, visible)

    def bound_passes(self, k: int) -> Passes:
        """The passes of `log_weight`, for the FLOP count. Its sum over tokens costs as much as a soft bridge."""
        walk = replace(self, config=replace(self.config, sampler="ancestral", bridge="soft"))
        return walk.passes(k)

    def passes(self, k: int) -> Passes:
        evaluations = EVALUATIONS[self.config.sampler] * (k - 1) + 1
        two_stream = self.config.conditioning == "two-stream"
        return Passes(
            core_no_grad=evaluations,
            core_grad=0,
            readouts_no_grad=1 if self.config.bridge == "state" else evaluations,
            readouts_grad=0,
            prelude_grad=False,
            noise_levels=1,
            bridges=evaluations - 1 if self.config.bridge == "soft" else 0,
            clean_no_grad=int(two_stream),
            beside=two_stream,
        )


class _Steps:
    """Evaluates the denoiser along one walk, for the steps of `denoise.sampler`."""

    def __init__(
        self, walk: DenoiseWalk, model: LoopedLM, e_BTD: Tensor, noise: NoiseSource, visible: Visible,
        probe: Probe | None, soft: bool,
    ) -> None:  # fmt: skip
        self.walk, self.model, self.e_BTD, self.noise = walk, model, e_BTD, noise
        self.visible, self.probe = visible, probe
        self.targets_VD = walk.targets(model) if soft and walk.config.bridge == "soft" else None
        self.clean = functools.cache(lambda part: walk.clean_contexts(part, e_BTD, visible))
        self.reads = 0

    def estimate(self, z_BTD: Tensor, sigma: float) -> tuple[LoopedLM, Tensor]:
        """The network for this noise level, and its estimate D of y, (B, T, D)."""
        part = self.walk.at(self.model, sigma)
        estimate_BTD = self.walk.estimate(part, z_BTD, sigma, self.e_BTD, self.clean(part), self.visible)
        if self.probe is not None:
            self.probe.states.append(estimate_BTD)
            self.probe.parts.append(part)
        return part, estimate_BTD

    def target(self, z_BTD: Tensor, sigma: float) -> Tensor:
        """The estimate of y after the bridge, (B, T, D), towards which a step moves."""
        self.reads += 1
        part, estimate_BTD = self.estimate(z_BTD, sigma)
        if self.walk.config.bridge == "state":
            return estimate_BTD
        logits_BTV = self.model.logits(self.walk.read(part, estimate_BTD, self.e_BTD.dtype, self.visible))
        sampled = self.walk.config.bridge == "sample"
        u = self.noise.uniform(z_BTD.shape[1], 1, f"bridge/{self.reads}", z_BTD.device) if sampled else None
        return self.walk._bridge(self.model, logits_BTV, self.targets_VD, u)
