"""The contract of K-iteration inference: what a model's ``recurrence`` can be asked for.

Scoring, generation and lm-eval run a model through its recurrence and through nothing else, so they agree by
construction. The room `recurrence` has the two implementations: the loop, and the walk over noise levels.

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
    """Draws for scoring and generation: a function of (seed, request, position, stream) and the draw's number.

    Rows are drawn in pages of ``page`` positions, so that position i's noise does not depend on how long the sequence
    is. ``offset`` is the absolute position of the first row, of all sequences or of each; rows before position 0, which
    are padding, are zeros.
    """

    rng: Rng
    requests: Tensor
    page: int
    draw: int = 0
    offset: int | tuple[int, ...] = 0
    kept: dict[tuple[object, ...], tuple[int, Tensor]] | None = None
    """The last page of each stream, where one position after another is asked for."""

    def _pages(self, length: int, width: int, stream: str, device: torch.device, normal: bool) -> Tensor:
        if not isinstance(self.offset, int):
            each = zip(self.requests.split(1), self.offset, strict=True)
            rows = [replace(self, requests=request, offset=offset) for request, offset in each]
            return torch.cat([row._pages(length, width, stream, device, normal) for row in rows])
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
        """(B, page, width)."""
        place = (stream, self.draw, *self.requests.tolist())
        if self.kept is not None and place in self.kept and self.kept[place][0] == page:
            return self.kept[place][1]
        name, shape = f"{stream}/draw{self.draw}/page{page}", (self.page, width)
        if normal:
            rows = self.rng.normal(self.requests, shape, name, device)
        else:
            rows = self.rng.uniform(self.requests, shape, name, device, torch.float32)
        if self.kept is not None:
            self.kept[place] = page, rows
        return rows

    def normal(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """fp32 standard normals (B, length, width)."""
        return self._pages(length, width, stream, device, normal=True)

    def uniform(self, length: int, width: int, stream: str, device: torch.device) -> Tensor:
        """fp32 uniforms in [0, 1) (B, length, width)."""
        return self._pages(length, width, stream, device, normal=False)


@dataclass
class Probe:
    """A look into a run of K iterations, for reports: ask for one K."""

    edit: Callable[[Tensor], Tensor] | None = None
    """Replaces the state (of a walk: z) before the last core pass."""
    states: list[Tensor] = field(default_factory=list)
    """Filled with what each core pass gave (of a walk: the estimate D), (B, T, D) each."""
    parts: list[Any] = field(default_factory=list)
    """Of a walk: the network that made each of them (`recurrence.walk.DenoiseWalk.at`)."""


class Recurrence(Protocol):
    """K-iteration inference of a checkpoint."""

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on the noise, so that draws can be averaged."""
        ...

    @property
    def loop(self) -> Any:
        """Itself where it is a plain loop (`recurrence.loop.PlainLoop`), else None."""
        ...

    @property
    def walk(self) -> Any:
        """Itself where it walks down noise levels (`recurrence.walk.DenoiseWalk`), else None."""
        ...

    def levels(self, k: int) -> list[float]:
        """The noise level of each of K iterations, falling; empty for a plain loop."""
        ...

    def start(self, like_BTD: Tensor, noise: NoiseSource) -> Tensor:
        """What the iterations start from, (B, T, D), at so many positions from the noise's offset on."""
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
        """Yield (K, hidden_BTD) for each K of ``ks`` in rising order; ``model.logits(hidden)`` predicts the next token.
        ``e`` is the prelude's output for ``tokens``, and ``visible`` what it was made with (plain causal by default; from
        `Cache.grow` where the tokens follow others)."""
        ...

    def ready(self, model: Any) -> Recurrence:
        """The same, with what depends on the model's weights alone computed once: for many calls with the same weights."""
        ...

    def passes(self, k: int) -> Passes:
        """What K iterations compute, for the FLOP count."""
        ...
