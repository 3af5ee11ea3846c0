"""`recurrent-db plan`: memory, communication and time of a training run, before it starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from recurrent_db.arguments import parse
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError
from recurrent_db.schema import PositiveInt, above, at_most

if TYPE_CHECKING:
    from recurrent_db.accounting.plan import Planner


PositiveShare = Annotated[float, above(0), at_most(1)]


@dataclass
class Args:
    """Estimate a training run before it starts: memory per GPU by part, communication and time.

    Dotted options override the file, as in training: --data.micro-batch-size 2, --budget.tokens 1e11.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    gpus: PositiveInt
    """Number of GPUs over all nodes."""
    gpu: str
    """Name of the GPU: H100, H200, B200, A100, ..."""
    mfu: PositiveShare = 0.4
    """Share of the GPU's bf16 peak that a step reaches while it does not wait for the network (0 to 1)."""
    gpus_per_node: PositiveInt = 8
    """GPUs in one node, joined by the faster links."""
    intra_node: Annotated[float | None, above(0)] = None
    """Bandwidth of a GPU's links within its node, in GB/s one way. The default is the GPU's published value."""
    inter_node: Annotated[float | None, above(0)] = None
    """Bandwidth of a GPU's share of its node's network, in GB/s one way. The default is a common value for the GPU."""
    link_utilisation: PositiveShare = 0.8
    """Share of a link's line rate that collectives reach (0 to 1)."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size in tokens, used if the config leaves it to the tokenizer."""
    json: bool = False
    """Print JSON instead of tables."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Dotted options, filled in by `arguments`."""


def arguments(words: list[str], prog: str) -> Args:
    own, dotted = split_dotted(words)
    args = parse(Args, own, prog=prog)
    args.overrides = dotted
    return args


def split_dotted(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split the words into the command's own options and the configuration's, each with its values.

    The configuration's options are ``--seed`` and every option with a dot in its name.
    """
    own: list[str] = []
    dotted: list[str] = []
    into = own
    for word in words:
        if word.startswith("--"):
            into = dotted if "." in word.split("=")[0] or word.split("=")[0] == "--seed" else own
        into.append(word)
    return own, tuple(dotted)


def make_planner(args: Args) -> Planner:
    """The planner for a command line. Raises `UserError` for a bad option or configuration."""
    from recurrent_db.accounting.plan import DRAWS, Cluster, Network, Planner, find_gpu
    from recurrent_db.objectives import build_objective, drawn_passes

    name, gpu, peak = find_gpu(args.gpu)
    config = load_config(args.config, list(args.overrides))
    if config.model.network != "language":
        raise UserError(f"plan knows language models only, and {args.config} trains on images: see recurrent-db flops")
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


def check_parallel(config: Config, gpus: int) -> None:
    """Raise `UserError` for a configuration that the trainer would refuse on this number of GPUs."""
    parallel = config.parallel
    if parallel.mode == "none" and gpus > 1:
        raise UserError(f"parallel.mode = none runs one process, but --gpus is {gpus}: use ddp or fsdp")
    if parallel.shard_size and parallel.mode != "fsdp":
        raise UserError(f"parallel.shard_size needs parallel.mode = fsdp, not {parallel.mode}")
    if parallel.shard_size and gpus % parallel.shard_size:
        raise UserError(f"parallel.shard_size = {parallel.shard_size} does not divide {gpus} GPUs")
    if parallel.mode == "fsdp" and config.optim.name == "muon":
        raise UserError("optim.name = muon does not run on sharded matrices: use parallel.mode = ddp or adamw")
    if config.data.batch_size % gpus:
        raise UserError(f"data.batch_size = {config.data.batch_size} is not a multiple of {gpus} GPUs")


def run(args: Args) -> int:
    from recurrent_db.accounting.plan import table
    from recurrent_db.accounting.plan_text import lines

    planner = make_planner(args)
    if args.json:
        print(json.dumps(table(planner, args.gpus), indent=1))
    else:
        print("\n".join(lines(planner, args.gpus, str(args.config))))
    return 0
