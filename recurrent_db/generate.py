"""Sampling text: a prompt, K iterations for each token.

Every new token recomputes the window of the last ``max_seq_len`` tokens. Inference goes through the same `recurrence` as
scoring, so the distribution that is sampled is the one that is scored (with one noise draw).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recurrent_db.errors import UserError
from recurrent_db.model.looped import LoopedLM
from recurrent_db.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.tokenizer import Tokenizer


def filter_probabilities(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities to sample from, fp64 (V,), summing to one.

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps all; ``top_p`` keeps the fewest most likely tokens whose mass reaches
    it, always at least one.
    """
    logits_V = logits_V.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).double()
    probabilities = (logits_V / temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    drop = ordered.cumsum(-1) - ordered > top_p - 1e-12  # a mass that reaches top_p but for rounding has reached it
    if top_k:
        drop[top_k:] = True
    drop[0] = False
    probabilities[order[drop]] = 0
    return probabilities / probabilities.sum()


@torch.no_grad()
def generate_tokens(
    model: LoopedLM,
    prompt_ids: list[int],
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    request: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield new token ids one by one; ``stop_id`` ends the text and is not yielded.

    Draws are a function of (seed, request, position), so a run is repeatable. Arguments as in `generate`.
    """
    device, window = model.embedding.weight.device, model.config.max_seq_len
    rng = Rng(seed, EVALUATION_STEP)
    requests = torch.tensor([request])
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        offset = max(0, len(ids) - window)
        tokens_BT = torch.tensor([ids[offset:]], device=device)
        noise = NoiseSource(rng, requests, window, offset=offset)
        [(_, hidden_BTD)] = model.recurrence.hidden(model, tokens_BT, model.encode(tokens_BT), [k], noise)
        probabilities_V = filter_probabilities(model.logits(hidden_BTD[0, -1]).cpu(), temperature, top_k, top_p)
        u = rng.uniform(requests, (1,), f"token/{len(ids)}")[0]
        token = int(torch.searchsorted(probabilities_V.cumsum(-1), u, right=True).clamp(max=len(probabilities_V) - 1))
        if token == stop_id:
            return
        ids.append(token)
        yield token


def generate(
    model: LoopedLM,
    tokenizer: Tokenizer,
    prompt: str,
    k: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continue ``prompt`` with ``k`` core iterations for each token.

    Args:
        k: core iterations, 1 or more.
        max_new_tokens: the most tokens to add; the end-of-document token ends the text earlier.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: sample among this many most likely tokens; 0 means all.
        top_p: sample among the fewest tokens whose probability reaches this; 1 means all.
        seed: the same seed gives the same text.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError: for an argument out of its range.
    """
    for ok, message in (
        (k >= 1, f"k must be 1 or more, got {k}"),
        (max_new_tokens >= 0, f"max_new_tokens must be 0 or more, got {max_new_tokens}"),
        (temperature >= 0, f"temperature must be 0 or more, got {temperature}"),
        (top_k >= 0, f"top_k must be 0 (all) or more, got {top_k}"),
        (0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}"),
    ):
        if not ok:
            raise UserError(message)
    # An empty prompt starts a document: what precedes one in training is the end of another.
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    new = generate_tokens(
        model, prompt_ids, k, max_new_tokens, temperature, top_k, top_p, seed, stop_id=tokenizer.eos_id
    )
    return tokenizer.decode(list(new))
