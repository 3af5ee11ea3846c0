"""The configuration of a run: typed sections, read from TOML, overridden by dotted options.

``load_config(path, ["--optim.lr", "3e-4"])`` is what every script calls. Unknown keys are refused with a suggestion,
values are checked against the bounds beside their fields, and the resolved result is saved beside the weights as JSON.
Shares are fractions of the budget, so that one file serves any budget.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recurrent_db.arguments import parse
from recurrent_db.errors import UserError
from recurrent_db.objective_config import OBJECTIVE_NAMES, ObjectiveConfig
from recurrent_db.schema import (
    Count,
    Hidden,
    NotNegative,
    Positive,
    PositiveInt,
    Section,
    Share,
    ShareBelowOne,
    above,
    at_least,
    at_most,
    check,
    check_bounds,
    from_dict,
    need,
    read_toml,
)


@dataclass
class ModelConfig(Section):
    """Shape of the network: prelude -> core x K -> coda."""

    vocab_size: Annotated[int, at_least(0), at_most(1 << 24)] = 0
    """Rows of the embedding table; 0 takes the tokenizer's."""
    d_model: Annotated[int, above(0), at_most(1 << 17)] = 128
    """Width of the residual stream."""
    n_heads: Annotated[int, above(0), at_most(1 << 12)] = 4
    """Attention heads; must divide d_model into an even head size."""
    n_prelude: Annotated[int, at_least(0), at_most(1024)] = 1
    """Blocks before the recurrence."""
    n_core: Annotated[int, above(0), at_most(1024)] = 2
    """Blocks of the weight-tied core."""
    n_coda: Annotated[int, at_least(0), at_most(1024)] = 1
    """Blocks after the recurrence."""
    d_mlp: Annotated[int, above(0), at_most(1 << 20)] = 352
    """Hidden width of the gated MLP (gate and up each have this many columns)."""
    max_seq_len: Annotated[int, above(0), at_most(1 << 24)] = 128
    """Longest context in tokens that scoring and generation use."""
    injection: Literal["linear", "diagonal", "add"] = "linear"
    """How the core sees the prelude's output: Huginn's linear adapter on [state, e], a per-channel decay on the state
    plus a projection of e (Parcae, arXiv 2604.12946), or a plain sum."""
    silent_state: Hidden[bool] = False
    """Start the linear adapter's half for the state at zero, so that iterations after the first begin as repetitions of it.
    The objective decides."""
    noise_conditioning: Hidden[bool] = False
    """AdaLN on the core from the noise level. The objective decides."""
    d_condition: Annotated[int, above(0), at_most(1 << 16)] = 128
    """Width of the noise embedding."""
    expected_depth: Annotated[int, above(0), at_most(1 << 20)] = 32
    """Mean recurrence r that scales the output projections at initialisation."""
    n_blocks: Count = 0
    """DiffusionBlocks: cut the n_core layers, run once and not looped, into so many blocks that train alone, each for its
    own range of noise levels; 0 is the looped model. See docs/blocks.md."""
    block_layers: list[int] = field(default_factory=list)
    """Layers of each block, the first for the highest noise; empty splits n_core evenly."""

    def check(self, config: Config) -> None:
        head_size, rest = divmod(self.d_model, self.n_heads)
        need(not rest, f"model.d_model = {self.d_model} is not divisible by model.n_heads = {self.n_heads}")
        need(head_size % 2 == 0, f"the head size {head_size} (model.d_model / model.n_heads) must be even for RoPE")
        n, layers = self.n_blocks, self.block_layers
        if not n:
            need(not layers, "model.block_layers needs model.n_blocks")
            return
        need(
            bool(layers),
            f"model.n_core = {self.n_core} layers do not split evenly into {n} blocks: give model.block_layers",
        )
        need(
            len(layers) == n and sum(layers) == self.n_core and min(layers) >= 1,
            f"model.block_layers = {layers} must name {n} blocks of 1 layer or more, {self.n_core} in all",
        )
        need(
            self.n_prelude == self.n_coda == 0,
            "a model in blocks has no prelude and no coda: set model.n_prelude = model.n_coda = 0",
        )


@dataclass
class BlocksConfig(Section):
    """How the blocks of a model with model.n_blocks share the noise and the embedding (DiffusionBlocks,
    arXiv 2506.14202)."""

    only: Count = 0
    """Train this block alone (they are counted from 1, high noise first), with the memory of this block; 0 trains all in
    one process, a block drawn for each step."""
    partition: Literal["equal-probability", "uniform"] = "equal-probability"
    """Ranges of equal probability under the noise density, or of equal width in ln sigma (the control). Of objective masked
    always equal decrements of alpha."""
    gamma: ShareBelowOne = 0.1
    """Overlap: in training each range is widened by (high/low)^gamma on both sides. Objective masked has none."""
    shared: Literal["owned", "frozen", "all"] = "owned"
    """Who trains the embedding and head that all blocks share: block 1 owns them, none does (frozen), or (in one process)
    every block does."""
    owner = 1
    """The block that trains them where they are owned."""

    def check(self, config: Config) -> None:
        n, name = config.model.n_blocks, config.objective.name
        if not n:
            need(not self.only, f"blocks.only = {self.only} needs a model in blocks: set model.n_blocks")
            return
        able = [other for other in OBJECTIVE_NAMES if getattr(config.objective, other).in_blocks]
        need(
            name in able,
            f"objective {name} cannot train a model in blocks: take {', '.join(able)}, or model.n_blocks = 0",
        )
        need(0 <= self.only <= n, f"blocks.only must be 0 (all) or a block from 1 to {n}, got {self.only}")
        need(
            self.only in (0, self.owner) or self.shared != "owned" or bool(config.init.from_),
            f"block {self.only} does not train the embedding, which block {self.owner} owns: give that block's run with"
            " --init.from, or set blocks.shared = frozen",
        )
        need(
            not self.only or self.shared != "all",
            "blocks.shared = all needs all blocks in one process: with blocks.only take owned or frozen",
        )


@dataclass
class DataConfig(Section):
    """Token shards made by train/prepare_data.py."""

    path: str = ""
    """Folder of shards."""
    val_path: str = ""
    """Another folder whose validation split is scored; empty takes data.path."""
    mixture: dict[str, NotNegative] = field(default_factory=dict)
    """Weights by source; empty draws in proportion to size."""
    sequence_length: PositiveInt = 128
    """Tokens in a training sequence."""
    batch_size: Annotated[int, above(0), at_most(1 << 24)] = 16
    """Sequences in an optimizer step, over all processes."""
    micro_batch_size: Count = 0
    """Sequences in one forward pass of one process; 0 takes the whole share at once."""
    document_mask: bool = True
    """Packed documents do not attend to each other."""

    def check(self, config: Config) -> None:
        need(
            self.sequence_length <= config.model.max_seq_len,
            f"data.sequence_length = {self.sequence_length} is above model.max_seq_len = {config.model.max_seq_len}",
        )


@dataclass
class OptimConfig(Section):
    """AdamW or Muon, clipping, averaging."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything; or Muon (orthogonalised momentum) for the matrices of blocks and adapter, AdamW for the rest.
    Both take the same rate and weight decay."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay on the matrices of linear layers; norms, biases and embeddings have none."""
    ema_decay: ShareBelowOne = 0.0
    """Per-step decay of the weight average that is scored and saved beside the weights; 0 keeps none."""


@dataclass
class ScheduleConfig(Section):
    """Learning rate as a function of the share of the budget that is spent."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    """Warm-up, stable, and a linear decay to zero over the last .3 of the budget; or warm-up and half a cosine to zero; or
    warm-up and constant."""
    warmup: Share = 0.03
    """Share of the budget for the linear warm-up. Of a short one and a high rate runs die: before 3e-3 some 70 steps were
    enough where 20 were not (LOG.md), so a budget of few hundred steps wants .2."""


@dataclass
class BudgetConfig(Section):
    """When to stop; the first limit that is reached ends the run. At least one must be set."""

    flops: Annotated[float | None, above(0)] = None
    """Model FLOPs, forward and backward."""
    tokens: Annotated[float | None, above(0)] = None
    """Training tokens."""
    steps: Annotated[float | None, above(0)] = None
    """Optimizer steps."""
    seconds: Annotated[float | None, above(0)] = None
    """Seconds of training (evaluation and checkpoints not counted)."""


@dataclass
class EvalConfig(Section):
    """Held-out scoring during training."""

    points: Annotated[int, at_least(0), at_most(1 << 20)] = 5
    """Evaluations, evenly spaced over the budget, the last one at its end; 0 turns them off."""
    k: list[Annotated[int, at_least(1)]] = field(default_factory=lambda: [1, 4])
    """Numbers of core iterations to score at."""
    tokens: PositiveInt = 16_384
    """Held-out tokens scored at each evaluation."""
    draws: Annotated[int, above(0), at_most(1 << 20)] = 1
    """Noise draws averaged for one likelihood (log-mean-exp)."""

    def check(self, config: Config) -> None:
        need(bool(self.k), "eval.k must name at least one number of iterations")


@dataclass
class RunConfig(Section):
    """Where a run lives and what it leaves."""

    dir: str = ""
    """Run directory; it must not exist unless --resume or --overwrite is given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto (cuda where there is one)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 autocast on CUDA and float32 elsewhere. Weights stay float32."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """What computes attention: PyTorch's fused kernels, FlexAttention, flash-attn; auto takes the best that runs here."""
    threads: Annotated[int, at_least(0), at_most(1 << 12)] = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    activation_checkpointing: bool = False
    """Keep only the input of each backpropagated core iteration and run the iteration again in the backward: memory
    that hardly grows with depth, for about a third more time in the core."""
    compile: bool = False
    """Compile prelude, core iteration and coda with torch.compile: slower first steps (up to minutes), faster ones after."""
    peak_flops: Annotated[float | None, above(0)] = None
    """FLOPs per second that utilisation is a share of; none takes the device's from a table (bf16, dense), on a CPU the
    measured rate of a matrix product."""
    checkpoint_every: PositiveInt = 500
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""
    log_every: PositiveInt = 10
    """Optimizer steps between writes of metrics.jsonl and updates of the progress bar."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to the project recurrent_db of Weights & Biases; `wandb sync DIR/wandb/latest-run` uploads an offline run."""


@dataclass
class GuardConfig(Section):
    """When numbers blow up (docs/reliability.md)."""

    spike: NotNegative = 0.0
    """Standard deviations above its running mean at which a step's loss makes it a skipped one; 0 skips none."""


@dataclass
class ParallelConfig(Section):
    """Several processes, as torchrun starts them (docs/distributed.md)."""

    mode: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole model; fsdp: each holds its part of parameters, gradients and optimizer state
    (FSDP2). auto is ddp for several processes and none for one."""
    shard_size: Count = 0
    """fsdp: processes that share one copy of the model, 0 for all. With fewer, as many as a node has, parameters are
    gathered within a node alone, and gradients averaged over nodes (HSDP)."""
    async_checkpoints: bool = True
    """Write checkpoints of several processes in the background, from a copy of the state, while training goes on."""
    timeout: Positive = 600.0
    """Seconds without progress after which the run ends with an error that names the process that the others wait for.
    Evaluation is progress; one step, one compilation or one checkpoint must be shorter."""


@dataclass
class InitConfig(Section):
    """Where the first weights come from."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Run directory (or checkpoint) whose weights training starts from; empty draws them from the seed."""


@dataclass
class Config(Section):
    """Pretrain a looped language model. The first argument is a TOML file; dotted options override it.

    `--resume` continues the run directory from its newest checkpoint (`--resume last-good` passes over damaged ones; a
    run without checkpoints starts afresh), `--overwrite` replaces it.
    """

    seed: int = 0
    """Seed of everything random: weights, data order, depth, noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking


def rows_of_vocabulary(config: Config, tokens: int) -> int:
    """Rows of the embedding for a tokenizer of so many tokens."""
    return tokens + config.objective.own.extra_tokens


def resolve(config: Config) -> None:
    """Fill in what one choice implies for another, in place."""
    model = config.model
    if model.n_blocks > 0 and not model.block_layers and model.n_core % model.n_blocks == 0:
        model.block_layers = [model.n_core // model.n_blocks] * model.n_blocks
    config.objective.own.resolve(config)


def validate(config: Config) -> None:
    """Refuse values that cannot work, in one line each. Raises `UserError`."""
    check_bounds(config)
    check(config, config)


def load_config(path: Path | None, overrides: Sequence[str] = (), prog: str | None = None) -> Config:
    """Read a TOML file, apply dotted command-line overrides, resolve what they imply and validate.

    Raises:
        UserError: one line that names the key.
    """
    config = from_dict(Config, read_toml(path)) if path else Config()
    config = parse(Config, list(overrides), default=config, prog=prog)
    resolve(config)
    validate(config)
    return config


def config_from_json(text: str, source: str) -> Config:
    """The configuration saved beside a checkpoint. ``source`` names it in errors."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} does not hold a configuration")
    config = from_dict(Config, values)
    resolve(config)
    validate(config)
    return config
