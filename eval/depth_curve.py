"""Score held-out text by number of core iterations K.

python eval/depth_curve.py RUN --data DIR [--k 1,2,4,8,16,32] [--draws 4] [--json OUT]

Prints nats per token, standard error, bits per byte and FLOPs per token for each K. If inference starts from noise, the
likelihood is averaged over --draws noise draws. K = 1 of a denoiser is its read-out at sigma_max.

--likelihood bound scores a denoiser's walk by an importance-weighted upper bound on its NLL. With few draws it is much
closer to the true value than the average is (docs/method.md). The JSON also holds the size of the state after each core pass
of the largest K.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from recurrent_db.arguments import run_command  # before torch: sets how idle threads wait

# isort: split
import torch
import tyro
from tqdm import tqdm

from recurrent_db.data import Batch, open_data, validation_batches
from recurrent_db.evaluation.likelihood import score
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import LoopedLM
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import Count, PositiveInt
from recurrent_db.store.loading import load_with_config

STATE_SEQUENCES = 8
"""Number of held-out sequences on which the size of the state is measured."""


@dataclass
class Args:
    """Score a run's newest good checkpoint on held-out text at several values of K."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder made by train/prepare_data.py with the run's tokenizer. Its validation split is scored."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations)."""
    draws: PositiveInt = 4
    """Noise draws in a likelihood."""
    likelihood: Literal["mixture", "bound"] = "mixture"
    """How a denoiser's draws are combined: mixture averages the likelihoods of the read-outs; bound gives the
    importance-sampling bound of an ancestral walk with a sampled bridge."""
    tokens: Count = 65536
    """Number of held-out tokens to score, spread evenly over the split; 0 scores all of it."""
    batch_size: PositiveInt = 16
    """Sequences in a batch."""
    seed: int = 0
    """Seed of the noise."""
    bridge: Literal["soft", "hard", "sample", "state"] | None = None
    """Bridge of a denoiser's walk, from a read-out to the next step; the run's own by default."""
    sampler: Literal["euler", "heun", "ancestral"] | None = None
    """Sampler of a denoiser's walk, which makes its steps; the run's own by default."""
    grid: Literal["equal-probability", "karras", "log-uniform", "edges"] | None = None
    """How the noise levels of a denoiser's walk are spaced; the run's own by default."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    json: Path | None = None
    """File for the result."""


@torch.no_grad()
def state_rms_by_iteration(model: LoopedLM, batches: Iterable[Batch], k: int, seed: int = 0) -> list[float]:
    """Root mean square per component of the output of each core pass in a run of ``k`` iterations, first pass first.

    For a denoiser's walk the output is the estimate D at each level, in units of the clean targets; Heun's steps make
    2 K - 1 passes. Otherwise it is the state. Uses one noise draw. The states of all passes of a batch are in memory at
    once, so batches should be small.
    """
    device = model.embedding.weight.device
    sums: list[float] = []
    count = 0
    for batch in batches:
        tokens_BT, probe = batch.tokens_BT.to(device), Probe()
        noise = NoiseSource(Rng(seed, EVALUATION_STEP), batch.sample_index_B, model.config.max_seq_len)
        for _ in model.recurrence.hidden(model, tokens_BT, model.encode(tokens_BT), [k], noise, probe):
            pass
        squares = [state_BTD.double().square().sum().item() for state_BTD in probe.states]
        sums = [a + b for a, b in zip(sums or [0.0] * len(squares), squares, strict=True)]
        count += probe.states[0].numel()
    return [math.sqrt(value / count) for value in sums]


def main(args: Args) -> int:
    ks = sorted(set(args.k))
    if args.json is not None:
        check_output(args.json)
    model, tokenizer, config, checkpoint = load_with_config(
        args.run,
        args.device,
        walk={name: getattr(args, name) for name in ("bridge", "sampler", "grid")},
    )
    data = open_data(str(args.data), "validation", expect_tokenizer_hash=tokenizer.hash, verify=True)
    batches = list(validation_batches(data, config.data.sequence_length, args.batch_size, args.tokens or None))
    bar = tqdm(batches, desc="scoring", unit="batch", disable=None, leave=False)
    scores = score(model, bar, ks, tokenizer.byte_lengths(), args.draws, args.seed, bound=args.likelihood == "bound")
    few = STATE_SEQUENCES * config.data.sequence_length
    sequences = validation_batches(data, config.data.sequence_length, 1, min(args.tokens or few, few))
    state_rms = state_rms_by_iteration(model, sequences, max(ks), args.seed)
    walk = model.recurrence.walk
    result = {
        **scores.to_json(),
        "sigma": walk.density.sigma_max if walk else None,
        "state_is": "estimate" if walk else "state",
        "state_rms_by_iteration": {
            str(number): rms if math.isfinite(rms) else None for number, rms in enumerate(state_rms, 1)
        },
        "objective": config.objective.name,
        "checkpoint": str(checkpoint),
        "likelihood": args.likelihood,
        "seed": args.seed,
    }
    how = f"{args.likelihood} of {scores.draws} draws"
    print(f"{checkpoint}: {config.objective.name}, {scores.tokens:,} held-out tokens, {how}")
    print(f"{'K':>4} {'nats/token':>11} {'stderr':>7} {'bits/byte':>10} {'FLOPs/token':>12}")
    for k, s in scores.by_k.items():
        print(f"{k:>4} {s.nll:>11.4f} {s.stderr:>7.4f} {s.bits_per_byte:>10.4f} {s.flops_per_token:>12.3e}")
    if args.json is not None:
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
