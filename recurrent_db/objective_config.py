"""The sections of the objectives: the options of each way of training, and what choosing it implies for the rest.

An objective's name is the name of its section here and of its file in `recurrent_db/objectives`. Nobody else asks for an
objective by name: what others need of one they ask of its section (before there is a model) or of its class (after).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from recurrent_db.errors import UserError
from recurrent_db.schema import Hidden, NotNegative, Positive, Section, Share, above, at_least, at_most, need

Config = Any
"""`config.Config`, which is made of these sections."""


class ObjectiveSection(Section):
    """Options of one way of training, and what choosing it implies."""

    noise_conditioning: ClassVar[bool] = False
    """The model's core is conditioned on a noise level."""
    silent_state: ClassVar[bool] = False
    """The adapter's half for the state starts at zero (model.silent_state)."""
    extra_tokens: ClassVar[int] = 0
    """Rows of the embedding beside the tokenizer's."""
    in_blocks: ClassVar[bool] = False
    """It can train a model in blocks."""
    blocks_file: ClassVar[str] = ""
    """The file of `objectives` that does so, where it is not the objective's own."""

    def resolve(self, config: Config) -> None:
        """Fill in what choosing this objective implies for other sections, in place."""
        config.model.noise_conditioning, config.model.silent_state = self.noise_conditioning, self.silent_state


@dataclass
class NextTokenConfig(ObjectiveSection):
    """One iteration: the flat control."""


@dataclass
class UnrolledConfig(ObjectiveSection):
    """Huginn's training: sampled depth, truncated backpropagation through time."""

    mean_depth: Annotated[int, above(0), at_most(1 << 14)] = 32
    """Mean r of the log-normal Poisson depth sampler, in core iterations."""
    truncation: Annotated[int, at_least(0), at_most(1 << 20)] = 8
    """Iterations at the end that carry gradient; 0 backpropagates through all of them (full BPTT)."""


@dataclass
class OneStepConfig(ObjectiveSection):
    """Next-token training first; then extra iterations, with gradient through the last one alone (docs/method.md)."""

    next_token_share: Share = 0.9
    """Share of the budget that trains the first iteration alone, as `next_token` does. The rest trains extra iterations."""
    skip_core: NotNegative = 2.0
    """Length of the opening phase that skips the core, in tokens per weight of the network without it. The core's blocks
    then start as copies of the blocks around them. At most .4 of the budget. The phase is left out where it is 0 or
    shorter than .15 of the budget, where the run starts from another's weights, and where the budget is in seconds alone."""
    first_probability: Share = 0.2
    """After ``next_token_share``: probability that a step trains the first iteration."""
    prior_iterations: Annotated[int, above(0), at_most(1 << 14)] = 2
    """After ``next_token_share``, in the other steps: iterations without gradient before the trained one, uniform over 1
    to this."""
    corrupt_share: Share = 0.0
    """Mean share of a sequence's context tokens that are replaced by random ones. About 0.1 helps where a small corpus is
    repeated; elsewhere it costs."""

    silent_state = True

    def check(self, config: Config) -> None:
        need(
            self.corrupt_share <= 0.5,
            f"objective.one_step.corrupt_share must be at most 0.5 (rates reach twice it), got {self.corrupt_share}",
        )


@dataclass
class DenoiseConfig(ObjectiveSection):
    """One noise-conditioned pass a step, the token as clean target (DiffusionBlocks, arXiv 2506.14202)."""

    p_mean: float = -0.4
    """Mean of ln sigma before truncation."""
    p_std: Positive = 1.0
    """Standard deviation of ln sigma before truncation."""
    sigma_min: Positive = 0.02
    """Smallest noise level."""
    sigma_max: Positive = 20.0
    """Largest noise level: where the target is invisible and the read-out is a next-token prediction."""
    atom: Share = 0.5
    """Probability of drawing exactly sigma_max instead of from the density."""
    conditioning: Literal["inject", "two-stream"] = "inject"
    """How z meets the context: one stream in which neighbours hold noisy targets too, or beside a clean stream, each
    position seeing clean keys and its own noisy one (the paper's concatenation)."""
    bridge: Literal["soft", "hard", "sample", "state"] = "soft"
    """From a read-out back to an estimate of the target during a walk: expected row, most likely row, sampled row; or
    the core's own output, with one read-out at the end."""
    sampler: Literal["euler", "heun", "ancestral"] = "euler"
    """Step of the walk from one noise level to the next."""
    grid: Literal["equal-probability", "karras", "log-uniform", "edges"] = "equal-probability"
    """Noise levels of a K-step walk, from sigma_max down; ``edges`` are the upper ends of K intervals of equal probability
    (of a model in B blocks at K = B: where each block's range begins)."""

    noise_conditioning = True
    in_blocks = True
    blocks_file = "denoise_blocks"
    sd = 0.0
    """Per-component standard deviation of the clean target in the preconditioning; 0 takes the true 1 / sqrt(d_model)."""
    mute = True
    """Scale the network's view of z by 1 / (1 + sigma^2), so that pure noise is silent."""

    def check(self, config: Config) -> None:
        need(
            self.sigma_min < self.sigma_max,
            f"objective.denoise.sigma_min = {self.sigma_min} must be below sigma_max = {self.sigma_max}",
        )
        low, high = (
            0.5 * math.erfc((self.p_mean - math.log(sigma)) / (self.p_std * math.sqrt(2)))
            for sigma in (self.sigma_min, self.sigma_max)
        )
        need(
            high - low > 1e-6,
            f"objective.denoise: log-normal({self.p_mean}, {self.p_std}) has no mass in"
            f" [{self.sigma_min}, {self.sigma_max}]",
        )
        need(
            config.objective.own is not self or not config.model.n_blocks or self.conditioning == "two-stream",
            "a model in blocks needs objective.denoise.conditioning = two-stream",
        )


@dataclass
class DenoisePaperConfig(DenoiseConfig):
    """The constants that arXiv 2506.14202 prints; the other choices are those of [objective.denoise]."""

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    atom: float = 0.0

    sd = 0.5
    mute = False

    def resolve(self, config: Config) -> None:
        super().resolve(config)
        for f in dataclasses.fields(DenoiseConfig):
            given, own = getattr(config.objective.denoise, f.name), getattr(self, f.name)
            if f.name not in vars(type(self)):
                setattr(self, f.name, given)
            elif given not in (f.default, own):
                raise UserError(
                    f"objective.denoise.{f.name} = {given} contradicts objective.name = {config.objective.name}, which fixes"
                    f" it at {own}; name the objective denoise to choose"
                )


@dataclass
class MaskedConfig(ObjectiveSection):
    """Masked diffusion in blocks, not autoregressive."""

    noise_conditioning = True
    extra_tokens = 1
    in_blocks = True

    def check(self, config: Config) -> None:
        need(
            config.objective.own is not self or config.model.n_blocks > 0,
            f"objective {config.objective.name} needs a model in blocks: set model.n_blocks (1 for end-to-end)",
        )


@dataclass
class Objectives(Section):
    """Every objective's section by its name; the first is the default."""

    one_step: OneStepConfig = field(default_factory=OneStepConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)
    denoise_paper: Hidden[DenoisePaperConfig] = field(default_factory=DenoisePaperConfig)
    unrolled: UnrolledConfig = field(default_factory=UnrolledConfig)
    next_token: NextTokenConfig = field(default_factory=NextTokenConfig)
    masked: MaskedConfig = field(default_factory=MaskedConfig)


OBJECTIVE_NAMES = tuple(f.name for f in dataclasses.fields(Objectives))

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[OBJECTIVE_NAMES]


@dataclass
class ObjectiveConfig(Objectives):
    """What a training step computes."""

    name: ObjectiveName = OBJECTIVE_NAMES[0]
    """next_token (flat control), unrolled (Huginn), denoise (one noise-conditioned core pass on the noised target),
    denoise_paper (denoise with the constants that the paper prints), one_step (one pass with gradient from a state that the
    model reached itself), or masked (masked diffusion in blocks, not autoregressive; needs model.n_blocks)."""

    @property
    def own(self) -> ObjectiveSection:
        """The section of the objective that ``name`` names."""
        return typing.cast(ObjectiveSection, getattr(self, self.name))
