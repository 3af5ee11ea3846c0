"""The configuration of a run: typed sections, read from a TOML file and overridden by dotted options.

Every script calls ``load_config(path, ["--optim.lr", "3e-4"])``. It refuses unknown keys with a suggestion and checks
values against the bounds beside their fields. The resolved configuration is saved beside the weights as JSON. Durations
within a run are shares of its budget, so one file serves any budget.
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
from recurrent_db.files import expand_shell, expand_user
from recurrent_db.model_config import ModelConfig
from recurrent_db.objective_config import OBJECTIVE_NAMES, ObjectiveConfig
from recurrent_db.schema import (
    Count,
    NotNegative,
    PathText,
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
    expand_paths,
    from_dict,
    need,
    read_toml,
    to_dict,
)


@dataclass
class BlocksConfig(Section):
    """How the blocks of a model with model.n_blocks divide the noise levels and share the embedding (DiffusionBlocks,
    arXiv 2506.14202)."""

    only: Count = 0
    """Number of the single block to train, from 1 (highest noise). The process then holds this block only, to save memory.
    0 trains all blocks in one process and draws one block for each step."""
    partition: Literal["equal-probability", "uniform"] = "equal-probability"
    """How the noise levels are divided between the blocks. equal-probability: ranges of equal probability under the noise
    density. uniform: ranges of equal width in ln sigma, as a control. Objective masked ignores this key and divides alpha
    into equal parts."""
    gamma: ShareBelowOne = 0.1
    """Overlap of neighbouring ranges: training widens each range by the factor (high/low)^gamma on both sides. Objective
    masked ignores this key."""
    shared: Literal["owned", "frozen", "all"] = "owned"
    """Who trains what the blocks share: the embedding and head. owned: block 1 only. frozen: no block. all: every block.
    Blocks of a language model then train one table together, in one process. Blocks for images have a copy each."""
    owner = 1
    """The block that trains the shared embedding and head if ``shared`` is ``owned``."""

    def check(self, config: Config) -> None:
        n, name = config.model.n_blocks, config.objective.name
        if not n:
            need(not self.only, f"blocks.only = {self.only} needs a model in blocks: set model.n_blocks above 0")
            return
        able = [other for other in OBJECTIVE_NAMES if getattr(config.objective, other).in_blocks]
        need(
            name in able,
            f"objective {name} cannot train a model in blocks: use {', '.join(able)}, or set model.n_blocks = 0",
        )
        need(0 <= self.only <= n, f"blocks.only must be 0 (all) or a block from 1 to {n}, got {self.only}")
        need(
            self.only in (0, self.owner) or self.shared != "owned" or bool(config.init.from_),
            f"block {self.only} does not train the embedding; block {self.owner} does: give the run of block {self.owner}"
            " with --init.from, or set blocks.shared = frozen",
        )
        need(
            not self.only or self.shared != "all" or config.objective.own.copies,
            "blocks.shared = all needs all blocks in one process: with blocks.only use owned or frozen",
        )


@dataclass
class DataConfig(Section):
    """Training and validation data: token shards made by train/prepare_data.py, or for an objective on images, image shards
    made by train/prepare_images.py."""

    path: PathText = ""
    """Data directory to train on."""
    val_path: PathText = ""
    """Data directory whose validation split is scored; empty uses data.path."""
    mixture: dict[str, NotNegative] = field(default_factory=dict)
    """Weight of each source in the training data. The weights need not sum to 1. Empty draws sources in proportion to their
    size."""
    sequence_length: PositiveInt = 128
    """Length of a training sequence, in tokens."""
    batch_size: Annotated[int, above(0), at_most(1 << 24)] = 16
    """Sequences or images per optimizer step, summed over all processes."""
    micro_batch_size: Count = 0
    """Sequences or images per forward pass of one process; smaller needs less memory. 0 takes the process's share of the
    batch at once."""
    document_mask: bool = True
    """Keep attention within documents where several are packed into one sequence."""
    flip: bool = False
    """Mirror each training image from left to right with probability 1/2."""
    crop_padding: Count = 0
    """Pad each training image with this many black pixels on every side, and cut a random part of the original size. 0 does
    not crop."""

    def check(self, config: Config) -> None:
        need(
            self.sequence_length <= config.model.max_seq_len,
            f"data.sequence_length = {self.sequence_length} is above model.max_seq_len = {config.model.max_seq_len}",
        )


@dataclass
class OptimConfig(Section):
    """The optimizer, and the average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """Which optimizer trains the weights. adamw: AdamW for all. muon: Muon (orthogonalised momentum) for the matrices of the
    layers and the adapter, AdamW for the rest. Both use the same learning rate and weight decay."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of the matrices of linear layers. Norms, biases and embeddings do not decay."""
    ema_decay: ShareBelowOne = 0.0
    """Decay per step of the exponential moving average of the weights, which is scored and saved beside them; 0 keeps no
    average."""


@dataclass
class ScheduleConfig(Section):
    """The learning rate as a function of the share of the budget spent so far."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    """Shape of the learning rate after the linear warm-up. wsd: constant, then linear to zero over the last 0.3 of the
    budget. cosine: half a cosine down to zero. constant: no decay."""
    warmup: Share = 0.03
    """Length of the linear warm-up, as a share of the budget. A high rate after a short warm-up makes runs diverge: before a
    rate of 3e-3, 70 steps were enough and 20 were not (docs/notebook.md). Use about 0.2 for a few hundred steps."""


@dataclass
class BudgetConfig(Section):
    """When training stops: at the first limit that it reaches. At least one limit must be set."""

    flops: Annotated[float | None, above(0)] = None
    """Limit in model FLOPs, forward and backward."""
    tokens: Annotated[float | None, above(0)] = None
    """Limit in training tokens."""
    steps: Annotated[float | None, above(0)] = None
    """Limit in optimizer steps."""
    seconds: Annotated[float | None, above(0)] = None
    """Limit in seconds of training, without evaluation and checkpoints."""


@dataclass
class EvalConfig(Section):
    """Scoring on held-out data during training."""

    points: Annotated[int, at_least(0), at_most(1 << 20)] = 5
    """Number of evaluations, evenly spaced over the budget; the last is at its end. 0 turns evaluation off."""
    k: list[Annotated[int, at_least(1)]] = field(default_factory=lambda: [1, 4])
    """Numbers of core iterations K at which to score; for a ViT in blocks, numbers of steps of the walk."""
    tokens: PositiveInt = 16_384
    """Held-out tokens per evaluation. An image counts as its positions: its patches, and in a ViT the token of the class."""
    draws: Annotated[int, above(0), at_most(1 << 20)] = 1
    """Noise draws per likelihood; their probabilities are averaged (log-mean-exp)."""

    def check(self, config: Config) -> None:
        need(bool(self.k), "eval.k must list at least one number of iterations")


@dataclass
class RunConfig(Section):
    """Where a run is stored, what it runs on, and how often it writes."""

    dir: PathText = ""
    """Run directory. It must not exist unless --resume or --overwrite is given."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1, or auto (cuda if available, else cpu)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass. auto: bfloat16 autocast on CUDA, float32 elsewhere. Weights stay float32."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """What computes attention. sdpa: PyTorch's fused kernels. flex: FlexAttention. flash: flash-attn. auto: the first of
    flash, flex and sdpa that suits the device and the run."""
    threads: Annotated[int, at_least(0), at_most(1 << 12)] = 0
    """Number of CPU threads; 0 keeps PyTorch's choice."""
    activation_checkpointing: bool = False
    """Store only the input of each core pass with gradient, and compute the pass again in the backward. Memory then hardly
    grows with depth; the core takes about a third more time."""
    compile: bool = False
    """Compile prelude, core and coda with torch.compile. The first steps take up to minutes; later steps are faster."""
    peak_flops: Annotated[float | None, above(0)] = None
    """Peak FLOPs per second of the device, from which utilisation (MFU) is computed. None takes the value from a table
    (dense bf16), or on a CPU measures the rate of a matrix product."""
    checkpoint_every: PositiveInt = 500
    """Optimizer steps between checkpoints. One is always written at the end."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep, the newest ones."""
    log_every: PositiveInt = 10
    """Optimizer steps between writes to metrics.jsonl and updates of the progress bar."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases, project recurrent_db. `wandb sync DIR/wandb/latest-run` uploads an offline run."""


@dataclass
class GuardConfig(Section):
    """What to do about bad steps (docs/guides/reliability.md)."""

    spike: NotNegative = 0.0
    """Skip a step whose loss is this many standard deviations above its running mean; 0 skips none for its loss."""


@dataclass
class ParallelConfig(Section):
    """Training in several processes, started by torchrun (docs/guides/several-gpus.md)."""

    mode: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes divide the model. ddp: each holds all of it. fsdp: each holds a part of parameters, gradients and
    optimizer state (FSDP2). auto: ddp for several processes, none for one."""
    shard_size: Count = 0
    """Number of processes that share one copy of the model under fsdp; 0 means all. Set it to the processes per node to
    gather parameters within each node and average gradients between nodes (HSDP)."""
    async_checkpoints: bool = True
    """Write checkpoints of several processes in the background, from a copy of the state, while training continues."""
    timeout: Positive = 600.0
    """Seconds without progress after which the run stops, with an error that names the process the others wait for. One
    step, compilation or checkpoint must take less time than this. Evaluation counts as progress."""


@dataclass
class InitConfig(Section):
    """The weights that training starts from."""

    from_: Annotated[PathText, tyro.conf.arg(name="from")] = ""
    """Run directory or checkpoint to load the initial weights from; empty draws them at random from the seed."""


@dataclass
class Config(Section):
    """Pretrain a looped language model. The first argument is a TOML file; dotted options override it.

    `--resume` continues the run from its newest checkpoint, or from the beginning if it has none. `--resume last-good` skips
    damaged checkpoints. `--overwrite` replaces the run directory.
    """

    seed: int = 0
    """Seed of all random numbers: weights, data order, depth, noise."""
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
    """Rows of the embedding table: the tokenizer's ``tokens`` plus the objective's extra tokens, such as a mask."""
    return tokens + config.objective.own.extra_tokens


def resolve(config: Config) -> None:
    """Set the fields that follow from other fields, in place."""
    model = config.model
    if model.n_blocks > 0 and not model.block_layers and model.n_core % model.n_blocks == 0:
        model.block_layers = [model.n_core // model.n_blocks] * model.n_blocks
    config.objective.own.resolve(config)


def validate(config: Config) -> None:
    """Check each value's bounds and the sections against each other. Raises `UserError`, one line."""
    check_bounds(config)
    check(config, config)


def check_readable(config: Config) -> None:
    """Check a configuration made in Python as a file is checked, so that its run can be read again. Expands ``~`` in paths.

    Raises:
        UserError: a value is invalid; one line that names the key.
    """
    expand_paths(config)
    again = from_dict(Config, to_dict(config))
    resolve(again)
    validate(again)


def load_config(path: Path | str | None, overrides: Sequence[str] = (), prog: str | None = None) -> Config:
    """Read a TOML file, apply dotted command-line options, set dependent fields and validate.

    Args:
        path: the TOML file; None starts from the defaults.
        overrides: options as on the command line, such as ``["--optim.lr", "3e-4"]``.
        prog: the program's name in ``--help``.

    Raises:
        UserError: a key is unknown or a value is invalid; one line that names the key.
    """
    config = from_dict(Config, read_toml(Path(expand_user(str(path))))) if path else Config()
    expand_paths(config, expand_shell)  # the shell has expanded the words of the command line
    config = parse(Config, list(overrides), default=config, prog=prog)
    resolve(config)
    validate(config)
    return config


def config_from_json(text: str, source: str) -> Config:
    """Read the configuration saved beside a checkpoint.

    Args:
        text: JSON.
        source: where the text comes from, for error messages.

    Raises:
        UserError: ``text`` is not JSON or not a valid configuration.
    """
    try:
        values = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} does not hold a configuration")
    config = from_dict(Config, values)
    resolve(config)
    validate(config)
    return config
