"""From logits to a token: repetition penalty, temperature, filters, draw.

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
"""Top-p looks among this many tokens first: sorting a whole vocabulary takes longer than the other filters together."""


def probabilities(logits_V: Tensor, options: GenerationOptions, seen: Iterable[int] = ()) -> Tensor:
    """Probabilities to draw the next token from, fp64 (V,), summing to one.

    Every filter leaves the most likely token; of equally likely ones the first are kept.

    Args:
        seen: tokens of the prompt and the text so far, for the repetition penalty.
    """
    logits_V = _penalised(logits_V, options, seen)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).double()
    # The largest is 0, so that no temperature makes two of them infinite.
    p_V = ((logits_V - logits_V.max()) / options.temperature).softmax(-1)
    if options.top_k or options.top_p < 1:
        kept = _most_likely(p_V, options)
        p_V = torch.zeros_like(p_V).index_copy(0, kept, p_V[kept])
    if options.min_p:
        p_V = p_V * (p_V >= options.min_p * p_V.max())
    return p_V / p_V.sum()


def draw(logits_V: Tensor, options: GenerationOptions, seen: Iterable[int], u: float) -> int:
    """The token at ``u`` in [0, 1) of the cumulative distribution. Its probability is above zero.

    Raises:
        UserError: the logits are not finite.
    """
    if options.temperature == 0:
        return int(_penalised(logits_V, options, seen).argmax())
    return pick(probabilities(logits_V, options, seen), u)


def pick(weights_V: Tensor, u: float) -> int:
    """The index at ``u`` in [0, 1) of the cumulative distribution of nonnegative weights. Its weight is above zero.

    Raises:
        UserError: the weights are not finite, as those of a model that has diverged.
    """
    cumulated_V = weights_V.cumsum(-1)
    total = float(cumulated_V[-1])
    if not math.isfinite(total):
        raise UserError("the model's predictions are not finite: nothing can be sampled from them")
    return int(torch.searchsorted(cumulated_V, u * total, right=True))


def _penalised(logits_V: Tensor, options: GenerationOptions, seen: Iterable[int]) -> Tensor:
    """fp64 logits, with the repetition penalty on ``seen`` tokens."""
    logits_V, penalty = logits_V.double(), options.repetition_penalty
    if penalty == 1:
        return logits_V
    ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
    old = logits_V[ids]
    new = torch.where(old > 0, old / penalty, old * penalty).clamp(-1e300, 1e300)
    return logits_V.index_copy(0, ids, new)


def _most_likely(p_V: Tensor, options: GenerationOptions) -> Tensor:
    """Ids that top-k and top-p leave, the most likely first."""
    for most in (min(options.top_k or _MOST_LIKELY, len(p_V)), len(p_V)):
        likely = (p_V >= p_V.topk(most).values[-1]).nonzero()[:, 0]
        ordered, order = p_V[likely].sort(descending=True, stable=True)
        # A mass that reaches top_p but for rounding has reached it.
        before = ordered.cumsum(-1) - ordered
        if options.top_k or before[-1] + ordered[-1] >= options.top_p:
            break
    keep = before <= options.top_p - 1e-12
    if options.top_k:
        keep[options.top_k :] = False
    keep[0] = True
    return likely[order[keep]]
