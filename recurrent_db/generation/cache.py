"""Key-value cache for K-iteration inference: each token is run once.

    cache = Cache(model, rows=1, capacity=256)
    noise = NoiseSource(rng, requests, page, offset=cache.offset)      # before the cache grows
    visible = cache.grow(tokens_BT.shape[1])                           # a pass over the tokens that come next
    e_BTD = model.encode(tokens_BT, visible)
    [(k, hidden_BTD)] = model.recurrence.hidden(model, tokens_BT, e_BTD, [k], noise, visible=visible)

A visit is one run of a layer during a pass. Prelude layers are visited once, core layers in each iteration or noise level,
coda layers in each read-out. (With two-stream conditioning the clean stream alone is kept, and it visits the core once.)
A slot holds the keys and values of one layer in one visit. In its n-th visit to a layer a position sees what earlier
positions left in their n-th, as if everything were recomputed. All passes over one cache must therefore make the same
visits: ask for the same K and draws each time, and run `Recurrence.hidden` to its end.

Policies say which slots are kept:

- ``full``: all of them. The size grows with K.
- ``modulo-S``: S slots for each layer; visit n reads and writes slot n mod S. Of a position in an earlier pass, visit n sees
  the last visit that equals n modulo S; of positions in its own pass, their n-th.
- ``last``: modulo-1, the last visit alone (Huginn's cache sharing, arXiv 2502.05171, section 6.2).

``modulo-S`` and ``last`` are for one K and one draw, and their results depend on how the tokens are cut into passes.

Slots are allocated for the whole capacity when they are first filled. For inference alone: no gradient passes through.

Shapes: B rows, T positions of a pass, S positions so far, H heads, E head size, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recurrent_db.accounting.flops import visits_kept
from recurrent_db.accounting.memory_split import tensor_bytes
from recurrent_db.model.attention import Rule, Visible
from recurrent_db.model.layers import KeysValues
from recurrent_db.model.looped import LoopedLM

SlotName = tuple[str, int]
"""A layer's name in the model, and the number of its visit in a pass (modulo S)."""


class Cache:
    """Slots for ``rows`` sequences of up to ``capacity`` positions.

    All rows have the same length. Shorter sequences are padded on the left by ``padding`` positions of any tokens. No other
    position sees the padding; rotary positions and noise (`offset`) count from the first position after it.
    """

    def __init__(
        self, model: LoopedLM, rows: int, capacity: int, padding: Sequence[int] | None = None, policy: str = "full"
    ) -> None:
        self.model, self.rows, self.capacity, self.policy = model, rows, capacity, policy
        self.kept = visits_kept(policy)
        self.padding = tuple(padding) if padding is not None and any(padding) else None
        if self.padding is not None and len(self.padding) != rows:
            raise ValueError(f"{rows} rows, but padding for {len(self.padding)}")
        self.length = 0
        """Positions so far, padding included."""
        self.slots: dict[SlotName, KeysValues] = {}
        self.names = {module: name for name, module in model.named_modules()}

    @property
    def offset(self) -> int | tuple[int, ...]:
        """Position of the next token, one for all rows or one for each row; it keys the noise (`NoiseSource.offset`)."""
        return self.length if self.padding is None else tuple(self.length - padding for padding in self.padding)

    @property
    def bytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return tensor_bytes([tensor for slot in self.slots.values() for tensor in slot])

    def grow(self, count: int) -> Visible:
        """Make room for ``count`` more tokens of each row.

        Returns:
            Who sees whom in the pass over them, which reads and fills the slots. Call it once for each pass, under the
            autocast that the pass runs under.
        """
        first, self.length = self.length, self.length + count
        if self.length > self.capacity:
            self.length = first
            raise ValueError(f"{count} positions after {first} are more than the cache's {self.capacity}")
        return self._visible(_Pass(self, first, self.length, Counter()))

    def _visible(self, past: _Pass) -> Visible:
        docs_BS = None
        if self.padding is not None:  # padding is another document
            docs_BS = (torch.arange(past.stop) >= torch.tensor(self.padding)[:, None]).int()
        return self.model.served(Rule(past.stop - past.first, past.stop, docs_BS), past)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut {self.length} positions to {length}")
        self.length = length

    def take(self, rows: Sequence[int], capacity: int | None = None) -> Cache:
        """A new cache whose rows are copies of these, in this order, without the padding that all of them share. A row may
        be taken several times."""
        padding = [0] * len(rows) if self.padding is None else [self.padding[row] for row in rows]
        shared = min(padding, default=0)
        capacity = self.capacity if capacity is None else capacity
        other = Cache(self.model, len(rows), capacity, [pad - shared for pad in padding], self.policy)
        other.length = self.length - shared
        if other.length > capacity:
            raise ValueError(f"{other.length} positions do not fit into a capacity of {capacity}")

        def copied(kept: Tensor, axis: int) -> Tensor:
            shape = [len(rows), *kept.shape[1:]]
            shape[axis] = capacity
            copy = kept.new_empty(shape)
            filled = kept.narrow(axis, shared, other.length)
            copy.narrow(axis, 0, other.length).copy_(filled[torch.as_tensor(rows, device=kept.device)])
            return copy

        other.slots = {name: (copied(k, 2), copied(v, 2)) for name, (k, v) in self.slots.items()}
        return other

    def slot(self, name: SlotName, like_BHTE: Tensor) -> KeysValues:
        """Keys and values by name, (B, H, capacity, E) each, allocated at the first call."""
        if name not in self.slots:
            shape = (self.rows, like_BHTE.shape[1], self.capacity, like_BHTE.shape[3])
            self.slots[name] = like_BHTE.new_empty(shape), like_BHTE.new_empty(shape)
        return self.slots[name]


@dataclass(eq=False)
class _Pass:
    """A pass over positions ``first`` to ``stop`` of a cache; `model.attention.Past`."""

    cache: Cache
    first: int
    stop: int
    visits: Counter[nn.Module]
    """How often each layer has been visited in this pass."""

    def __post_init__(self) -> None:
        cos_SF, sin_SF = self.cache.model.rope(self.stop)
        here: slice | Tensor = slice(self.first, self.stop)
        if self.cache.padding is not None:  # the padding's own positions do not matter
            padding_B1 = torch.tensor(self.cache.padding, device=cos_SF.device)[:, None]
            here = (torch.arange(self.first, self.stop, device=cos_SF.device) - padding_B1).clamp(min=0)
        self.rope = cos_SF[here], sin_SF[here]

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> KeysValues:
        if k_BHTE.requires_grad:
            raise ValueError("a cache serves inference alone: call it under torch.no_grad()")
        visit, kept = self.visits[layer], self.cache.kept
        self.visits[layer] += 1
        k_BHSE, v_BHSE = self.cache.slot((self.cache.names[layer], visit % kept if kept else visit), k_BHTE)
        k_BHSE[:, :, self.first : self.stop] = k_BHTE
        v_BHSE[:, :, self.first : self.stop] = v_BHTE
        return k_BHSE[:, :, : self.stop], v_BHSE[:, :, : self.stop]
