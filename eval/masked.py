"""Score a masked-diffusion run in bits per character (by the ELBO), and sample from it.

python eval/masked.py RUN --data DIR [--draws 16] [--samples 2] [--json OUT]

Prints the bound on held-out text and each block's term of it. The text is scored in sequences of the training length. A
sequence sees no text outside itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from recurrent_db.arguments import run_command  # before torch: sets how idle threads wait

# isort: split
import torch
import tyro

from recurrent_db.data import open_data, validation_batches
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.masked import Masked, unmask
from recurrent_db.schema import Count, PositiveInt
from recurrent_db.store.loading import load_with_config


@dataclass
class Args:
    """Score a masked-diffusion run's newest good checkpoint on held-out text, and sample from it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder made by train/prepare_data.py with the run's tokenizer. Its validation split is scored."""
    draws: PositiveInt = 16
    """Number of diffusion times drawn for each block and sequence."""
    tokens: PositiveInt = 65536
    """Number of held-out tokens to score, spread evenly over the split."""
    batch_size: PositiveInt = 16
    """Sequences in a batch."""
    samples: Count = 2
    """Number of sequences to sample; 0 samples none."""
    steps: PositiveInt = 128
    """Steps of the reverse process for a sample."""
    seed: int = 0
    """Seed of times, masks and samples."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    json: Path | None = None
    """File for the result."""


def main(args: Args) -> int:
    if args.json is not None:
        check_output(args.json)
    model, tokenizer, config, checkpoint = load_with_config(args.run, args.device)
    objective, length = build_objective(config), config.data.sequence_length
    if not isinstance(objective, Masked):
        raise UserError(f"{args.run} is a {config.objective.name} run: score it with eval/depth_curve.py")
    data = open_data(str(args.data), "validation", expect_tokenizer_hash=tokenizer.hash)
    batches = list(validation_batches(data, length, args.batch_size, args.tokens))
    found = objective.elbo(model, batches, tokenizer, args.seed, args.draws)
    what = "at most" if not config.blocks.only else f"the term of block {config.blocks.only}, not a bound by itself:"
    print(
        f"{checkpoint}: {what} {found.bits_per_character:.4f} bits per character, {found.nats:.4f} nats per token"
        f" (± {found.stderr:.4f}); {found.tokens:,} held-out tokens, {args.draws} draws, seed {args.seed}"
    )
    for block, nats in found.by_block.items():
        print(f"  block {block}: {nats:.4f} nats per token")
    texts = []
    if args.samples and not config.blocks.only:
        masks = torch.full((args.samples, length), config.model.vocab_size - 1, device=model.embedding.weight.device)
        texts = [tokenizer.decode(row) for row in unmask(model, masks, args.steps, args.seed).tolist()]
        for text in texts:
            print(f"--- {text!r}")
    if args.json is not None:
        whole = {"bits_per_character": found.bits_per_character, "nats": found.nats} if not config.blocks.only else {}
        result = {
            **whole, "stderr": found.stderr, "by_block": found.by_block,
            "by_sequence": [round(nats, 4) for nats in found.by_sequence],
            "tokens": found.tokens, "characters": found.characters, "draws": args.draws,
            "seed": args.seed, "samples": texts,
        }  # fmt: skip
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
