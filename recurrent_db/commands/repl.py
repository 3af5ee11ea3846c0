"""`recurrent-db repl`: generate text interactively."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from recurrent_db.arguments import parse
from recurrent_db.errors import UserError


@dataclass
class Args:
    """Generate text from a checkpoint interactively. Each line is a prompt; /help lists the commands.

    The options set the session's initial values. Commands such as /k and /temperature change them.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    k: int = 0
    """Core iterations per token; for a denoiser, noise levels of the walk. 0 means 1 for a next_token run, 8 for others."""
    temperature: float = 1.0
    """Sampling temperature. 0 always takes the most likely token; 1 samples the model's own distribution."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens whose total probability reaches this; 1 means all."""
    min_p: float = 0.0
    """Sample among tokens with at least this fraction of the most likely token's probability; 0 means all."""
    seed: int = 0
    """Seed of sampling. The same prompt with the same seed gives the same text."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text already contains become less likely; 1 has no effect."""
    max_new_tokens: int = 64
    """Most tokens to add to a prompt."""
    sampler: str = "sequential"
    """Decoding strategy: sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or diagonal-unverified[:INNER]. The
    command /sampler explains them."""
    cache_policy: str = "full"
    """Which iterations' keys and values the cache keeps: full, last or modulo-S (recurrent_db/generation/cache.py)."""
    exit: str | None = None
    """Early exit: kl, entropy or latent, with an optional threshold, such as kl:1e-3. A token's iterations stop when an
    iteration changes its prediction (latent: its state) by less than the threshold. By default all K iterations run."""
    warm_start: bool = False
    """Start each token's iterations from the last state of the previous token."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:N, or auto (CUDA if available)."""
    compile: bool = False
    """Compile decoding with torch.compile. The first text waits for the compilation."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.generation.options import GenerationOptions
    from recurrent_db.objectives import build_objective
    from recurrent_db.repl.console import is_terminal, open_lines, remark
    from recurrent_db.repl.session import ACTIONS, SETTINGS, Session, check
    from recurrent_db.store.loading import load_with_config

    given = {f.name: getattr(args, f.name) for f in fields(GenerationOptions) if hasattr(args, f.name)}
    options = GenerationOptions(**{**given, "k": args.k or 8})  # report mistakes before the slow load
    check(options)
    model, tokenizer, config, path = load_with_config(args.run, args.device)
    if args.compile:
        model.compile_decoding()
    if not args.k and build_objective(config).flat:
        options = replace(options, k=1)
    check(options, model)
    if config.blocks.only and (config.blocks.only, options.k) != (1, 1):  # block 1 by itself is a model of K = 1
        raise UserError(
            f"{args.run} holds only block {config.blocks.only} of {config.model.n_blocks}: join the runs of all blocks"
            " with recurrent-db blocks join"
        )
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    session = Session(model, tokenizer, options, str(path))
    lines = open_lines([f"/{word}" for word in (*SETTINGS, *ACTIONS)])
    if is_terminal(sys.stdin):
        millions = model.parameter_counts()["total"] / 1e6
        remark(
            f"{path}: {config.objective.name}, {millions:.3g}M parameters, context {config.model.max_seq_len} tokens,"
            f" {model.embedding.weight.device}; k {options.k}. /help lists the commands."
        )
    session.run(lines)
    return 0
