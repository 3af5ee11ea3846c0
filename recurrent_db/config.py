"""The configuration of a run: typed dataclasses, read from TOML, overridden by dotted options.

``load_config(path, ["--optim.lr", "3e-4"])`` is what every script calls. Unknown keys are refused with a
suggestion, values are checked by ``validate``, and the resolved result is saved beside the weights as JSON.
Shares are fractions of the budget, so that one file serves any budget.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from recurrent_db.arguments import parse
from recurrent_db.errors import UserError

T = TypeVar("T")

ObjectiveName = Literal["next_token", "unrolled", "denoise", "denoise_paper", "one_step", "masked"]
WALKS = ("denoise", "denoise_paper")
"""Objectives that denoise the token itself and walk down noise levels at inference."""
AttentionName = Literal["auto", "sdpa", "flex", "flash"]


@dataclass
class ModelConfig:
    """Shape of the network: prelude -> core x K -> coda."""

    vocab_size: int = 0
    """Rows of the embedding table; 0 takes the tokenizer's."""
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Attention heads; must divide d_model into an even head size."""
    n_prelude: int = 1
    """Blocks before the recurrence."""
    n_core: int = 2
    """Blocks of the weight-tied core."""
    n_coda: int = 1
    """Blocks after the recurrence."""
    d_mlp: int = 352
    """Hidden width of the gated MLP (gate and up each have this many columns)."""
    max_seq_len: int = 128
    """Longest context in tokens that scoring and generation use."""
    injection: Literal["linear", "diagonal", "add"] = "linear"
    """How the core sees the prelude's output: Huginn's linear adapter on [state, e], a per-channel decay on the state
    plus a projection of e (Parcae, arXiv 2604.12946), or a plain sum."""
    silent_state: bool | None = None
    """Start the linear adapter's half for the state at zero, so that iterations after the first begin as repetitions of it;
    None lets the objective decide (one_step does)."""
    noise_conditioning: bool | None = None
    """AdaLN on the core from the noise level; None lets the objective decide."""
    separate_targets: bool | None = None
    """A table of clean targets beside the embedding; None lets the objective decide."""
    d_condition: int = 128
    """Width of the noise embedding."""
    expected_depth: int = 32
    """Mean recurrence r that scales the output projections at initialisation."""
    rope_base: float = 50_000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    n_blocks: int = 0
    """DiffusionBlocks: cut the n_core layers, run once and not looped, into so many blocks that train alone, each for its
    own range of noise levels; 0 is the looped model. See docs/blocks.md."""
    block_layers: list[int] = field(default_factory=list)
    """Layers of each block, the first for the highest noise; empty splits n_core evenly."""


@dataclass
class UnrolledConfig:
    """Huginn's training: sampled depth, truncated backpropagation through time."""

    mean_depth: int = 32
    """Mean r of the log-normal Poisson depth sampler, in core iterations."""
    depth_sigma: float = 0.5
    """Standard deviation s of ln(depth) in the sampler."""
    truncation: int = 8
    """Iterations at the end that carry gradient; 0 backpropagates through all of them (full BPTT)."""


@dataclass
class OneStepConfig:
    """Next-token training first; then extra iterations, with gradient through the last one alone (docs/method.md)."""

    next_token_share: float = 0.9
    """Share of the budget that trains the first iteration alone, as `next_token` does. The rest trains extra iterations."""
    skip_core: float = 2.0
    """Length of the opening phase that skips the core, in tokens per weight of the network without it. The core's blocks
    then start as copies of the blocks around them. At most .4 of the budget. The phase is left out where it is 0 or
    shorter than .15 of the budget, where the run starts from another's weights, and where the budget is in seconds alone."""
    first_probability: float = 0.2
    """After ``next_token_share``: probability that a step trains the first iteration."""
    prior_iterations: int = 2
    """After ``next_token_share``, in the other steps: iterations without gradient before the trained one, uniform over 1
    to this."""
    corrupt_share: float = 0.0
    """Mean share of a sequence's context tokens that are replaced by random ones. About 0.1 helps where a small corpus is
    repeated; elsewhere it costs."""


@dataclass
class DenoiseConfig:
    """One noise-conditioned pass a step, the token as clean target (DiffusionBlocks, arXiv 2506.14202)."""

    density: Literal["log-normal", "log-uniform", "adaptive"] = "log-normal"
    """Law of the training noise level sigma. ``adaptive`` is fitted while training so that equal probability means equal
    decrease of the loss (time warping, CDCD, arXiv 2211.15089)."""
    p_mean: float = -0.4
    """Mean of ln sigma before truncation."""
    p_std: float = 1.0
    """Standard deviation of ln sigma before truncation."""
    sigma_min: float = 0.02
    """Smallest noise level."""
    sigma_max: float = 20.0
    """Largest noise level: where the target is invisible and the read-out is a next-token prediction."""
    atom: float = 0.5
    """Probability of drawing exactly sigma_max instead of from the density."""
    draw: Literal["batch", "sequence", "token"] = "sequence"
    """One noise level per batch, per sequence or per token."""
    conditioning: Literal["inject", "two-stream"] = "inject"
    """How z meets the context: one stream in which neighbours hold noisy targets too, or beside a clean stream, each
    position seeing clean keys and its own noisy one (the paper's concatenation)."""
    loss: Literal["cross-entropy", "l2"] = "cross-entropy"
    """Cross-entropy of the read-out, or the squared error of the estimate in embedding space plus the read-out's
    cross-entropy, whose gradient then stops at the estimate."""
    weight: Literal["uniform", "edm"] = "uniform"
    """Weight over sigma of the cross-entropy; ``edm`` is w(sigma) = (sigma^2 + sd^2) / (sigma sd)^2, as the paper prints
    it. The squared error always has it."""
    targets: Literal["tied", "separate"] = "tied"
    """Rows of the embedding, or of a table of their own."""
    sd: float = 0.0
    """Per-component standard deviation of the clean target in the preconditioning; 0 takes the true one,
    target_norm / sqrt(d_model). The paper prints 0.5."""
    mute: bool = True
    """Scale the network's view of z by target_norm^2 / (target_norm^2 + sigma^2), so that pure noise is silent."""
    target_norm: float = 1.0
    """Norm of the clean target (an L2-normalised embedding row times this)."""
    bridge: Literal["soft", "hard", "sample", "state"] = "soft"
    """From a read-out back to an estimate of the target during a walk: expected row, most likely row, sampled row; or
    the core's own output, with one read-out at the end."""
    neighbours: Literal["own", "known"] = "own"
    """What positions before i hold while i walks (one stream): their own walks, or the known tokens' targets with noise
    of the same level, as in training, at twice the cost."""
    sampler: Literal["euler", "heun", "ancestral"] = "euler"
    """Step of the walk from one noise level to the next."""
    grid: Literal["equal-probability", "karras", "log-uniform", "edges"] = "equal-probability"
    """Noise levels of a K-step walk, from sigma_max down; ``edges`` are the upper ends of K intervals of equal probability
    (of a model in B blocks at K = B: where each block's range begins)."""


PAPER_DENOISE: dict[str, Any] = {
    "density": "log-normal", "p_mean": -1.2, "p_std": 1.2, "sigma_min": 0.002, "sigma_max": 80.0, "atom": 0.0,
    "sd": 0.5, "mute": False, "target_norm": 1.0,
}  # fmt: skip
"""The constants that arXiv 2506.14202 prints; the objective `denoise_paper` sets them, whatever the file says."""


@dataclass
class ObjectiveConfig:
    """What a training step computes."""

    name: ObjectiveName = "one_step"
    """next_token (flat control), unrolled (Huginn), denoise (one noise-conditioned core pass on the noised target),
    denoise_paper (denoise with the constants that the paper prints), one_step (one pass with gradient from a state that the
    model reached itself), or masked (masked diffusion in blocks, not autoregressive; needs model.n_blocks)."""
    unrolled: UnrolledConfig = field(default_factory=UnrolledConfig)
    one_step: OneStepConfig = field(default_factory=OneStepConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)


@dataclass
class BlocksConfig:
    """How the blocks of a model with model.n_blocks share the noise and the embedding (DiffusionBlocks,
    arXiv 2506.14202)."""

    only: int = 0
    """Train this block alone (they are counted from 1, high noise first), with the memory of this block; 0 trains all in
    one process, a block drawn for each step."""
    partition: Literal["equal-probability", "uniform"] = "equal-probability"
    """Ranges of equal probability under the noise density, or of equal width in ln sigma (the control). Of objective masked
    always equal decrements of alpha."""
    gamma: float = 0.1
    """Overlap: in training each range is widened by (high/low)^gamma on both sides. Objective masked has none."""
    shared: Literal["owned", "frozen", "all"] = "owned"
    """Who trains the embedding and head that all blocks share: one block, none, or (in one process) every block."""
    owner: int = 1
    """The block that trains them where they are owned."""


@dataclass
class DataConfig:
    """Token shards made by train/prepare_data.py."""

    path: str = ""
    """Folder of shards."""
    val_path: str = ""
    """Another folder whose validation split is scored; empty takes data.path."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Weights by source; empty draws in proportion to size."""
    sequence_length: int = 128
    """Tokens in a training sequence."""
    batch_size: int = 16
    """Sequences in an optimizer step, over all processes."""
    micro_batch_size: int = 0
    """Sequences in one forward pass of one process; 0 takes the whole share at once."""
    document_mask: bool = True
    """Packed documents do not attend to each other."""
    verify: bool = True
    """Check the checksums of the shards before training."""


@dataclass
class OptimConfig:
    """AdamW or Muon, clipping, averaging."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything; or Muon (orthogonalised momentum) for the matrices of blocks and adapter, AdamW for the rest.
    Both take the same rate and weight decay."""
    lr: float = 3e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay on the matrices of linear layers; norms, biases and embeddings have none."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    ema_decay: float = 0.0
    """Per-step decay of the weight average that is scored and saved beside the weights; 0 keeps none."""
    max_skipped: int = 20
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the share of the budget that is spent."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    """Warm-up, stable, decay; or warm-up and half a cosine; or warm-up and constant."""
    warmup: float = 0.03
    """Share of the budget for the linear warm-up. Of a short one and a high rate runs die: before 3e-3 some 70 steps were
    enough where 20 were not (LOG.md), so a budget of few hundred steps wants .2."""
    decay: float = 0.3
    """Share of the budget for wsd's final linear decay."""
    final: float = 0.0
    """Final rate as a share of the peak."""


@dataclass
class BudgetConfig:
    """When to stop; the first limit that is reached ends the run. At least one must be set."""

    flops: float | None = None
    """Model FLOPs, forward and backward."""
    tokens: float | None = None
    """Training tokens."""
    steps: float | None = None
    """Optimizer steps."""
    seconds: float | None = None
    """Seconds of training (evaluation and checkpoints not counted)."""


@dataclass
class EvalConfig:
    """Held-out scoring during training."""

    points: int = 5
    """Evaluations, evenly spaced over the budget, the last one at its end; 0 turns them off."""
    k: list[int] = field(default_factory=lambda: [1, 4])
    """Numbers of core iterations to score at."""
    tokens: int = 16_384
    """Held-out tokens scored at each evaluation."""
    batch_size: int = 16
    """Sequences scored at once."""
    draws: int = 1
    """Noise draws averaged for one likelihood (log-mean-exp)."""


@dataclass
class RunConfig:
    """Where a run lives and what it leaves."""

    dir: str = ""
    """Run directory; it must not exist unless --resume or --overwrite is given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto (cuda where there is one)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 autocast on CUDA and float32 elsewhere. Weights stay float32."""
    attention: AttentionName = "auto"
    """What computes attention: PyTorch's fused kernels, FlexAttention, flash-attn; auto takes the best that runs here."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    activation_checkpointing: bool = False
    """Keep only the input of each backpropagated core iteration and run the iteration again in the backward: memory
    that hardly grows with depth, for about a third more time in the core."""
    compile: bool = False
    """Compile prelude, core iteration and coda with torch.compile: slower first steps (up to minutes), faster ones after."""
    peak_flops: float | None = None
    """FLOPs per second that utilisation is a share of; none takes the device's from a table (bf16, dense), on a CPU the
    measured rate of a matrix product."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 10
    """Optimizer steps between writes of metrics.jsonl and updates of the progress bar."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases; offline, `wandb sync DIR/wandb/latest-run` uploads the whole run later."""
    wandb_project: str = "recurrent_db"
    """Project name there."""


@dataclass
class GuardConfig:
    """When numbers blow up (docs/reliability.md). optim.max_skipped says after how many bad steps in a row."""

    rollbacks: int = 2
    """Times that a run goes back to its last good checkpoint, and on with another order of the data, before it stops."""
    spike: float = 0.0
    """Standard deviations above its running mean at which a step's loss makes it a skipped one; 0 skips none."""
    state_growth: float = 10.0
    """Growth of the state's RMS from the first to the last iteration (of the largest eval.k) that is warned of."""


@dataclass
class ParallelConfig:
    """Several processes, as torchrun starts them (docs/distributed.md)."""

    mode: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole model; fsdp: each holds its part of parameters, gradients and optimizer state
    (FSDP2). auto is ddp for several processes and none for one."""
    shard_size: int = 0
    """fsdp: processes that share one copy of the model, 0 for all. With fewer, as many as a node has, parameters are
    gathered within a node alone, and gradients averaged over nodes (HSDP)."""
    async_checkpoints: bool = True
    """Write checkpoints of several processes in the background, from a copy of the state, while training goes on."""
    timeout: float = 600.0
    """Seconds without progress after which the run ends with an error that names the process that the others wait for.
    Evaluation is progress; one step, one compilation or one checkpoint must be shorter."""


@dataclass
class InitConfig:
    """Where the first weights come from."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Run directory (or checkpoint) whose weights training starts from; empty draws them from the seed."""


@dataclass
class Config:
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
# Reading and writing


MOST_INTEGER = (1 << 63) - 1

MOST: dict[str, dict[str, int]] = {
    "model": {"vocab_size": 1 << 24, "d_model": 1 << 17, "d_mlp": 1 << 20, "n_heads": 1 << 12, "n_prelude": 1024,
              "n_core": 1024, "n_coda": 1024, "max_seq_len": 1 << 24, "d_condition": 1 << 16, "expected_depth": 1 << 20},
    "objective.one_step": {"prior_iterations": 1 << 14},
    "objective.unrolled": {"mean_depth": 1 << 14, "depth_sigma": 2, "truncation": 1 << 20},
    "data": {"batch_size": 1 << 24},
    "eval": {"points": 1 << 20, "batch_size": 1 << 20, "draws": 1 << 20},
    "optim": {"max_skipped": 1 << 31},
    "run": {"threads": 1 << 12},
}  # fmt: skip
"""Largest values, far above any that is used: a configuration may come from a stranger, and is checked before anything is
made of it."""


def _places(key: str, kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the configuration whose last part is ``key``."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _places(key, typing.cast(type, hint), f"{prefix}{_key(name)}.")
        elif _key(name) == key:
            yield prefix + key


def _suggest(key: str, known: Sequence[str]) -> str:
    """Where a key of that name is, or which of the ``known`` is written most like it."""
    if places := list(_places(key, Config)):
        return f"; did you mean {' or '.join(map(repr, places))}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Check a TOML or JSON value against a field's type. An int is accepted for a float, and 4e6 for an int."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config key {where} is a table, not {value!r}")
        return from_dict(typing.cast(type, kind), value, where + ".")
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _convert(value, choices[0], where)
    if origin is Literal:
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"config key {where} = {value!r} is none of {', '.join(map(str, choices))}{hint}")
        return value
    if origin is types.UnionType:
        return None if value is None else _convert(value, choices[0], where)
    if origin is list and isinstance(value, list):
        return [_convert(item, choices[0], where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): _convert(item, choices[1], where) for name, item in value.items()}
    if isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise UserError(f"config key {where} is a whole number of more than 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(kind, type) or not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        name = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
        raise UserError(f"config key {where} = {value!r} must be of type {name}")
    return value


def _key(name: str) -> str:
    return name.rstrip("_")  # `from_` is written `from`


def from_dict(kind: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Build the dataclass ``kind`` from nested tables.

    Raises:
        UserError: for an unknown key (with a suggestion) or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {_key(f.name): f.name for f in dataclasses.fields(typing.cast(Any, kind))}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown config key {prefix + key!r}{_suggest(key, list(fields))}")
    return kind(**{fields[key]: _convert(value, hints[fields[key]], prefix + key) for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: nested tables of plain values, ready for JSON."""
    return {
        _key(f.name): to_dict(value) if dataclasses.is_dataclass(value := getattr(config, f.name)) else value
        for f in dataclasses.fields(config)
    }


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises `UserError` when it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None


def load_config(path: Path | None, overrides: Sequence[str] = (), prog: str | None = None) -> Config:
    """Read a TOML file, apply dotted command-line overrides, resolve the objective's preset and validate.

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
    validate(config)
    return config


def rows_of_vocabulary(config: Config, tokens: int) -> int:
    """Rows of the embedding for a tokenizer of so many tokens: those, and the mask of masked diffusion."""
    return tokens + (config.objective.name == "masked")


def resolve(config: Config) -> None:
    """Fill in what one choice implies for another, in place."""
    if config.objective.name == "denoise_paper":
        default = DenoiseConfig()
        for name, value in PAPER_DENOISE.items():
            given = getattr(config.objective.denoise, name)
            if given not in (getattr(default, name), value):
                raise UserError(
                    f"objective.denoise.{name} = {given} contradicts objective.name = denoise_paper, which fixes it at"
                    f" {value}; name the objective denoise to choose"
                )
        config.objective.denoise = dataclasses.replace(config.objective.denoise, **PAPER_DENOISE)
    if config.model.silent_state is None:
        config.model.silent_state = config.objective.name == "one_step"
    if config.model.noise_conditioning is None:
        config.model.noise_conditioning = config.objective.name in (*WALKS, "masked")
    if config.model.n_blocks and not config.model.block_layers and config.model.n_core % config.model.n_blocks == 0:
        config.model.block_layers = [config.model.n_core // config.model.n_blocks] * config.model.n_blocks
    if config.model.separate_targets is None:
        separate = config.objective.denoise.targets == "separate"
        config.model.separate_targets = separate and config.objective.name in WALKS


def _validate_blocks(config: Config, need: Callable[[bool, str], None]) -> None:
    """The part of `validate` that is about blocks."""
    model, blocks, name = config.model, config.blocks, config.objective.name
    n = model.n_blocks
    if not n:
        need(n == 0, f"model.n_blocks must be 0 or more, got {n}")
        need(not blocks.only, f"blocks.only = {blocks.only} needs a model in blocks: set model.n_blocks")
        need(not model.block_layers, "model.block_layers needs model.n_blocks")
        need(name != "masked", "objective masked needs a model in blocks: set model.n_blocks (1 for end-to-end)")
        return
    need(n > 0, f"model.n_blocks must be 0 or more, got {n}")
    need(
        bool(model.block_layers),
        f"model.n_core = {model.n_core} layers do not split evenly into {n} blocks: give model.block_layers",
    )
    need(
        len(model.block_layers) == n and sum(model.block_layers) == model.n_core and min(model.block_layers) >= 1,
        f"model.block_layers = {model.block_layers} must name {n} blocks of 1 layer or more, {model.n_core} in all",
    )
    need(
        model.n_prelude == model.n_coda == 0,
        "a model in blocks has no prelude and no coda: set model.n_prelude = model.n_coda = 0",
    )
    need(
        name in (*WALKS, "masked"),
        f"objective {name} cannot train a model in blocks: take denoise or masked, or model.n_blocks = 0",
    )
    need(
        name == "masked" or config.objective.denoise.conditioning == "two-stream",
        "a model in blocks needs objective.denoise.conditioning = two-stream",
    )
    need(0 <= blocks.only <= n, f"blocks.only must be 0 (all) or a block from 1 to {n}, got {blocks.only}")
    need(1 <= blocks.owner <= n, f"blocks.owner must be a block from 1 to {n}, got {blocks.owner}")
    need(0 <= blocks.gamma < 1, f"blocks.gamma must be in [0, 1), got {blocks.gamma}")
    need(
        blocks.only in (0, blocks.owner) or blocks.shared != "owned" or bool(config.init.from_),
        f"block {blocks.only} does not train the embedding, which block {blocks.owner} owns: give that block's run with"
        " --init.from, or set blocks.shared = frozen",
    )
    need(
        not blocks.only or blocks.shared != "all",
        "blocks.shared = all needs all blocks in one process: with blocks.only take owned or frozen",
    )


def validate(config: Config) -> None:
    """Refuse values that cannot work, in one line each. Raises `UserError`."""
    model, denoise, unrolled, data = config.model, config.objective.denoise, config.objective.unrolled, config.data

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    def positive(section: Any, prefix: str, *names: str) -> None:
        for name in names:
            value = getattr(section, name)
            need(value is None or value > 0, f"{prefix}.{name} must be above 0, got {value}")
            need(not isinstance(value, float) or math.isfinite(value), f"{prefix}.{name} must be finite, got {value}")

    for section, most in MOST.items():
        values: Any = config
        for part in section.split("."):
            values = getattr(values, part)
        for name, largest in most.items():
            value = getattr(values, name)
            need(value <= largest, f"{section}.{name} must be at most {largest}, got {value}")
    positive(model, "model", "d_model", "n_heads", "n_core", "d_mlp", "max_seq_len", "d_condition", "expected_depth",
             "rope_base", "norm_eps")  # fmt: skip
    need(model.vocab_size >= 0, f"model.vocab_size must be 0 (the tokenizer's) or more, got {model.vocab_size}")
    need(min(model.n_prelude, model.n_coda) >= 0, "model.n_prelude and model.n_coda must be 0 or more")
    need(
        model.d_model % model.n_heads == 0,
        f"model.d_model = {model.d_model} is not divisible by model.n_heads = {model.n_heads}",
    )
    need(
        model.d_model // model.n_heads % 2 == 0,
        f"the head size {model.d_model // model.n_heads} (model.d_model / model.n_heads) must be even for RoPE",
    )
    need(
        config.objective.name not in WALKS or model.noise_conditioning is not False,
        f"objective {config.objective.name} needs model.noise_conditioning = true",
    )
    need(
        config.objective.name not in WALKS or bool(model.separate_targets) == (denoise.targets == "separate"),
        f"objective.denoise.targets = {denoise.targets} contradicts model.separate_targets = {model.separate_targets}",
    )
    need(
        denoise.conditioning == "inject" or denoise.neighbours == "own",
        "objective.denoise.neighbours = known belongs to conditioning = inject; two-stream never sees neighbours' noise",
    )
    _validate_blocks(config, need)
    positive(unrolled, "objective.unrolled", "mean_depth")
    need(unrolled.depth_sigma >= 0, f"objective.unrolled.depth_sigma must be 0 or more, got {unrolled.depth_sigma}")
    need(unrolled.truncation >= 0, f"objective.unrolled.truncation must be 0 or more, got {unrolled.truncation}")
    one_step = config.objective.one_step
    for name in ("next_token_share", "first_probability", "corrupt_share"):
        need(
            0 <= getattr(one_step, name) <= 1,
            f"objective.one_step.{name} must be in [0, 1], got {getattr(one_step, name)}",
        )
    need(one_step.skip_core >= 0, f"objective.one_step.skip_core must be 0 or more, got {one_step.skip_core}")
    need(
        one_step.corrupt_share <= 0.5,
        f"objective.one_step.corrupt_share must be at most 0.5 (rates reach twice it), got {one_step.corrupt_share}",
    )
    positive(one_step, "objective.one_step", "prior_iterations")
    positive(denoise, "objective.denoise", "p_std", "sigma_min", "sigma_max", "target_norm")
    need(
        denoise.sigma_min < denoise.sigma_max,
        f"objective.denoise.sigma_min = {denoise.sigma_min} must be below sigma_max = {denoise.sigma_max}",
    )
    low, high = (
        0.5 * math.erfc((denoise.p_mean - math.log(s)) / (denoise.p_std * math.sqrt(2)))
        for s in (denoise.sigma_min, denoise.sigma_max)
    )
    need(
        high - low > 1e-6
        or not (denoise.density == "log-normal" or (model.n_blocks and denoise.density == "adaptive")),
        f"objective.denoise: log-normal({denoise.p_mean}, {denoise.p_std}) has no mass in"
        f" [{denoise.sigma_min}, {denoise.sigma_max}]",
    )
    need(0 <= denoise.atom <= 1, f"objective.denoise.atom must be in [0, 1], got {denoise.atom}")
    need(denoise.sd >= 0, f"objective.denoise.sd must be 0 (the true one) or more, got {denoise.sd}")
    positive(data, "data", "sequence_length", "batch_size")
    need(data.micro_batch_size >= 0, f"data.micro_batch_size must be 0 or more, got {data.micro_batch_size}")
    need(
        data.sequence_length <= model.max_seq_len,
        f"data.sequence_length = {data.sequence_length} is above model.max_seq_len = {model.max_seq_len}",
    )
    for name, weight in data.mixture.items():
        need(weight >= 0, f"data.mixture.{name} must be 0 or more, got {weight}")
    optim, schedule, run = config.optim, config.schedule, config.run
    positive(optim, "optim", "lr", "eps", "clip_norm", "max_skipped")
    for name in ("beta1", "beta2", "ema_decay"):
        need(0 <= getattr(optim, name) < 1, f"optim.{name} must be in [0, 1), got {getattr(optim, name)}")
    need(optim.weight_decay >= 0, f"optim.weight_decay must be 0 or more, got {optim.weight_decay}")
    for name in ("warmup", "decay", "final"):
        need(0 <= getattr(schedule, name) <= 1, f"schedule.{name} must be in [0, 1], got {getattr(schedule, name)}")
    positive(config.budget, "budget", "flops", "tokens", "steps", "seconds")
    need(config.eval.points >= 0, f"eval.points must be 0 or more, got {config.eval.points}")
    positive(config.eval, "eval", "tokens", "batch_size", "draws")
    need(bool(config.eval.k), "eval.k must name at least one number of iterations")
    need(min(config.eval.k) >= 1, f"eval.k must be 1 or more, got {min(config.eval.k)}")
    positive(run, "run", "checkpoint_every", "keep", "log_every", "peak_flops")
    need(run.threads >= 0, f"run.threads must be 0 or more, got {run.threads}")
    shard_size = config.parallel.shard_size
    need(shard_size >= 0, f"parallel.shard_size must be 0 (all processes) or more, got {shard_size}")
    positive(config.parallel, "parallel", "timeout")
    positive(config.guard, "guard", "state_growth")
    for name in ("rollbacks", "spike"):
        value = getattr(config.guard, name)
        need(0 <= value < math.inf, f"guard.{name} must be 0 or more and finite, got {value}")
