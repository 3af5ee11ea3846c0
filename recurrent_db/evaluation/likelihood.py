"""Held-out likelihood by number of iterations K: NLL in nats per token, and bits per byte.

A model whose inference starts from noise defines a mixture over that noise,

    p(y_i | x_<=i) = E_eps[softmax(logits_K(x, eps))_y],

which is estimated from M draws with log-mean-exp. One draw of a denoiser's walk is not a likelihood, because its read-out
is nearly a point mass at the end of the walk. The estimate of -log p is too high by a term of order 1/M, so fewer draws
never make a model look better. Scoring starts from noise or zeros, never from a noised answer.

A walk of more than a few steps needs too many draws for this. ``bound`` uses the importance-weighted bound of
`denoise.bound` instead, for the ancestral walk with a sampled bridge. The bound is also too high on average. It is tight if
the denoiser is good.

Shapes: B sequences, T positions, V vocabulary, M draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from recurrent_db.accounting.flops import inference_cost
from recurrent_db.data import Batch
from recurrent_db.distributed.work_sharing import Processes
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

ONE_PROCESS = Processes()


@dataclass
class Score:
    """Held-out likelihood at one K."""

    nll: float
    """Negative log-likelihood in nats per token."""
    bits_per_byte: float
    """The same loss in bits per byte of the text of the scored tokens."""
    stderr: float
    """Standard error of ``nll`` over sequences."""
    noise_stderr: float
    """Standard error of ``nll`` over the noise, by a jackknife over the draws. It accounts for the noise that the tokens of
    a sequence share. NaN with fewer than two draws."""
    flops_per_token: float
    """Forward FLOPs per token to score one draw."""


@dataclass
class Scores:
    """Result of `score`."""

    by_k: dict[int, Score]
    tokens: int
    draws: int

    def row(self) -> dict[str, float]:
        """The scores as columns of metrics.jsonl."""
        row: dict[str, float] = {"eval/tokens": self.tokens, "eval/draws": self.draws}
        for k, result in self.by_k.items():
            row[f"eval/nll_k{k}"] = result.nll
            row[f"eval/bits_per_byte_k{k}"] = result.bits_per_byte
        return row

    def to_json(self) -> dict[str, object]:
        return {
            "by_k": {
                str(k): {name: value if math.isfinite(value) else None for name, value in asdict(s).items()}
                for k, s in self.by_k.items()
            },
            "tokens": self.tokens,
            "draws": self.draws,
        }


def token_log_probabilities(
    model: LoopedLM,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    ks: Sequence[int],
    rng: Rng,
    requests: Tensor,
    draws: int = 1,
    docs_BT: Tensor | None = None,
    bound: bool = False,
) -> dict[int, Tensor]:
    """log p(target | tokens up to its position) by K, fp32 (B, T), averaged over ``draws`` noise draws.

    Args:
        requests: int64 (B,), on the CPU. They key the noise, so that results do not depend on batches.
        draws: number of noise draws. Inference without noise runs once.
        docs_BT: int, on the CPU: the document of each position of a packed sequence. None: each sequence is one document.
        bound: as in `draw_log_probabilities`.
    """
    each = draw_log_probabilities(model, tokens_BT, targets_BT, ks, rng, requests, draws, docs_BT, bound)
    return {k: log_p_MBT.logsumexp(0) - math.log(len(log_p_MBT)) for k, log_p_MBT in each.items()}


def draw_log_probabilities(
    model: LoopedLM,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    ks: Sequence[int],
    rng: Rng,
    requests: Tensor,
    draws: int,
    docs_BT: Tensor | None = None,
    bound: bool = False,
) -> dict[int, Tensor]:
    """log p(target) by K for each of ``draws`` noise draws, fp32 (M, B, T). Inference without noise has M = 1. With
    ``bound``, walks return log w instead, where w is an importance weight whose mean is the likelihood."""
    recurrence = model.recurrence
    visible = model.visible(tokens_BT.shape[1], docs_BT)
    e_BTD = model.encode(tokens_BT, visible)
    each: dict[int, list[Tensor]] = {k: [] for k in ks}
    for draw in range(draws if recurrence.stochastic else 1):
        noise = NoiseSource(rng, requests, model.config.max_seq_len, draw)
        if bound and recurrence.walk:
            for k in each:
                log_w_BT = recurrence.walk.log_weight(model, targets_BT, e_BTD, k, noise, visible)
                each[k].append(log_w_BT.float())
            continue
        for k, hidden_BTD in recurrence.hidden(model, tokens_BT, e_BTD, ks, noise, visible=visible):
            log_p_BTV = model.logits(hidden_BTD).float().log_softmax(-1)
            each[k].append(log_p_BTV.gather(-1, targets_BT[..., None])[..., 0])
    return {k: torch.stack(log_ps) for k, log_ps in each.items()}


def leave_one_out(log_p_MBT: Tensor) -> Tensor:
    """Sum of -log p of the mixture without each draw in turn, float64 (M,), for a jackknife over draws."""
    m = len(log_p_MBT)
    others = [torch.cat((log_p_MBT[:j], log_p_MBT[j + 1 :])) for j in range(m)]
    return torch.stack([-(rest.logsumexp(0) - math.log(m - 1)).double().sum() for rest in others]).cpu()


# Number of logits in memory at once in `read_positions`, over draws, positions and vocabulary: 64 MiB in fp32.
_LOGITS_AT_ONCE = 1 << 24


def read_positions(model: LoopedLM, hidden_MND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each of N positions: log p of its target (fp32) under the mixture over M draws, and whether the target is the
    mixture's most likely token (bool). Works in parts, so that memory for logits does not grow with N."""
    draws = len(hidden_MND)
    part = max(1, _LOGITS_AT_ONCE // (draws * model.config.vocab_size))
    log_p, greedy = [], []
    for start in range(0, len(targets_N), part):
        log_p_MnV = model.logits(hidden_MND[:, start : start + part]).float().log_softmax(-1)
        log_p_nV = log_p_MnV[0] if draws == 1 else log_p_MnV.logsumexp(0) - math.log(draws)
        targets_n = targets_N[start : start + part]
        log_p.append(log_p_nV.gather(-1, targets_n[:, None])[:, 0])
        greedy.append(log_p_nV.argmax(-1) == targets_n)
    return torch.cat(log_p), torch.cat(greedy)


def jackknife_stderr(without: Tensor) -> float:
    """Standard error from the M leave-one-out values of an estimate: sqrt((M - 1)/M sum (x - mean)^2)."""
    m = len(without)
    return math.sqrt((m - 1) / m * (without - without.mean()).square().sum().item())


@torch.no_grad()
def score_draws(
    model: LoopedLM,
    batches: Iterable[Batch],
    ks: Sequence[int],
    byte_lengths: np.ndarray,
    draws: Sequence[int],
    seed: int = 0,
    processes: Processes = ONE_PROCESS,
    bound: bool = False,
) -> dict[int, Scores]:
    """Score held-out batches at every K in ``ks`` and for every number of draws M in ``draws``: {M: scores}.

    Args:
        byte_lengths: UTF-8 bytes of each token, int (V,). Special tokens have 0 bytes, but their nats count.
        draws: numbers of noise draws. Smaller sets are part of larger ones. Inference without noise is scored once, M = 1.
        seed: seed of the noise.
        processes: the processes that share the batches, each with its own `validation_batches`. All get the same scores.
        bound: score walks by the bound instead of the mixture.
    """
    device = model.embedding.weight.device
    lengths = torch.as_tensor(byte_lengths, dtype=torch.float64)
    rng = Rng(seed, EVALUATION_STEP)
    nlls: dict[tuple[int, int], list[Tensor]] = {}
    without: dict[tuple[int, int], Tensor] = {}
    wanted = set(draws) if model.recurrence.stochastic else {1}
    n_bytes, length = 0.0, 0
    was_training = model.training
    model.eval()
    for batch in batches:
        length = batch.tokens_BT.shape[1]
        n_bytes += lengths[batch.targets_BT].sum().item()
        tokens_BT, targets_BT = batch.tokens_BT.to(device), batch.targets_BT.to(device)
        each = draw_log_probabilities(
            model, tokens_BT, targets_BT, ks, rng, batch.sample_index_B, max(wanted), batch.doc_ids_BT, bound
        )
        for k, log_p_MBT in each.items():
            for m in sorted(wanted):
                log_p_BT = log_p_MBT[:m].logsumexp(0) - math.log(m)
                nlls.setdefault((m, k), []).append(-log_p_BT.double().mean(-1).cpu())
                if m > 1:
                    without[m, k] = without.get((m, k), torch.zeros(m)) + leave_one_out(log_p_MBT[:m])
    model.train(was_training)
    result: dict[int, Scores] = {}
    walk = model.recurrence.walk
    passes = walk.bound_passes if bound and walk else model.recurrence.passes
    n_bytes = sum(processes.merge([n_bytes]))
    length = max(processes.merge([length]))
    for m, k in itertools.product(sorted(wanted), ks):
        mine = [nll for part in nlls.get((m, k), []) for nll in part.tolist()]
        per_sequence = torch.tensor(processes.merge(mine), dtype=torch.float64)
        if m > 1 and processes.world > 1:
            parts = torch.tensor(processes.merge([without.get((m, k), torch.zeros(m)).tolist()]), dtype=torch.float64)
            without[m, k] = parts.sum(0)
        n, nll = len(per_sequence), per_sequence.mean().item()
        tokens = n * length
        scores = result.setdefault(m, Scores({}, tokens, m))
        scores.by_k[k] = Score(
            nll=nll,
            bits_per_byte=nll * tokens / (math.log(2) * n_bytes) if n_bytes else math.nan,
            stderr=(per_sequence.std() / math.sqrt(n)).item() if n > 1 else math.nan,
            noise_stderr=jackknife_stderr(without[m, k] / tokens) if m > 1 else math.nan,
            flops_per_token=inference_cost(model.config, length, passes(k)),
        )
    return result


def score(
    model: LoopedLM,
    batches: Iterable[Batch],
    ks: Sequence[int],
    byte_lengths: np.ndarray,
    draws: int = 1,
    seed: int = 0,
    processes: Processes = ONE_PROCESS,
    bound: bool = False,
) -> Scores:
    """`score_draws` with one number of draws."""
    [scores] = score_draws(model, batches, ks, byte_lengths, (draws,), seed, processes, bound).values()
    return scores
