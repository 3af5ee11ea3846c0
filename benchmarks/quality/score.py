"""Score a finished run for `quality/compare.py`: held-out likelihood by K, and the variety of its samples.

python benchmarks/quality/score.py RUN --data DIR --json OUT

Every run is scored on the same held-out sequences. The NLL of each sequence is saved, so that two runs can be compared
sequence by sequence. Samples continue held-out text, and the real continuation is measured beside them.

Shapes: B sequences, T positions, P prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from recurrent_db.accounting.flops import inference_cost
from recurrent_db.arguments import run_command
from recurrent_db.data import Batch, open_data, validation_batches
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import token_log_probabilities
from recurrent_db.evaluation.text_metrics import distinct, repetition
from recurrent_db.files import check_output, write_atomic
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.model import LoopedLM
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import Count, NotNegative, PositiveInt, at_least
from recurrent_db.store.loading import load_with_config
from recurrent_db.training.guard import unigram_entropy

TEXT_MOST_K = 8
"""Largest K for samples, because sampling costs K passes per token. Below it, the K with the lowest NLL is used."""


@dataclass
class Args:
    """Score a run on held-out text by K, and measure the variety of its samples."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder made by train/prepare_data.py. Its validation split is scored and continued."""
    json: Path
    """File for the result."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations)."""
    draws: PositiveInt = 2
    """Noise draws averaged in a likelihood."""
    tokens: PositiveInt = 32768
    """Number of held-out tokens to score, spread evenly over the split."""
    batch_size: PositiveInt = 16
    """Sequences in a batch."""
    prompts: PositiveInt = 32
    """Number of held-out prompts to continue. Each is a quarter of a training sequence."""
    new_tokens: Annotated[int, at_least(4)] = 64
    """Length of a continuation, in tokens. Prompt and continuation are at most a training sequence."""
    temperature: NotNegative = 1.0
    """Temperature of the samples; 1 is the model's own distribution."""
    threads: Count = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""


@torch.no_grad()
def nll_by_sequence(
    model: LoopedLM, batches: Iterable[Batch], ks: Sequence[int], draws: PositiveInt, bound: bool = False
) -> dict[int, list[float]]:
    """Mean NLL of each sequence in nats per token, by K: of the mixture over draws, or the bound (`denoise.bound`)."""
    device, rng = model.embedding.weight.device, Rng(0, EVALUATION_STEP)
    result: dict[int, list[float]] = {k: [] for k in ks}
    for batch in batches:
        tokens_BT, targets_BT = batch.tokens_BT.to(device), batch.targets_BT.to(device)
        by_k = token_log_probabilities(
            model, tokens_BT, targets_BT, ks, rng, batch.sample_index_B, draws, batch.doc_ids_BT, bound
        )
        for k, log_p_BT in by_k.items():
            result[k] += (-log_p_BT.double().mean(-1)).tolist()
    return result


def continue_prompts(model: LoopedLM, prompts_PT: Tensor, k: int, new_tokens: int, temperature: float) -> Tensor:
    """Sampled continuations, int64 (P, new_tokens), of prompts with equal length."""
    texts: list[list[int]] = [[] for _ in prompts_PT]
    options = GenerationOptions(k=k, max_new_tokens=new_tokens, temperature=temperature)
    for index, token in stream(model, prompts_PT.tolist(), options):
        texts[index].append(token)
    return torch.tensor(texts)


def text_metrics(
    model: LoopedLM, batches: Iterable[Batch], k: int, new_tokens: int, temperature: float
) -> dict[str, Any]:
    """Variety of the sampled continuations of the sequences' first quarters, and of the real continuations."""
    sequences_PT = torch.cat([batch.tokens_BT for batch in batches])
    prompt = sequences_PT.shape[1] // 4
    new_tokens = min(new_tokens, sequences_PT.shape[1] - prompt)
    texts = continue_prompts(model, sequences_PT[:, :prompt], k, new_tokens, temperature).tolist()
    real = sequences_PT[:, prompt : prompt + new_tokens].tolist()
    return {
        "distinct_2": distinct(texts, 2), "repetition": fmean(map(repetition, texts)),
        "held_out_distinct_2": distinct(real, 2), "held_out_repetition": fmean(map(repetition, real)),
        "k": k, "temperature": temperature, "prompts": len(texts), "prompt_tokens": prompt, "new_tokens": new_tokens,
    }  # fmt: skip


def main(args: Args) -> int:
    ks = sorted(set(args.k))
    check_output(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer, config, checkpoint = load_with_config(args.run, args.device)
    data, length = (
        open_data(str(args.data), "validation", expect_tokenizer_hash=tokenizer.hash),
        config.data.sequence_length,
    )
    batches = list(validation_batches(data, length, args.batch_size, args.tokens))
    by_k = nll_by_sequence(model, tqdm(batches, "scoring", unit="batch", disable=None, leave=False), ks, args.draws)
    nll = {k: sum(values) / len(values) for k, values in by_k.items()}
    if not all(map(math.isfinite, nll.values())):
        raise UserError(f"{checkpoint}: the likelihood is not finite")
    recurrence, config_model = model.recurrence, model.config
    walk = recurrence.walk
    bound = nll_by_sequence(model, batches, ks, args.draws, bound=True) if walk else {}
    n, best = len(by_k[ks[0]]), min(nll, key=lambda k: nll[k])
    lengths = torch.as_tensor(tokenizer.byte_lengths())
    bytes_per_token = sum(float(lengths[batch.targets_BT].sum()) for batch in batches) / (n * length)
    text_k = max(k for k in ks if k <= max(min(best, TEXT_MOST_K), ks[0]))
    result = {
        "nll_by_k": {str(k): value for k, value in nll.items()},
        "bound_by_k": {str(k): sum(values) / len(values) for k, values in bound.items()},
        "bits_per_byte_by_k": {str(k): value / math.log(2) / bytes_per_token for k, value in nll.items()},
        "stderr_by_k": {
            str(k): float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(n) if n > 1 else None
            for k, values in by_k.items()
        },
        "nll_by_sequence": {str(k): [round(value, 4) for value in values] for k, values in by_k.items()},
        "flops_per_token_by_k": {str(k): inference_cost(config_model, length, recurrence.passes(k)) for k in ks},
        "best_k": best, "nll_best": nll[best], "nll_sigma_max": nll.get(1) if walk else None,
        "unigram_entropy": unigram_entropy(data), "scored_tokens": n * length,
        "draws": args.draws if recurrence.stochastic else 1,
        "text": text_metrics(
            model, validation_batches(data, length, args.batch_size, args.prompts * length), text_k, args.new_tokens,
            args.temperature,
        ),
    }  # fmt: skip
    write_atomic(args.json, json.dumps(result))
    print(f"{checkpoint}: NLL {nll[best]:.4f} at K = {best}, {n * length:,} held-out tokens")
    return 0


if __name__ == "__main__":
    run_command(Args, main)
