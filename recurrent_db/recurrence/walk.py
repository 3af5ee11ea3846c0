"""What the K iterations do at inference: one contract, and its two ways.

A recurrence turns the prelude's output into hidden vectors after K core iterations, for each K asked for. Scoring,
generation and lm-eval go through it and through nothing else, so they agree by construction.

- `PlainRecurrence`: Huginn's loop. K iterations of the core from one initial state, read out at the end.
- `DenoiseWalk`: a reverse diffusion over K noise levels from sigma_max down. Position i walks its own z; what the
  positions before it hold at step k is a choice: their own walks' z (for K = 1 that is pure noise, which training saw at
  sigma_max), the known tokens' targets at the same noise, or, with two streams, the clean context alone.

Both start from noise or zeros, never from the answer, so position i of every result depends on tokens <= i alone. The
positions may follow others that a `cache.Cache` holds: ``visible`` then says so, and the noise starts at their offset.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from recurrent_db.accounting.flops import Passes
from recurrent_db.config import DenoiseConfig
from recurrent_db.denoise.bound import walk_log_weight
from recurrent_db.denoise.noise import GRIDS, Density
from recurrent_db.denoise.precond import Precond
from recurrent_db.denoise.sampler import EVALUATIONS, STEPS, STOCHASTIC
from recurrent_db.model.attention import Visible
from recurrent_db.model.layers import Context, wide
from recurrent_db.model.looped import STATE_STD, LoopedLM
from recurrent_db.rng import Rng


@dataclass(frozen=True)
class NoiseSource:
    """Draws for scoring and generation: a function of (seed, request, position, stream) and the draw's number.

    Rows are drawn in pages of ``page`` positions, so that position i's noise does not depend on how long the sequence
    is. ``offset`` is the absolute position of the first row, of all sequences or of each; rows before position 0, which
    are padding, are zeros.
    """

    rng: Rng
    requests: Tensor
    page: int
    draw: int = 0
    offset: int | tuple[int, ...] = 0
    kept: dict[tuple[object, ...], tuple[int, Tensor]] | None = None
    """The last page of each stream, where one position after another is asked for."""

    def back(self, positions: int) -> NoiseSource:
        """The same from so many positions earlier on."""
        offset = self.offset
        return replace(
            self, offset=offset - positions if isinstance(offset, int) else tuple(o - positions for o in offset)
        )

    def _pages(self, length: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        if not isinstance(self.offset, int):
            each = zip(self.requests.split(1), self.offset, strict=True)
            rows = [replace(self, requests=request, offset=offset) for request, offset in each]
            return torch.cat([row._pages(length, width, stream, device, normal) for row in rows])
        if self.offset < 0:
            padding = torch.zeros(len(self.requests), min(length, -self.offset), width, device=device)
            if padding.shape[1] == length:
                return padding
            rest = replace(self, offset=0)._pages(length + self.offset, width, stream, device, normal)
            return torch.cat((padding, rest), dim=1)
        first, last = self.offset // self.page, (self.offset + length - 1) // self.page
        found = [self._page(page, width, stream, device, normal) for page in range(first, last + 1)]
        start = self.offset - first * self.page
        pages_BPD = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return pages_BPD[:, start : start + length]

    def _page(self, page: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        """(B, page, width)."""
        place = (stream, self.draw, *self.requests.tolist())
        if self.kept is not None and place in self.kept and self.kept[place][0] == page:
            return self.kept[place][1]
        name, shape = f"{stream}/draw{self.draw}/page{page}", (self.page, width)
        if normal:
            rows = self.rng.normal(self.requests, shape, name, device)
        else:
            rows = self.rng.uniform(self.requests, shape, name, device, torch.float32)
        if self.kept is not None:
            self.kept[place] = page, rows
        return rows

    def normal(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """fp32 standard normals (B, length, width)."""
        return self._pages(length, width, stream, device, normal=True)

    def uniform(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """fp32 uniforms in [0, 1) (B, length, width)."""
        return self._pages(length, width, stream, device, normal=False)


@dataclass
class Probe:
    """A look into a run of K iterations, for reports: ask for one K."""

    edit: Callable[[Tensor], Tensor] | None = None
    """Replaces the state (of a walk: z) before the last core pass."""
    states: list[Tensor] = field(default_factory=list)
    """Filled with what each core pass gave (of a walk: the estimate D), (B, T, D) each."""
    codas: list[list[Context] | None] = field(default_factory=list)
    """Of a walk: the coda's context stream for each of them, where neighbours are known."""
    parts: list[LoopedLM] = field(default_factory=list)
    """Of a walk: the network that made each of them (`DenoiseWalk.at`)."""


class Recurrence(Protocol):
    """K-iteration inference of a checkpoint."""

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on the noise, so that draws can be averaged."""
        ...

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
        """Yield (K, hidden_BTD) for each K of ``ks`` in rising order; ``model.logits(hidden)`` predicts the next token.
        ``e`` is the prelude's output for ``tokens``, and ``visible`` what it was made with (plain causal by default; from
        `Cache.grow` where the tokens follow others)."""
        ...

    def ready(self, model: LoopedLM) -> Recurrence:
        """The same, with what depends on the model's weights alone made once: for many calls, while they stay as they
        are."""
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

    def start(self, like_BTD: Tensor, noise: NoiseSource) -> Tensor:
        """Initial states (B, T, D) of so many positions from the noise's offset on."""
        if self.initial == "zeros":
            return torch.zeros_like(like_BTD)
        u = noise.uniform(like_BTD.shape[1], like_BTD.shape[2], "state", like_BTD.device)
        return truncated_normal(u, STATE_STD).to(like_BTD.dtype)

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
        visible = visible or model.visible(e_BTD.shape[1])
        state, done = self.start(e_BTD, noise), 0
        for k in sorted(set(ks)):
            if probe is None:
                state = model.iterate(state, e_BTD, k - done, visible=visible)
            else:
                for iteration in range(1, k + 1):
                    state = probe.edit(state) if probe.edit is not None and iteration == k else state
                    state = model.iterate(state, e_BTD, visible=visible)
                    probe.states.append(state)
            done = k
            yield k, model.decode(state, visible=visible)

    def ready(self, model: LoopedLM) -> PlainRecurrence:
        return self

    def passes(self, k: int) -> Passes:
        return Passes(core_no_grad=k, core_grad=0, readouts_no_grad=1, readouts_grad=0, prelude_grad=False)


def normalised(rows: Tensor, norm: float) -> Tensor:
    """Clean targets: rows (..., D) brought to length ``norm``, fp32 or wider."""
    return torch.nn.functional.normalize(rows.to(wide(rows.dtype)), dim=-1) * norm


@dataclass(frozen=True)
class DenoiseWalk:
    """Reverse diffusion over K noise levels; each level is one conditioned pass of the core.

    K = 1 is the read-out at sigma_max. For K > 1 a bridge turns each level's result into the estimate of y that the
    step moves towards: the expected target row (``soft``), the most likely one (``hard``), a sampled one (``sample``), all
    of the read-out; or the core's output itself (``state``), which needs no read-out before the last level.
    """

    density: Density
    precond: Precond
    config: DenoiseConfig
    stochastic: bool = True
    targets_VD: Tensor | None = None
    """Clean targets of a model that this is `ready` for."""

    def targets(self, model: LoopedLM) -> Tensor:
        """Clean targets of all tokens, fp32 or wider (V, D)."""
        return normalised(model.target_rows(), self.config.target_norm) if self.targets_VD is None else self.targets_VD

    @torch.no_grad()
    def ready(self, model: LoopedLM) -> DenoiseWalk:
        return replace(self, targets_VD=self.targets(model) if self.config.bridge == "soft" else None)

    def at(self, model: LoopedLM, sigma: float) -> LoopedLM:
        """The network that denoises at a noise level: here always the model."""
        return model

    def grid(self, k: int) -> list[float]:
        """Noise levels of a walk of K steps, falling."""
        return GRIDS[self.config.grid](self.density, k)

    def clean_contexts(self, model: LoopedLM, e_BTD: Tensor, visible: Visible | None = None) -> list[Context] | None:
        """The clean stream of two-stream conditioning: one unconditioned pass over e from a silent state, whose keys
        every noise level reads. None for one stream."""
        if self.config.conditioning != "two-stream":
            return None
        return model.core_contexts(torch.zeros_like(e_BTD), e_BTD, visible=visible)[0]

    def estimate(
        self,
        model: LoopedLM,
        z_BTD: Tensor,
        sigma: float,
        e_BTD: Tensor,
        beside: list[Context] | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """D at one noise level, fp32 or wider (B, T, D)."""
        sigma_B1 = torch.full((z_BTD.shape[0], 1), sigma, dtype=torch.float32, device=z_BTD.device)
        return self.precond.denoise(model, z_BTD, sigma_B1, e_BTD, beside, visible)

    def read(
        self,
        model: LoopedLM,
        estimate_BTD: Tensor,
        dtype: torch.dtype,
        beside: list[Context] | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """Hidden vectors (B, T, D) that an estimate reads out to."""
        return model.decode((estimate_BTD / self.precond.sd).to(dtype), beside, visible)

    def _bridge(self, model: LoopedLM, logits_BTV: Tensor, targets_VD: Tensor | None, u_BT1: Tensor | None) -> Tensor:
        """The estimate of y that a read-out stands for, (B, T, D): soft where there are ``targets``, sampled where there is
        ``u``, hard where there is neither."""
        if targets_VD is None and u_BT1 is None:
            picks_BT = logits_BTV.argmax(-1)
        else:
            probabilities_BTV = logits_BTV.to(wide(logits_BTV.dtype)).softmax(-1)
            if targets_VD is not None:
                return probabilities_BTV @ targets_VD
            assert u_BT1 is not None
            picks_BT = (probabilities_BTV.cumsum(-1) < u_BT1).sum(-1).clamp(max=logits_BTV.shape[-1] - 1)
        return normalised(model.target_rows()[picks_BT], self.config.target_norm)

    def _known(
        self, model: LoopedLM, tokens_BT: Tensor, e_BTD: Tensor, sigma: float, noise: NoiseSource, visible: Visible
    ) -> tuple[list[Context], list[Context]]:
        """Streams of the core and the coda in which position j holds the known token j+1's target at noise sigma, as
        in training. Strict: position i sees j < i, whose token j+1 <= i it knows. ``e`` and ``visible`` as from
        `Visible.once_more`."""
        length, width = e_BTD.shape[1:]
        again = length - tokens_BT.shape[1]
        y_BTD = normalised(model.target_rows()[tokens_BT], self.config.target_norm)
        # The last position's next token is not known, and no position looks there.
        y_BTD = torch.cat((y_BTD[:, 1 - again :], torch.zeros_like(y_BTD[:, :1])), dim=1)
        eps_BTD = noise.back(again).normal(length, width, f"neighbours/{sigma!r}", e_BTD.device)
        z_BTD = y_BTD + sigma * eps_BTD
        sigma_B1 = torch.full((len(z_BTD), 1), sigma, dtype=torch.float32, device=z_BTD.device)
        view_BTD = self.precond.view(z_BTD, sigma_B1[..., None]).to(e_BTD.dtype)
        c_noise_B1 = self.precond.c_noise(sigma_B1)
        core, state_BTD = model.core_contexts(view_BTD, e_BTD, c_noise_B1, strict=True, finish=True, visible=visible)
        estimate_BTD = self.precond.combine(z_BTD, state_BTD, sigma_B1[..., None])
        return core, model.coda_contexts((estimate_BTD / self.precond.sd).to(e_BTD.dtype), strict=True, visible=visible)

    def _streams(
        self, model: LoopedLM, tokens_BT: Tensor, e_BTD: Tensor, noise: NoiseSource, visible: Visible
    ) -> Callable[[float], tuple[list[Context] | None, list[Context] | None]]:
        """A noise level to the streams beside the walk there, of core and coda."""
        clean = functools.cache(lambda part: self.clean_contexts(part, e_BTD, visible))
        known = self.config.neighbours == "known"
        lagging, lagging_e_BTD = visible.once_more(e_BTD) if known else (visible, e_BTD)

        def streams(sigma: float) -> tuple[list[Context] | None, list[Context] | None]:
            if not known:
                return clean(self.at(model, sigma)), None
            return self._known(model, tokens_BT, lagging_e_BTD, sigma, noise, lagging)

        return streams

    def reader(
        self, model: LoopedLM, tokens_BT: Tensor, e_BTD: Tensor, noise: NoiseSource, visible: Visible
    ) -> Callable[[Tensor, float], Tensor]:
        """(z, sigma) -> log-probabilities of the next token, fp32 or wider (B, T, V), as a walk reads them."""
        streams = self._streams(model, tokens_BT, e_BTD, noise, visible)

        def read(z_BTD: Tensor, sigma: float) -> Tensor:
            (core, coda), part = streams(sigma), self.at(model, sigma)
            estimate_BTD = self.estimate(part, z_BTD, sigma, e_BTD, core, visible)
            logits_BTV = model.logits(self.read(part, estimate_BTD, e_BTD.dtype, coda, visible))
            return logits_BTV.to(wide(logits_BTV.dtype)).log_softmax(-1)

        return read

    def log_weight(
        self,
        model: LoopedLM,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        e_BTD: Tensor,
        k: int,
        noise: NoiseSource,
        visible: Visible | None = None,
    ) -> Tensor:
        """log w of one draw for the targets, fp32 or wider (B, T): a bound on the log-likelihood of the ancestral walk of K
        steps with a sampled bridge, whatever the walk's own are (`denoise.bound`). In one stream a position's neighbours
        hold the tokens that follow them, noised along the same walk: for position i these are tokens up to i."""
        length, width = e_BTD.shape[1:]
        read = self.reader(model, tokens_BT, e_BTD, noise, visible or model.visible(length))
        rows_VD = self.targets(model)

        def normals(stream: str) -> Tensor:
            return noise.normal(length, width, stream, e_BTD.device).to(rows_VD.dtype)

        start_BTD = normals("noise") * self.density.sigma_max
        return walk_log_weight(
            read, rows_VD, targets_BT, start_BTD, self.grid(k), lambda index: normals(f"step/{index}")
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
        here = visible or model.visible(length)
        start = noise.normal(length, width, "noise", e_BTD.device) * self.density.sigma_max
        soft = self.config.bridge == "soft" and max(ks, default=1) > 1
        targets_VD = self.targets(model) if soft else None
        streams = self._streams(model, tokens_BT, e_BTD, noise, here)
        sampler, bridge = self.config.sampler, self.config.bridge

        for k in sorted(set(ks)):
            sigmas = self.grid(k)
            z, reads = start, 0

            def denoise(z: Tensor, sigma: float) -> Tensor:
                nonlocal reads
                reads += 1
                core, coda = streams(sigma)
                part = self.at(model, sigma)
                estimate = self.estimate(part, z, sigma, e_BTD, core, here)
                if probe is not None:
                    probe.states.append(estimate)
                    probe.codas.append(coda)
                    probe.parts.append(part)
                if bridge == "state":
                    return estimate
                logits = model.logits(self.read(part, estimate, e_BTD.dtype, coda, here))
                u = noise.uniform(length, 1, f"bridge/{reads}", z.device) if bridge == "sample" else None
                return self._bridge(model, logits, targets_VD, u)

            for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
                eps = noise.normal(length, width, f"step/{index}", z.device) if sampler in STOCHASTIC else None
                z = STEPS[sampler](denoise, z, sigma, following, eps)
            core, coda = streams(sigmas[-1])
            if probe is not None and probe.edit is not None:
                z = probe.edit(z)
            part = self.at(model, sigmas[-1])
            estimate = self.estimate(part, z, sigmas[-1], e_BTD, core, here)
            if probe is not None:
                probe.states.append(estimate)
                probe.codas.append(coda)
                probe.parts.append(part)
            yield k, self.read(part, estimate, e_BTD.dtype, coda, here)

    def bound_passes(self, k: int) -> Passes:
        """What `log_weight` computes: its sum over the rows is a product as large as a soft bridge's."""
        walk = replace(self, config=replace(self.config, sampler="ancestral", bridge="soft"))
        return walk.passes(k)

    def passes(self, k: int) -> Passes:
        evaluations = EVALUATIONS[self.config.sampler] * (k - 1) + 1
        reads = 1 if self.config.bridge == "state" else evaluations
        return Passes(
            core_no_grad=evaluations,
            core_grad=0,
            readouts_no_grad=reads,
            readouts_grad=0,
            prelude_grad=False,
            noise_levels=1,
            bridges=evaluations - 1 if self.config.bridge == "soft" else 0,
            clean_no_grad=int(self.config.conditioning == "two-stream"),
            known_no_grad=evaluations if self.config.neighbours == "known" else 0,
            beside=self.config.conditioning == "two-stream" or self.config.neighbours == "known",
        )
