"""Sampling a token from logits: repetition penalty, temperature, filters, draw.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from recurrent_db.errors import UserError
from recurrent_db.generation.options import GenerationOptions

_MOST_LIKELY = 1024
"""Top-p first sorts only this many most likely tokens, because sorting a whole vocabulary takes longer than all other
filters together."""


def probabilities(logits_V: Tensor, options: GenerationOptions, seen: Iterable[int] = ()) -> Tensor:
    """The distribution from which the next token is drawn, fp64 (V,), with sum one.

    Filters always keep the most likely token. Of equally likely tokens they keep those with the lowest ids.

    Args:
        logits_V: the model's logits.
        options: temperature, filters and penalty.
        seen: tokens of the prompt and the text so far, for the repetition penalty.
    """
    logits_V = _penalised(logits_V, options, seen)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).double()
    # Subtracting the maximum first keeps the division by a small temperature from making several logits infinite.
    p_V = ((logits_V - logits_V.max()) / options.temperature).softmax(-1)
    if options.top_k or options.top_p < 1:
        kept = _most_likely(p_V, options)
        p_V = torch.zeros_like(p_V).index_copy(0, kept, p_V[kept])
    if options.min_p:
        p_V = p_V * (p_V >= options.min_p * p_V.max())
    return p_V / p_V.sum()


def draw(logits_V: Tensor, options: GenerationOptions, seen: Iterable[int], u: float) -> int:
    """The next token: greedy at temperature 0, else the token at ``u`` in [0, 1) of the cumulative distribution.

    A drawn token has a probability above zero. ``seen`` as in `probabilities`.

    Raises:
        UserError: the logits are not finite and the temperature is above 0.
    """
    if options.temperature == 0:
        return int(_penalised(logits_V, options, seen).argmax())
    return pick(probabilities(logits_V, options, seen), u)


def pick(weights_V: Tensor, u: float) -> int:
    """The index at ``u`` in [0, 1) of the cumulative distribution of nonnegative weights. Its weight is above zero.

    Raises:
        UserError: the weights are not finite, for example because the model has diverged.
    """
    cumulated_V = weights_V.cumsum(-1)
    total = float(cumulated_V[-1])
    if not math.isfinite(total):
        raise UserError("the model's logits are not finite, so no token can be sampled")
    return int(torch.searchsorted(cumulated_V, u * total, right=True))


def _penalised(logits_V: Tensor, options: GenerationOptions, seen: Iterable[int]) -> Tensor:
    """fp64 logits with the repetition penalty applied to ``seen`` tokens."""
    logits_V, penalty = logits_V.double(), options.repetition_penalty
    if penalty == 1:
        return logits_V
    ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
    old = logits_V[ids]
    new = torch.where(old > 0, old / penalty, old * penalty).clamp(-1e300, 1e300)
    return logits_V.index_copy(0, ids, new)


def _most_likely(p_V: Tensor, options: GenerationOptions) -> Tensor:
    """Ids that top-k and top-p keep, the most likely first."""
    for most in (min(options.top_k or _MOST_LIKELY, len(p_V)), len(p_V)):
        likely = (p_V >= p_V.topk(most).values[-1]).nonzero()[:, 0]
        ordered, order = p_V[likely].sort(descending=True, stable=True)
        # A cumulative probability within rounding (1e-12) of top_p counts as having reached it.
        before = ordered.cumsum(-1) - ordered
        if options.top_k or before[-1] + ordered[-1] >= options.top_p:
            break
    keep = before <= options.top_p - 1e-12
    if options.top_k:
        keep[options.top_k :] = False
    keep[0] = True
    return likely[order[keep]]
