"""`recurrent-db repl`: talk to a checkpoint."""

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
    """Talk to a checkpoint: prompts in, text out as it comes. /help lists the commands.

    The values below are where the session starts; commands change them.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    k: int = 0
    """Core iterations for each token; of a denoiser, noise levels of the walk. 0: 1 for a next_token run, 8 for others."""
    temperature: float = 1.0
    """0 is greedy, 1 the model's own distribution."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens whose probability reaches this; 1 means all."""
    min_p: float = 0.0
    """Draw among tokens at least this times as likely as the most likely one; 0 means all."""
    seed: int = 0
    """The same prompt with the same seed gives the same text."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely; 1 is none."""
    max_new_tokens: int = 64
    """The most tokens to add to a prompt."""
    sampler: str = "sequential"
    """sequential, speculative[:DRAFT_K[:BLOCK]], diagonal[:INNER] or diagonal-unverified[:INNER]; /sampler explains them."""
    cache_policy: str = "full"
    """full, last or modulo-S (recurrent_db/generation/cache.py)."""
    exit: str | None = None
    """kl, entropy or latent, each with a threshold as in kl:1e-3: a token's iterations end when they change it no more."""
    warm_start: bool = False
    """Start each token's iterations from the last state of the token before it."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto (CUDA where there is one)."""
    compile: bool = False
    """Compile what each token runs (torch.compile): the first text waits for it."""


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    from recurrent_db.generation.options import GenerationOptions
    from recurrent_db.objectives import build_objective
    from recurrent_db.repl.console import is_terminal, open_lines, remark
    from recurrent_db.repl.session import ACTIONS, SETTINGS, Session, check
    from recurrent_db.store.loading import load_with_config

    given = {f.name: getattr(args, f.name) for f in fields(GenerationOptions) if hasattr(args, f.name)}
    options = GenerationOptions(**{**given, "k": args.k or 8})  # mistakes come before the loading
    check(options)
    model, tokenizer, config, path = load_with_config(args.run, args.device)
    if args.compile:
        model.compile_decoding()
    if not args.k and build_objective(config).flat:
        options = replace(options, k=1)
    check(options, model)
    if config.blocks.only and (config.blocks.only, options.k) != (1, 1):  # the first is a model of K = 1
        raise UserError(
            f"{args.run} holds block {config.blocks.only} of {config.model.n_blocks} alone: make one model of all blocks'"
            " runs with recurrent-db blocks join"
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
