"""The configuration section of each objective: its settings, and what it requires of the model.

An objective's name is the name of its section here and of its file in `recurrent_db/objectives`. Other code never compares
that name. It reads the section's class attributes before the model is built, and the objective's attributes afterwards.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from recurrent_db.errors import UserError
from recurrent_db.schema import (
    Hidden,
    NotNegative,
    Positive,
    Section,
    Share,
    ShareBelowOne,
    above,
    at_least,
    at_most,
    need,
)

Config = Any
"""`config.Config`. This module cannot import it, because it contains these sections."""


class ObjectiveSection(Section):
    """Base of the objectives' sections. Class attributes say what the objective requires of the model."""

    noise_conditioning: ClassVar[bool] = False
    """Whether the core is conditioned on the noise level (model.noise_conditioning)."""
    silent_state: ClassVar[bool] = False
    """Whether the adapter's weights on the state start at zero (model.silent_state)."""
    extra_tokens: ClassVar[int] = 0
    """Number of embeddings in addition to the tokenizer's, such as a mask."""
    in_blocks: ClassVar[bool] = False
    """Whether the objective can train a model in blocks."""
    blocks_file: ClassVar[str] = ""
    """File in `recurrent_db/objectives` that trains a model in blocks; empty if it is the objective's own file."""
    data: ClassVar[str] = "text"
    """The kind of data that the objective trains on: text or images."""
    network: ClassVar[str] = "language"
    """The class of network that the objective trains (model.network)."""
    copies: ClassVar[bool] = False
    """Whether ``blocks.shared = all`` gives each block a copy of what the blocks share, so that it can be trained alone."""

    def resolve(self, config: Config) -> None:
        """Set fields of other sections that follow from this objective, in place. ``config`` is the whole configuration."""
        model = config.model
        model.noise_conditioning, model.silent_state, model.network = (
            self.noise_conditioning, self.silent_state, self.network,
        )  # fmt: skip


@dataclass
class NextTokenConfig(ObjectiveSection):
    """Next-token training with one core pass: the flat control."""


@dataclass
class UnrolledConfig(ObjectiveSection):
    """Huginn's training (arXiv 2502.05171): random depth, truncated backpropagation through time."""

    mean_depth: Annotated[int, above(0), at_most(1 << 14)] = 32
    """Parameter r of the log-normal Poisson distribution of depths, in core passes. The mean depth is r + 1."""
    truncation: Annotated[int, at_least(0), at_most(1 << 20)] = 8
    """Number of last core passes to backpropagate through; 0 means all (full backpropagation through time)."""


@dataclass
class OneStepConfig(ObjectiveSection):
    """Next-token training, then training of extra iterations with gradient through the last one (docs/method.md).

    A run has three phases: the skip-core phase (short runs only), the next-token phase and the iteration phase.
    """

    next_token_share: Share = 0.9
    """Share of the budget at which the iteration phase starts. Until then the first iteration alone is trained, as
    `next_token` does."""
    skip_core: NotNegative = 2.0
    """Length of the skip-core phase, in tokens per weight of the network without its core; at most 0.4 of the budget. After
    it the core's layers start as copies of the layers around them. The phase is left out if it would be shorter than 0.15 of
    the budget, if the run starts from other weights (init.from), if the model has neither prelude nor coda, or if the only
    limit is budget.seconds. 0 turns it off."""
    first_probability: Share = 0.2
    """Probability that a step of the iteration phase trains the first iteration."""
    prior_iterations: Annotated[int, above(0), at_most(1 << 14)] = 2
    """Largest number of core passes without gradient before the trained one, in the other steps of the iteration phase. The
    number is uniform from 1 to this."""
    state: Literal["recomputed", "carried"] = "recomputed"
    """Where a step of the iteration phase gets the state before the trained pass. recomputed: from core passes without
    gradient. carried: from the step before. Each slot of the batch then holds its sample for prior_iterations + 1 steps,
    and every step costs one core pass; first_probability is not used. Carried states need a data.batch_size above
    prior_iterations."""
    corrupt_share: Share = 0.0
    """Mean share of a sequence's input tokens to replace by random ones, at most 0.5. About 0.1 helps if a small corpus is
    repeated; otherwise it raises the loss."""

    silent_state = True

    def check(self, config: Config) -> None:
        need(
            self.corrupt_share <= 0.5,
            "objective.one_step.corrupt_share must be at most 0.5, because a sequence's share is uniform between 0 and twice"
            f" that, got {self.corrupt_share}",
        )
        need(
            config.objective.own is not self
            or self.state == "recomputed"
            or config.data.batch_size > self.prior_iterations,
            "objective.one_step.state = carried trains prior_iterations + 1 iterations in each step: data.batch_size ="
            f" {config.data.batch_size} must be above objective.one_step.prior_iterations = {self.prior_iterations}",
        )


def check_density(section: Any, own: str) -> None:
    """Raise `UserError` unless the log-normal density of a section's noise levels has mass in their range. ``own``: the
    section's dotted name."""
    low, high = section.sigma_min, section.sigma_max
    need(low < high, f"{own}.sigma_min = {low} must be below sigma_max = {high}")
    below, above_ = (
        0.5 * math.erfc((section.p_mean - math.log(sigma)) / (section.p_std * math.sqrt(2))) for sigma in (low, high)
    )
    need(
        above_ - below > 1e-6,
        f"{own}: the noise density log-normal({section.p_mean}, {section.p_std}) has no mass in"
        f" [sigma_min, sigma_max] = [{low}, {high}]",
    )


@dataclass
class DenoiseConfig(ObjectiveSection):
    """One core pass per step, conditioned on the noise level, that names the next token from its embedding with noise
    (DiffusionBlocks, arXiv 2506.14202)."""

    p_mean: float = -0.4
    """Mean of ln sigma before truncation."""
    p_std: Positive = 1.0
    """Standard deviation of ln sigma before truncation."""
    sigma_min: Positive = 0.02
    """Smallest noise level."""
    sigma_max: Positive = 20.0
    """Largest noise level. There the target is invisible, and the read-out is a next-token prediction."""
    atom: Share = 0.5
    """Probability that a training step draws exactly sigma_max; otherwise it draws from the density."""
    conditioning: Literal["inject", "two-stream"] = "inject"
    """How the noised targets z attend. inject: one stream; a position sees the noised targets up to its own. two-stream: a
    position sees the clean context and its own noised target (the paper's concatenation)."""
    bridge: Literal["soft", "hard", "sample", "state"] = "soft"
    """How a walk turns a read-out into an estimate of the target. soft: expected embedding. hard: embedding of the most
    likely token. sample: embedding of a drawn token. state: the core's output, read out once at the end."""
    sampler: Literal["euler", "heun", "ancestral"] = "euler"
    """Method for one step of a walk, from one noise level to the next."""
    grid: Literal["equal-probability", "karras", "log-uniform", "edges"] = "equal-probability"
    """Noise levels of a walk in K steps, from sigma_max down. edges: the upper ends of K intervals of equal probability; for
    a model in B blocks and K = B, that is where each block's range begins."""

    noise_conditioning = True
    in_blocks = True
    blocks_file = "denoise_blocks"
    sd = 0.0
    """Standard deviation per component of the clean target, for the preconditioning. 0 uses the true 1 / sqrt(d_model)."""
    mute = True
    """Whether to scale the network's input z by a further 1 / (1 + sigma^2), so that the network does not see pure noise."""

    def check(self, config: Config) -> None:
        check_density(self, "objective.denoise")
        need(
            config.objective.own is not self or not config.model.n_blocks or self.conditioning == "two-stream",
            "a model in blocks needs objective.denoise.conditioning = two-stream",
        )


@dataclass
class DenoisePaperConfig(DenoiseConfig):
    """`denoise` with the constants printed in arXiv 2506.14202. Other settings are taken from [objective.denoise]."""

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
                    f" it at {own}; set objective.name = denoise to change it"
                )


@dataclass
class MaskedConfig(ObjectiveSection):
    """Masked diffusion for a model in blocks (MD4, arXiv 2406.04329). It is not autoregressive."""

    noise_conditioning = True
    extra_tokens = 1
    in_blocks = True

    def check(self, config: Config) -> None:
        need(
            config.objective.own is not self or config.model.n_blocks > 0,
            f"objective {config.objective.name} needs a model in blocks: set model.n_blocks (1 trains end to end)",
        )


@dataclass
class ClassifyConfig(ObjectiveSection):
    """Classification of images by a vision transformer (ViT), end to end: the control of denoise_class."""

    data = "images"
    network = "vit"

    def check(self, config: Config) -> None:
        need(
            config.objective.own is not self or not config.model.n_blocks,
            "objective classify trains the whole network: set model.n_blocks = 0, or use denoise_class",
        )


class ImageBlocksConfig(ObjectiveSection):
    """Base of the objectives that train a network for images in blocks. The noise is the paper's (arXiv 2506.14202)."""

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: ClassVar[float] = 0.002
    sigma_max: ClassVar[float] = 80.0
    atom: float = 0.0
    label_dropout: float = 0.0
    data = "images"
    noise_conditioning = True
    in_blocks = True
    copies = True

    def check(self, config: Config) -> None:
        name = config.objective.name
        if config.objective.own is self:
            check_density(self, f"objective.{name}")
            need(config.model.n_blocks > 0, f"objective {name} needs blocks: set model.n_blocks (1 trains end to end)")


@dataclass
class DenoiseClassConfig(ImageBlocksConfig):
    """Classification of images by a ViT in blocks: each block names the class from the image and the noised class embedding
    (DiffusionBlocks, arXiv 2506.14202)."""

    p_mean: float = -1.2
    """Mean of ln sigma before truncation. It decides how much of the class each block can read from z alone."""
    p_std: Positive = 1.2
    """Standard deviation of ln sigma before truncation."""
    atom: Share = 0.5
    """Probability that a training step of block 1 draws exactly sigma_max, where it sees the image only."""

    network = "vit"


@dataclass
class DenoiseImageConfig(ImageBlocksConfig):
    """Generation of images by a diffusion transformer (DiT) in blocks, conditioned on their class (DiffusionBlocks, arXiv
    2506.14202)."""

    label_dropout: ShareBelowOne = 0.1
    """Share of the training images whose class is hidden. Guidance needs it above 0."""

    network = "dit"


@dataclass
class Objectives(Section):
    """One section per objective, under the objective's name. The first is the default objective."""

    one_step: OneStepConfig = field(default_factory=OneStepConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)
    denoise_paper: Hidden[DenoisePaperConfig] = field(default_factory=DenoisePaperConfig)
    unrolled: UnrolledConfig = field(default_factory=UnrolledConfig)
    next_token: NextTokenConfig = field(default_factory=NextTokenConfig)
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    denoise_class: DenoiseClassConfig = field(default_factory=DenoiseClassConfig)
    denoise_image: DenoiseImageConfig = field(default_factory=DenoiseImageConfig)


OBJECTIVE_NAMES = tuple(f.name for f in dataclasses.fields(Objectives))
FLAT = next(f.name for f in dataclasses.fields(Objectives) if f.default_factory is NextTokenConfig)
"""The flat control."""


def name_help() -> str:
    """The help of `objective.name`: the first sentence of each section's docstring."""
    kinds = typing.get_type_hints(Objectives)
    docs = {name: " ".join((inspect.getdoc(kinds[name]) or "").split()) for name in OBJECTIVE_NAMES}
    return "How the model is trained. " + " ".join(
        f"{name}: {re.split(r'[.] ', doc)[0].rstrip('.')}." for name, doc in docs.items()
    )


if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Annotated[Literal[OBJECTIVE_NAMES], tyro.conf.arg(help=name_help())]


@dataclass
class ObjectiveConfig(Objectives):
    """The objective: how the model is trained."""

    name: ObjectiveName = OBJECTIVE_NAMES[0]
    """How the model is trained: the name of an objective's section. ``--help`` describes each of them."""

    @property
    def own(self) -> ObjectiveSection:
        """The section of the objective ``name``."""
        return typing.cast(ObjectiveSection, getattr(self, self.name))
