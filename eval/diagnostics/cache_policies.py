"""Measure what a smaller key-value cache costs in likelihood: NLL of held-out text under each cache policy.

python eval/diagnostics/cache_policies.py RUN --data DIR [--k 4,8,16] [--policies full,modulo-4,modulo-2,last] [--json OUT]

Each window of held-out text is read as one document, one true token at a time, from the cache, as generation reads. All
policies use the same noise draw. recurrent_db/generation/cache.py says what each policy keeps; `full` gives the same NLL as
reading the window at once. The difference to the first policy is paired: same windows, same noise. Its standard error is
over windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from recurrent_db.arguments import Names, run_command  # before torch: sets how idle threads wait

# isort: split
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from recurrent_db.accounting.flops import cache_numbers_per_token, visits_kept
from recurrent_db.data import Batch, open_data, validation_batches
from recurrent_db.files import check_output, write_atomic
from recurrent_db.generation.cache import Cache
from recurrent_db.model import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import Count, PositiveInt
from recurrent_db.store.loading import load_with_config


@dataclass
class Args:
    """Score a run's newest good checkpoint token by token under several cache policies."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder made by train/prepare_data.py with the run's tokenizer. Its validation split is scored."""
    k: tuple[PositiveInt, ...] = (4, 8, 16)
    """Values of K (core iterations)."""
    policies: Names = ("full", "modulo-4", "modulo-2", "last")
    """Cache policies. The others are compared with the first."""
    tokens: Count = 16384
    """Number of held-out tokens to score, spread evenly over the split; 0 scores all of it."""
    batch_size: PositiveInt = 32
    """Windows in a batch."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    json: Path | None = None
    """File for the result."""


@torch.inference_mode()
def nll_by_window(model: LoopedLM, batch: Batch, k: int, policy: str, seed: int) -> Tensor:
    """Mean NLL of each window in nats per token, read token by token, fp64 (B,)."""
    device = model.embedding.weight.device
    tokens_BT, targets_BT = batch.tokens_BT.to(device), batch.targets_BT.to(device)
    cache = Cache(model, len(tokens_BT), tokens_BT.shape[1], policy=policy)
    noise = NoiseSource(Rng(seed, EVALUATION_STEP), batch.sample_index_B, model.config.max_seq_len, kept={})
    recurrence, sums_B = model.recurrence.ready(model), torch.zeros(len(tokens_BT), dtype=torch.float64, device=device)
    for position, token_B1 in enumerate(tokens_BT.split(1, dim=1)):
        here, visible = replace(noise, offset=position), cache.grow(1)
        e_BTD = model.encode(token_B1, visible)
        [(_, hidden_BTD)] = recurrence.hidden(model, token_B1, e_BTD, [k], here, visible=visible)
        log_p_BV = model.logits(hidden_BTD[:, 0]).float().log_softmax(-1)
        sums_B -= log_p_BV.gather(1, targets_BT[:, position, None])[:, 0]
    return sums_B.cpu() / tokens_BT.shape[1]


def mean_and_stderr(values_N: Tensor) -> tuple[float, float]:
    return values_N.mean().item(), (values_N.std() / math.sqrt(len(values_N))).item() if len(values_N) > 1 else math.nan


def measure(
    model: LoopedLM, batches: Sequence[Batch], k: int, policies: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """For each policy: NLL in nats per token, its difference to the first policy, and cache bytes per token."""
    result: dict[str, dict[str, Any]] = {}
    first_N: Tensor | None = None
    for policy in policies:
        nll_N = torch.cat([nll_by_window(model, batch, k, policy, seed) for batch in batches])
        first_N = nll_N if first_N is None else first_N
        (nll, stderr), (difference, error) = mean_and_stderr(nll_N), mean_and_stderr(nll_N - first_N)
        numbers = cache_numbers_per_token(model.config, model.recurrence.passes(k), policy)
        size = numbers * model.embedding.weight.element_size()
        result[policy] = {"nll": nll, "stderr": stderr, "difference": difference, "difference_stderr": error,
                          "bytes_per_token": size}  # fmt: skip
    return result


def main(args: Args) -> int:
    ks, policies = sorted(set(args.k)), list(dict.fromkeys(args.policies))
    for policy in policies:
        visits_kept(policy)
    if args.json is not None:
        check_output(args.json)
    model, tokenizer, config, checkpoint = load_with_config(args.run, args.device)
    data = open_data(str(args.data), "validation", expect_tokenizer_hash=tokenizer.hash, verify=True)
    batches = list(validation_batches(data, config.data.sequence_length, args.batch_size, args.tokens or None))
    count = sum(batch.tokens_BT.numel() for batch in batches)
    print(f"{checkpoint}: {config.objective.name}, {count:,} held-out tokens, read one at a time")
    print(
        f"{'K':>4} {'policy':<12} {'bytes/token':>12} {'nats/token':>11} {'stderr':>7} {'difference':>11} {'stderr':>8}"
    )
    by_k = {}
    for k in tqdm(ks, desc="scoring", unit="K", disable=None, leave=False):
        by_k[str(k)] = measure(model, batches, k, policies, args.seed)
        for policy, row in by_k[str(k)].items():
            print(
                f"{k:>4} {policy:<12} {row['bytes_per_token']:>12,} {row['nll']:>11.4f} {row['stderr']:>7.4f}"
                f" {row['difference']:>+11.4f} {row['difference_stderr']:>8.4f}",
                flush=True,
            )
    if args.json is not None:
        result = {"by_k": by_k, "tokens": count, "objective": config.objective.name, "checkpoint": str(checkpoint),
                  "seed": args.seed}  # fmt: skip
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
