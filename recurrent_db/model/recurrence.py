"""The contract of inference with K iterations, which a model's ``recurrence`` implements.

Scoring, generation and lm-eval all run a model through its recurrence, so they use the same distribution. The package
`recurrent_db.recurrence` has two implementations: the plain loop, and the walk over noise levels.

Shapes: B sequences, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from recurrent_db.model.attention import Visible
from recurrent_db.model.passes import Passes
from recurrent_db.rng import Rng


@dataclass(frozen=True)
class NoiseSource:
    """Random numbers of scoring and generation: a function of (seed, request, position, stream, draw).

    Positions are drawn in pages, so the noise of a position does not depend on the length of the sequence.
    """

    rng: Rng
    """Source of the random numbers; holds the seed."""
    requests: Tensor
    """Key of each sequence's random numbers, int (B,)."""
    page: int
    """Number of positions that are drawn together. It must be the same wherever the same noise is needed."""
    draw: int = 0
    """Number of the draw, if several are averaged."""
    offset: int | tuple[int, ...] = 0
    """Absolute position of the first position requested, for all sequences or for each. Positions below 0 are padding and
    get zeros."""
    kept: dict[tuple[object, ...], tuple[int, Tensor]] | None = None
    """Cache of the last page of each stream, for generation position by position; None keeps nothing."""

    def _pages(self, length: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        if not isinstance(self.offset, int):
            each = zip(self.requests.split(1), self.offset, strict=True)
            sources = [replace(self, requests=request, offset=offset) for request, offset in each]
            return torch.cat([source._pages(length, width, stream, device, normal) for source in sources])
        if self.offset < 0:
            padding = torch.zeros(len(self.requests), min(length, -self.offset), width, device=device)
            if padding.shape[1] == length:
                return padding
            rest = replace(self, offset=0)._pages(length + self.offset, width, stream, device, normal)
            return torch.cat((padding, rest), dim=1)
        first, last = self.offset // self.page, (self.offset + length - 1) // self.page
        found = [self._page(page, width, stream, device, normal) for page in range(first, last + 1)]
        start = self.offset - first * self.page
        pages_BPD = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return pages_BPD[:, start : start + length]

    def _page(self, page: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        """The numbers of one page, (B, page, width)."""
        place = (stream, self.draw, *self.requests.tolist())
        if self.kept is not None and place in self.kept and self.kept[place][0] == page:
            return self.kept[place][1]
        name, shape = f"{stream}/draw{self.draw}/page{page}", (self.page, width)
        if normal:
            numbers = self.rng.normal(self.requests, shape, name, device)
        else:
            numbers = self.rng.uniform(self.requests, shape, name, device, torch.float32)
        if self.kept is not None:
            self.kept[place] = page, numbers
        return numbers

    def normal(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """Standard normal numbers, fp32 (B, length, width)."""
        return self._pages(length, width, stream, device, normal=True)

    def uniform(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), fp32 (B, length, width)."""
        return self._pages(length, width, stream, device, normal=False)


@dataclass
class Probe:
    """Records and edits states while `Recurrence.hidden` runs a single K, for reports."""

    edit: Callable[[Tensor], Tensor] | None = None
    """Function applied to the state (in a walk: to z) before the last core pass."""
    states: list[Tensor] = field(default_factory=list)
    """The result of each core pass (in a walk: the estimate D), (B, T, D) each."""
    parts: list[Any] = field(default_factory=list)
    """In a walk: the network that made each estimate (`recurrence.walk.DenoiseWalk.at`)."""


class Recurrence(Protocol):
    """Inference with K iterations."""

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on the noise, so that several draws can be averaged."""
        ...

    @property
    def loop(self) -> Any:
        """This object if it is a plain loop (`recurrence.loop.PlainLoop`), else None."""
        ...

    @property
    def walk(self) -> Any:
        """This object if it is a walk (`recurrence.walk.DenoiseWalk`), else None."""
        ...

    def levels(self, k: int) -> list[float]:
        """The falling noise levels of K iterations; empty for a plain loop."""
        ...

    def start(self, like_BTD: Tensor, noise: NoiseSource) -> Tensor:
        """The initial state (in a walk: the initial z), (B, T, D), in the shape, dtype and device of ``like_BTD``."""
        ...

    def hidden(
        self,
        model: Any,
        tokens_BT: Tensor,
        e_BTD: Tensor,
        ks: Sequence[int],
        noise: NoiseSource,
        probe: Probe | None = None,
        visible: Visible | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Run K iterations and yield (K, hidden_BTD) for each K, in rising order.

        Args:
            model: the model.
            tokens_BT: int64 tokens.
            e_BTD: the prelude's output for ``tokens_BT``.
            ks: numbers of iterations.
            noise: source of random numbers.
            probe: records or edits states; needs a single K.
            visible: the attention mask that ``e_BTD`` was computed with; plain causal by default. With a key-value cache it
                comes from `Cache.grow`.

        Yields:
            K, and the head's input (B, T, D): ``model.logits(hidden)`` predicts the next token.
        """
        ...

    def ready(self, model: Any) -> Recurrence:
        """A recurrence for repeated calls with the same weights: it has precomputed what depends on the weights alone."""
        ...

    def passes(self, k: int) -> Passes:
        """The passes of K iterations, for the FLOP count."""
        ...
