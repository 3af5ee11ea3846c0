"""Compare a denoiser's loss at each noise level of its walk with a closed form that needs no network there.

python eval/diagnostics/walk_levels.py RUN --data DIR [--k 4] [--json OUT]

z = y + sigma eps, and eps is independent of the text. An exact denoiser's read-out is therefore the next-token distribution
times exp(-|z - y_u|^2 / (2 sigma^2)), normalised (docs/method.md). The closed form takes the run's own read-out at sigma_max
as the next-token distribution.

For each level of a walk of K steps the table gives the cross-entropy of the run's read-out and of the closed form, from the
same z, and each one's share of the bound on the walk (recurrent_db/denoise/bound.py). It uses one noise draw.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from recurrent_db.arguments import run_command  # before torch: sets how idle threads wait

# isort: split
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from recurrent_db.data import Batch, open_data, validation_batches
from recurrent_db.denoise.bound import step_log_weight
from recurrent_db.denoise.sampler import ancestral
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import PositiveInt
from recurrent_db.store.loading import load_with_config


@dataclass
class Args:
    """Compare a denoiser's read-out at each level of its walk with the closed form."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder of a denoiser with a walk: denoise, denoise_paper or joined blocks."""
    data: Path
    """Folder made by train/prepare_data.py with the run's tokenizer. Its validation split is scored."""
    k: PositiveInt = 4
    """Number of noise levels of the walk."""
    tokens: PositiveInt = 16384
    """Number of held-out tokens to score, spread evenly over the split."""
    batch_size: PositiveInt = 16
    """Sequences in a batch."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    json: Path | None = None
    """File for the result."""


@dataclass
class Level:
    """Results for one noise level: means over held-out tokens, in nats."""

    sigma: float
    loss: float
    """Cross-entropy of the run's read-out. z is made from the answer, except at the first level, where it is pure noise."""
    exact_loss: float
    """Cross-entropy of the closed form."""
    share: float
    """Share of the bound on the walk. The shares of all levels sum to the bound."""
    exact_share: float
    """Share of the closed form's bound."""


@torch.no_grad()
def levels(model: LoopedLM, walk: DenoiseWalk, batches: Iterable[Batch], k: int, seed: int) -> list[Level]:
    """Results for each level of a walk of ``k`` levels, in the order of the walk."""
    rng, sigmas, rows_VD = Rng(seed, EVALUATION_STEP), walk.levels(k), walk.targets(model)
    sums, count = torch.zeros(k, 4, dtype=torch.float64), 0
    device = model.embedding.weight.device
    for batch in batches:
        tokens_BT, answers_BT = batch.tokens_BT.to(device), batch.targets_BT.to(device)
        visible = model.visible(tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(tokens_BT, visible)
        noise = NoiseSource(rng, batch.sample_index_B, model.config.max_seq_len)
        read, y_BTD = walk.reader(model, e_BTD, visible), rows_VD[answers_BT]

        def normals(stream: str, noise: NoiseSource = noise, like: Tensor = y_BTD) -> Tensor:
            return noise.normal(like.shape[1], like.shape[2], stream, like.device).to(like.dtype)

        z_BTD = normals("noise") * sigmas[0]
        prior_BTV = read(z_BTD, sigmas[0])
        for index, sigma in enumerate(sigmas):
            # All targets have the same norm, so only z.y_u differs between them.
            exact_BTV = (prior_BTV + z_BTD @ rows_VD.T / sigma**2).log_softmax(-1) if index else prior_BTV
            both = read(z_BTD, sigma), exact_BTV
            losses = [-log_p_BTV.gather(-1, answers_BT[..., None]).double().sum() for log_p_BTV in both]
            shares = losses
            if index + 1 < k:
                eps_BTD, following = normals(f"step/{index}"), sigmas[index + 1]
                shares = [
                    -step_log_weight(log_p_BTV, rows_VD, answers_BT, eps_BTD, sigma, following).double().sum()
                    for log_p_BTV in both
                ]
                z_BTD = ancestral(lambda z, sigma, y=y_BTD: y, z_BTD, sigma, following, eps_BTD)  # type: ignore[misc]
            sums[index] += torch.stack([*losses, *shares]).cpu()
        count += answers_BT.numel()
    return [Level(sigma, *values) for sigma, values in zip(sigmas, (sums / count).tolist(), strict=True)]


def main(args: Args) -> int:
    if args.json is not None:
        check_output(args.json)
    model, tokenizer, config, checkpoint = load_with_config(args.run, args.device)
    walk = model.recurrence.walk
    if walk is None:
        raise UserError(f"{args.run} is a {config.objective.name} run, which walks over no noise levels")
    data = open_data(str(args.data), "validation", expect_tokenizer_hash=tokenizer.hash, verify=True)
    batches = list(validation_batches(data, config.data.sequence_length, args.batch_size, args.tokens))
    found = levels(model, walk, tqdm(batches, "scoring", unit="batch", disable=None, leave=False), args.k, args.seed)
    tokens = sum(batch.targets_BT.numel() for batch in batches)
    print(f"{checkpoint}: {config.objective.name}, {tokens:,} held-out tokens, seed {args.seed}; nats per token")
    print(f"{'sigma':>8} {'loss':>8} {'closed form':>12} {'share':>8} {'closed form':>12}")
    for level in found:
        print(f"{level.sigma:>8.3f} {level.loss:>8.3f} {level.exact_loss:>12.3f} {level.share:>8.3f}"
              f" {level.exact_share:>12.3f}")  # fmt: skip
    whole, exact = sum(level.share for level in found), sum(level.exact_share for level in found)
    print(f"{'bound':>8} {'':>8} {'':>12} {whole:>8.3f} {exact:>12.3f}")
    if args.json is not None:
        result = {"checkpoint": str(checkpoint), "k": args.k, "tokens": tokens, "seed": args.seed, "bound": whole,
                  "exact_bound": exact, "levels": [vars(level) for level in found]}  # fmt: skip
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
