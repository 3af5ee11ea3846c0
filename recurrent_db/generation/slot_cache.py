"""Key-value cache of a plain loop, in which sequences may have different lengths and positions different iterations.

Same semantics as ``Cache(policy="full")``: each iteration of each position has its own slot, and position i at iteration n
sees the keys and values of positions up to i at iteration n. In this cache all sequences start at slot 0, each has its own
length, and a pass may run any positions. No padding is needed, and rejected tokens are overwritten.

A row is the place of one sequence. The slots of one layer are (P, B, H, S, E) with P planes: one plane per iteration for a
core layer, a single plane for a layer of prelude or coda. Iteration v, counted from 0, is in plane
(v mod inner) * stages + v // inner. Iterations v, v + inner, v + 2 inner, ... are thus neighbours, so one pass can run them
together (`speculation.DiagonalDecoder`).

The cache is for inference with a single K and a single draw.

Shapes: B rows, T positions of a pass, S slots of a row, H heads, E head size, D width, N rows of a pass (B per plane).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recurrent_db.accounting.memory_split import tensor_bytes
from recurrent_db.model.attention import SDPA, Rule, Visible
from recurrent_db.model.layers import KeysValues
from recurrent_db.model.looped import LoopedLM


class SlotCache:
    """Keys and values of ``rows`` sequences with up to ``capacity`` positions of ``k`` iterations each.

    ``inner`` is the number of iterations in a pass over several planes; use ``k`` if every pass has one plane.
    """

    def __init__(self, model: LoopedLM, rows: int, capacity: int, k: int, inner: int) -> None:
        self.model, self.rows, self.capacity, self.k = model, rows, capacity, k
        self.inner, self.stages = inner, -(-k // inner)
        self.slots: dict[nn.Module, KeysValues] = {}
        self.visits: Counter[tuple[bool, int]] = Counter()
        """Number of positions that layers have run, by (whether the layer is in the core, number of keys), for FLOPs."""
        self.core = set(model.core.modules())
        self.device = model.embedding.weight.device
        cos_SF, sin_SF = model.rope(capacity)
        positions = [*range(capacity), 0]
        self.rope = cos_SF[positions], sin_SF[positions]

    @property
    def dummy(self) -> int:
        """An extra position after the capacity. Passes write there for rows that have nothing to run; it is never read."""
        return self.capacity

    @property
    def bytes(self) -> int:
        """Memory of all allocated slots, in bytes."""
        return tensor_bytes([tensor for slot in self.slots.values() for tensor in slot])

    def prefill(self, length: int, rows: Sequence[int]) -> Visible:
        """The attention mask of a pass over positions 0 to ``length`` - 1 of these rows."""
        return self._visible(_Pass(self, None, length, rows=rows), length, None)

    def pass_over(self, positions_NT: Tensor, start: int = 0, planes: int = 1) -> Visible:
        """The attention mask of a pass over any positions.

        A position sees a layer's keys and values of earlier positions at the same iteration, from earlier passes and from
        this one.

        Args:
            positions_NT: int64 (N, T), on the CPU. Row n B + b of the pass is row b of plane n.
            start: iteration, from 0, of the first visit to a core layer. Plane n starts at iteration start + n inner; each
                further visit is the next iteration.
            planes: number of planes that core layers run together.
        """
        inside_NT = positions_NT.masked_fill(positions_NT == self.dummy, -1)
        stop = int(inside_NT.max()) + 1
        positions_NT, inside_NT = positions_NT.to(self.device), inside_NT.to(self.device)
        hidden = torch.arange(stop, device=self.device) > inside_NT[:, None, :, None].clamp(min=0)
        return self._visible(_Pass(self, positions_NT, stop, start, planes), positions_NT.shape[1], hidden)

    def _visible(self, past: _Pass, queries: int, hidden_N1TS: Tensor | None) -> Visible:
        weight = self.model.embedding.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else None
        dtype = dtype or weight.dtype
        mask = None
        if hidden_N1TS is not None:
            mask = torch.zeros(hidden_N1TS.shape, dtype=dtype, device=self.device).masked_fill(hidden_N1TS, -torch.inf)
        return Visible(Rule(queries, past.stop), weight.device, dtype, SDPA, SDPA, mask, past=past)

    def fill_later_iterations(self, row: int, position: int, depth: int) -> None:
        """Copy the keys and values of a position's last iteration, number ``depth`` from 1, into the slots of all later
        iterations. Valid only for a single stage (``inner`` = K)."""
        for layer in self.core & self.slots.keys():
            for kept in self.slots[layer]:
                kept[depth:, row, :, position] = kept[depth - 1, row, :, position]

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all other rows. ``rows`` gives the new order."""
        index = torch.tensor(rows, device=self.device)
        self.rows = len(rows)
        self.slots = {layer: (k[:, index], v[:, index]) for layer, (k, v) in self.slots.items()}

    def planes(self, layer: nn.Module, like_NHTE: Tensor) -> KeysValues:
        """A layer's slots. New slots are zeros, because masked values must be finite too."""
        if layer not in self.slots:
            count = self.inner * self.stages if layer in self.core else 1
            shape = (count, self.rows, like_NHTE.shape[1], self.capacity + 1, like_NHTE.shape[3])
            self.slots[layer] = like_NHTE.new_zeros(shape), like_NHTE.new_zeros(shape)
        return self.slots[layer]


@dataclass(eq=False)
class _Pass:
    """One pass over the cache. Implements `model.attention.Past`. Without ``positions_NT`` it runs positions 0 to
    ``stop`` - 1 of ``rows``."""

    cache: SlotCache
    positions_NT: Tensor | None
    stop: int
    start: int = 0
    planes: int = 1
    rows: Sequence[int] = ()
    visits: Counter[nn.Module] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        cos_SF, sin_SF = self.cache.rope
        here: slice | Tensor = slice(self.stop) if self.positions_NT is None else self.positions_NT
        self.rope = cos_SF[here], sin_SF[here]
        if self.positions_NT is not None:
            self._rows_N1 = torch.arange(len(self.positions_NT), device=self.cache.device)[:, None]

    def extend(self, layer: nn.Module, k_NHTE: Tensor, v_NHTE: Tensor) -> KeysValues:
        cache, plane = self.cache, 0
        cache.visits[layer in cache.core, self.stop] += k_NHTE.shape[0] * k_NHTE.shape[2]
        if layer in cache.core:
            visit = self.start + self.visits[layer]
            self.visits[layer] += 1
            plane = visit % cache.inner * cache.stages + visit // cache.inner
        planes = self.planes if layer in cache.core else 1

        def extended(kept: Tensor, new_NHTE: Tensor) -> Tensor:
            kept_NHSE = kept[plane : plane + planes].flatten(0, 1)
            if self.positions_NT is None:
                kept_NHSE[self.rows, :, : self.stop] = new_NHTE
                return new_NHTE
            kept_NHSE[self._rows_N1, :, self.positions_NT] = new_NHTE.transpose(1, 2)
            return kept_NHSE[:, :, : self.stop]

        kept_k, kept_v = cache.planes(layer, k_NHTE)
        return extended(kept_k, k_NHTE), extended(kept_v, v_NHTE)
