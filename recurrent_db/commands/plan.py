"""`recurrent-db plan`: what a training run takes, before it starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from recurrent_db.arguments import parse
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError

if TYPE_CHECKING:
    from recurrent_db.accounting.plan import Planner


@dataclass
class Args:
    """Memory per GPU by part, communication and time of a training run, before it is started.

    Dotted options override the file, as they do for the trainer: --data.micro-batch-size 2, --budget.tokens 1e11.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    gpus: int
    """GPUs, over all nodes."""
    gpu: str
    """Their name: H100, H200, B200, A100, ..."""
    mfu: float = 0.4
    """Share of the bf16 peak that a step's model FLOPs reach while nothing waits for the network."""
    gpus_per_node: int = 8
    """GPUs that the faster links join."""
    intra_node: float | None = None
    """GB/s of a GPU's links within a node, one way; none takes the table's."""
    inter_node: float | None = None
    """GB/s of a GPU's share of its node's network, one way; none takes the table's."""
    link_utilisation: float = 0.8
    """Share of a link's line rate that collectives reach."""
    vocab_size: int = 2048
    """Vocabulary where the config takes the tokenizer's."""
    json: bool = False
    """Print JSON instead of tables."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Dotted options; filled from the command line."""


def arguments(words: list[str], prog: str) -> Args:
    own, dotted = split_dotted(words)
    args = parse(Args, own, prog=prog)
    args.overrides = dotted
    return args


def split_dotted(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The command's own options, and those of the configuration: with a dot in the name, or ``--seed``, values included."""
    own: list[str] = []
    dotted: list[str] = []
    into = own
    for word in words:
        if word.startswith("--"):
            into = dotted if "." in word.split("=")[0] or word.split("=")[0] == "--seed" else own
        into.append(word)
    return own, tuple(dotted)


def make_planner(args: Args) -> Planner:
    """Check the command line and read the configuration. Raises `UserError`."""
    from recurrent_db.accounting.plan import DRAWS, Cluster, Network, Planner, find_gpu
    from recurrent_db.objectives import build_objective, drawn_passes

    check(args)
    name, gpu, peak = find_gpu(args.gpu)
    config = load_config(args.config, list(args.overrides))
    config.model.vocab_size = config.model.vocab_size or args.vocab_size
    check_parallel(config, args.gpus)
    intra = gpu.intra if args.intra_node is None else 1e9 * args.intra_node
    inter = gpu.inter if args.inter_node is None else 1e9 * args.inter_node
    network = Network(intra, inter, args.gpus_per_node, args.link_utilisation)
    return Planner(
        config,
        Cluster(name, gpu, peak, args.mfu, network),
        drawn=drawn_passes(config, DRAWS),
        inference=build_objective(config).recurrence.passes,
    )


def check(args: Args) -> None:
    """Refuse numbers that cannot be. Raises `UserError`."""
    if args.gpus < 1:
        raise UserError(f"--gpus must be 1 or more, got {args.gpus}")
    for option, value in (
        ("--mfu", args.mfu), ("--link-utilisation", args.link_utilisation), ("--intra-node", args.intra_node),
        ("--inter-node", args.inter_node), ("--gpus-per-node", args.gpus_per_node), ("--vocab-size", args.vocab_size),
    ):  # fmt: skip
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{option} must be above 0, got {value}")
    if max(args.mfu, args.link_utilisation) > 1:
        raise UserError("--mfu and --link-utilisation are shares: at most 1")


def check_parallel(config: Config, gpus: int) -> None:
    """Refuse what the trainer would refuse on so many GPUs. Raises `UserError`."""
    parallel = config.parallel
    if parallel.mode == "none" and gpus > 1:
        raise UserError(f"parallel.mode = none is one process, and there are {gpus} GPUs: take ddp or fsdp")
    if parallel.shard_size and parallel.mode != "fsdp":
        raise UserError(f"parallel.shard_size belongs to parallel.mode = fsdp, not {parallel.mode}")
    if parallel.shard_size and gpus % parallel.shard_size:
        raise UserError(f"parallel.shard_size = {parallel.shard_size} does not divide {gpus} GPUs")
    if parallel.mode == "fsdp" and config.optim.name == "muon":
        raise UserError("optim.name = muon needs whole matrices: take parallel.mode = ddp, or adamw")
    if config.data.batch_size % gpus:
        raise UserError(f"data.batch_size = {config.data.batch_size} does not divide among {gpus} GPUs")


def run(args: Args) -> int:
    from recurrent_db.accounting.plan import lines, table

    planner = make_planner(args)
    if args.json:
        print(json.dumps(table(planner, args.gpus), indent=1))
    else:
        print("\n".join(lines(planner, args.gpus, str(args.config))))
    return 0
