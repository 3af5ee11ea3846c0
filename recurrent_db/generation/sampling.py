"""From logits to a token: repetition penalty, temperature, filters, draw.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_db.errors import UserError

_MOST_LIKELY = 1024
"""Top-p is looked for among so many tokens first, since sorting a whole vocabulary takes longer than the other filters
together."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Raises `UserError` for a value out of its range."""

    temperature: float = 1.0
    """0 is greedy (the first of the most likely tokens), 1 the model's own distribution."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens whose probability reaches this; 1 means all."""
    min_p: float = 0.0
    """Draw among tokens at least this times as likely as the most likely one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the prompt and the text so far hold, and multiplies negative ones
    (CTRL, arXiv 1909.05858); 1 is none."""

    def __post_init__(self) -> None:
        for ok, message in (
            (0 <= self.temperature < float("inf"), f"temperature must be 0 or more, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (all) or more, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (0 <= self.min_p <= 1, f"min_p must be between 0 and 1, got {self.min_p}"),
            (0 < self.repetition_penalty < float("inf"),
             f"repetition_penalty must be above 0, got {self.repetition_penalty}"),
        ):  # fmt: skip
            if not ok:
                raise UserError(message)

    @property
    def plainly_greedy(self) -> bool:
        """Whether the token is the first of the most likely ones, whatever is there already."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def _penalised(self, logits_V: Tensor, seen: Iterable[int]) -> Tensor:
        """fp64 logits, those of ``seen`` tokens penalised."""
        logits_V = logits_V.double()
        if self.repetition_penalty == 1:
            return logits_V
        ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
        old = logits_V[ids]
        new = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty).clamp(-1e300, 1e300)
        return logits_V.index_copy(0, ids, new)

    def probabilities(self, logits_V: Tensor, seen: Iterable[int] = ()) -> Tensor:
        """Probabilities to draw from, fp64 (V,), summing to one. Every filter leaves the most likely token; of equally
        likely ones the first are kept. ``seen``: what the repetition penalty is for."""
        logits_V = self._penalised(logits_V, seen)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).double()
        # The largest is 0, so that no temperature makes two of them infinite.
        probabilities_V = ((logits_V - logits_V.max()) / self.temperature).softmax(-1)
        if self.top_k or self.top_p < 1:
            kept = self._most_likely(probabilities_V)
            probabilities_V = torch.zeros_like(probabilities_V).index_copy(0, kept, probabilities_V[kept])
        if self.min_p:
            probabilities_V = probabilities_V * (probabilities_V >= self.min_p * probabilities_V.max())
        return probabilities_V / probabilities_V.sum()

    def _most_likely(self, probabilities_V: Tensor) -> Tensor:
        """Ids that top-k and top-p leave, the most likely first."""
        vocab_size = len(probabilities_V)
        for most in (min(self.top_k or _MOST_LIKELY, vocab_size), vocab_size):
            likely = (probabilities_V >= probabilities_V.topk(most).values[-1]).nonzero()[:, 0]
            ordered, order = probabilities_V[likely].sort(descending=True, stable=True)
            # A mass that reaches top_p but for rounding has reached it.
            before = ordered.cumsum(-1) - ordered
            if self.top_k or before[-1] + ordered[-1] >= self.top_p:
                break
        keep = before <= self.top_p - 1e-12
        if self.top_k:
            keep[self.top_k :] = False
        keep[0] = True
        return likely[order[keep]]

    def draw(self, logits_V: Tensor, seen: Iterable[int], u: float) -> int:
        """The token at ``u`` in [0, 1) of the distribution function. Its probability is above zero."""
        if self.temperature == 0:
            return int(self._penalised(logits_V, seen).argmax())
        return pick(self.probabilities(logits_V, seen), u)


def pick(weights_V: Tensor, u: float) -> int:
    """The index at ``u`` in [0, 1) of the distribution function that nonnegative weights have. Its weight is above zero.

    Raises:
        UserError: the weights are not finite, as those of a model that has diverged are not.
    """
    cumulated_V = weights_V.cumsum(-1)
    whole = float(cumulated_V[-1])
    if not math.isfinite(whole):
        raise UserError("the model's predictions are not finite: nothing can be sampled from them")
    return int(torch.searchsorted(cumulated_V, u * whole, right=True))
