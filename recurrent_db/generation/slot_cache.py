"""Key-value cache of a plain loop: rows grow at different speeds, and positions may be at different iterations.

Same semantics as ``Cache(policy="full")``: each iteration of each position has its own slot, and position i in iteration n
sees what positions up to i made in iteration n. Here all rows start at slot 0, each has its own length, and a pass may
hold any positions. Rows need no padding, and rejected tokens are overwritten.

The slots of one layer are (P, B, H, S, E) with P planes: one for each iteration of a core layer, a single one for a layer
of prelude or coda. Iteration v, counted from 0, is in plane (v mod inner) * stages + v // inner. Iterations v, v + inner,
v + 2 inner, ... are thus neighbours, and one pass may cover them together (`speculation.DiagonalDecoder`).

For inference alone, for one K and one draw.

Shapes: B rows, T positions of a pass, S slots of a row, H heads, E head size, D width, N rows of a pass: B for each plane.
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
    """Slots for ``rows`` sequences of up to ``capacity`` positions, ``k`` iterations each.

    ``inner``: iterations that a pass over several planes makes; K where passes have one plane.
    """

    def __init__(self, model: LoopedLM, rows: int, capacity: int, k: int, inner: int) -> None:
        self.model, self.rows, self.capacity, self.k = model, rows, capacity, k
        self.inner, self.stages = inner, -(-k // inner)
        self.slots: dict[nn.Module, KeysValues] = {}
        self.visits: Counter[tuple[bool, int]] = Counter()
        """How many positions blocks have run, by (whether the block is of the core, keys that each position met)."""
        self.core = set(model.core.modules())
        self.device = model.embedding.weight.device
        cos_SF, sin_SF = model.rope(capacity)
        positions = [*range(capacity), 0]
        self.rope = cos_SF[positions], sin_SF[positions]

    @property
    def dummy(self) -> int:
        """The position of the last slot, which no position of a text has. Passes write there what nothing may see."""
        return self.capacity

    @property
    def bytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return tensor_bytes([tensor for slot in self.slots.values() for tensor in slot])

    def prefill(self, length: int, rows: Sequence[int]) -> Visible:
        """A pass over positions 0 to ``length`` - 1 of these rows."""
        return self._visible(_Pass(self, None, length, rows=rows), length, None)

    def pass_over(self, positions_NT: Tensor, start: int = 0, planes: int = 1) -> Visible:
        """A pass over any positions, int64 (N, T) on the CPU.

        Row b of plane n is row n B + b of the pass. The core layers' visits are iterations start + n inner, then the next,
        and so on. A position sees what a layer made for earlier positions, in former passes or in this very visit.
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
        """Copy what a position made in its last iteration, number ``depth``, into the slots of all later ones. For one
        stage."""
        for layer in self.core & self.slots.keys():
            for kept in self.slots[layer]:
                kept[depth:, row, :, position] = kept[depth - 1, row, :, position]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order."""
        index = torch.tensor(rows, device=self.device)
        self.rows = len(rows)
        self.slots = {layer: (k[:, index], v[:, index]) for layer, (k, v) in self.slots.items()}

    def planes(self, layer: nn.Module, like_NHTE: Tensor) -> KeysValues:
        """A layer's slots. New ones are zeros, since even what a mask hides must be finite."""
        if layer not in self.slots:
            count = self.inner * self.stages if layer in self.core else 1
            shape = (count, self.rows, like_NHTE.shape[1], self.capacity + 1, like_NHTE.shape[3])
            self.slots[layer] = like_NHTE.new_zeros(shape), like_NHTE.new_zeros(shape)
        return self.slots[layer]


@dataclass(eq=False)
class _Pass:
    """`model.attention.Past` of a pass. Without ``positions`` it has the first ``stop`` positions of ``rows``."""

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
