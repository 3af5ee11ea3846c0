"""Keys and values of a plain loop, for rows that grow at different speeds and positions at different iterations.

What adaptive depth and the samplers of `speculation` rest on. Like `cache.Cache` under the policy `full`, of which it keeps
to the definition: each iteration of each position has its own slot, and position i in iteration n sees what positions
up to i made in iteration n. Unlike there, all rows start at slot 0, each has its own length, and a pass may hold any
positions: rows need no padding, tokens that did not hold are overwritten, and nothing needs to be cut.

Slots of one layer are (P, B, H, S, E): P planes, one for each iteration of a core layer and one alone for a layer of
prelude or coda. So that a pass may cover several iterations at once (`speculation.Diagonal`), iteration v, counted from 0,
is in plane (v mod inner) * stages + v // inner: iterations v, v + inner, v + 2 inner, ... are neighbours.

For inference alone, for one K and one draw. Shapes: B rows, T positions of a pass, S slots of a row, H heads, E head size,
D width, N sequences of a pass: B for each of its planes.
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


class RaggedCache:
    """Slots for ``rows`` sequences of up to ``capacity`` positions, ``k`` iterations each.

    ``inner``: iterations that a pass over several planes makes; all of them where passes have one plane. The last slot,
    number ``capacity``, belongs to no position: passes leave there what nobody shall see.
    """

    def __init__(self, model: LoopedLM, rows: int, capacity: int, k: int, inner: int) -> None:
        self.model, self.rows, self.capacity, self.k = model, rows, capacity, k
        self.inner, self.stages = inner, -(-k // inner)
        self.slots: dict[nn.Module, KeysValues] = {}
        self.visits: Counter[tuple[bool, int]] = Counter()
        """Positions that blocks ran, by whether of the core, and by the keys that each met: for counts of FLOPs."""
        self.core = set(model.core.modules())
        self.device = model.embedding.weight.device
        cos_SF, sin_SF = model.rope(capacity)
        nowhere = [*range(capacity), 0]
        self.rope = cos_SF[nowhere], sin_SF[nowhere]

    @property
    def bytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return tensor_bytes([tensor for slot in self.slots.values() for tensor in slot])

    def first(self, length: int, rows: Sequence[int]) -> Visible:
        """A pass over positions 0 to ``length`` - 1 of these rows."""
        return self._visible(_Pass(self, None, length, rows=rows), length, None)

    def pass_over(self, places_NT: Tensor, start: int = 0, planes: int = 1) -> Visible:
        """A pass over positions ``places``, int64 on the CPU, of which each row may have others. Row b of plane n is
        sequence n B + b; its core layers' visits are iterations start + n inner, then the next, and so on. What a layer
        made for positions before them, or makes in this very visit, is seen."""
        inside_NT = places_NT.masked_fill(places_NT == self.capacity, -1)
        stop = int(inside_NT.max()) + 1
        places_NT, inside_NT = places_NT.to(self.device), inside_NT.to(self.device)
        hidden = torch.arange(stop, device=self.device) > inside_NT[:, None, :, None].clamp(min=0)
        return self._visible(_Pass(self, places_NT, stop, start, planes), places_NT.shape[1], hidden)

    def _visible(self, past: _Pass, queries: int, hidden_N1TS: Tensor | None) -> Visible:
        weight = self.model.embedding.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else None
        dtype = dtype or weight.dtype
        plan = None
        if hidden_N1TS is not None:
            plan = torch.zeros(hidden_N1TS.shape, dtype=dtype, device=self.device).masked_fill(hidden_N1TS, -torch.inf)
        return Visible(Rule(queries, past.stop), weight.device, dtype, SDPA, SDPA, plan, past=past)

    def hold(self, row: int, place: int, depth: int) -> None:
        """Let a position that ran ``depth`` iterations show in all later ones what it made in its last. For one stage."""
        for layer in self.core & self.slots.keys():
            for kept in self.slots[layer]:
                kept[depth:, row, :, place] = kept[depth - 1, row, :, place]

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order."""
        index = torch.tensor(rows, device=self.device)
        self.rows = len(rows)
        self.slots = {layer: (k[:, index], v[:, index]) for layer, (k, v) in self.slots.items()}

    def planes(self, layer: nn.Module, like_NHTE: Tensor) -> KeysValues:
        """A layer's slots, made where there are none: of zeros, since what is hidden from a query must still be finite."""
        if layer not in self.slots:
            count = self.inner * self.stages if layer in self.core else 1
            shape = (count, self.rows, like_NHTE.shape[1], self.capacity + 1, like_NHTE.shape[3])
            self.slots[layer] = like_NHTE.new_zeros(shape), like_NHTE.new_zeros(shape)
        return self.slots[layer]


@dataclass(eq=False)
class _Pass:
    """`model.attention.Past` of a pass. Without ``places`` it has the first ``stop`` positions of ``rows``."""

    cache: RaggedCache
    places_NT: Tensor | None
    stop: int
    start: int = 0
    planes: int = 1
    rows: Sequence[int] = ()
    visits: Counter[nn.Module] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        cos_SF, sin_SF = self.cache.rope
        here: slice | Tensor = slice(self.stop) if self.places_NT is None else self.places_NT
        self.rope = cos_SF[here], sin_SF[here]
        if self.places_NT is not None:
            self._sequences_N1 = torch.arange(len(self.places_NT), device=self.cache.device)[:, None]

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
            if self.places_NT is None:
                kept_NHSE[self.rows, :, : self.stop] = new_NHTE
                return new_NHTE
            kept_NHSE[self._sequences_N1, :, self.places_NT] = new_NHTE.transpose(1, 2)
            return kept_NHSE[:, :, : self.stop]

        kept_k, kept_v = cache.planes(layer, k_NHTE)
        return extended(kept_k, k_NHTE), extended(kept_v, v_NHTE)
