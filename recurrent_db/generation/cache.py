"""Key-value cache for inference with K iterations, so that each token is run only once.

    cache = Cache(model, rows=1, capacity=256)
    noise = NoiseSource(rng, requests, page, offset=cache.offset)      # before the cache grows
    visible = cache.grow(tokens_BT.shape[1])                           # room for the next tokens
    e_BTD = model.encode(tokens_BT, visible)
    [(k, hidden_BTD)] = model.recurrence.hidden(model, tokens_BT, e_BTD, [k], noise, visible=visible)

Here a pass is one run of the model over the next tokens, and a visit is one run of a layer during a pass. A pass visits
prelude layers once, core layers at each iteration or noise level, and coda layers at each read-out. With two-stream
attention only the clean stream is cached, and it visits the core once.

A slot holds the keys and values of one layer at one visit. At its n-th visit to a layer, a position sees the keys and values
that earlier positions made at their n-th visit, exactly as without a cache. So all passes over one cache must make the same
visits: use the same K and number of draws each time, and run `Recurrence.hidden` to its end.

The policy says which slots are kept:

- ``full``: all. The size grows with K.
- ``modulo-S``: S slots per layer. Visit n reads and writes slot n mod S. It sees, for positions of earlier passes, their
  last visit that equals n modulo S, and for positions of its own pass their n-th visit.
- ``last``: the same as modulo-1, so the last visit only (Huginn's cache sharing, arXiv 2502.05171, section 6.2).

``modulo-S`` and ``last`` need a single K and a single draw. Their results depend on how tokens are divided into passes.

A slot is allocated for the whole capacity at its first use. The cache is for inference; gradients raise an error.

Shapes: B sequences, T positions of a pass, S positions so far, H heads, E head size, D width.
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
"""Name of a layer in the model, and number of the visit in a pass (modulo S)."""


class Cache:
    """Keys and values of ``rows`` sequences with up to ``capacity`` positions each.

    All sequences have the same length. Shorter ones are padded on the left with any tokens; ``padding`` gives the number for
    each sequence. Other positions do not see the padding. Rotary positions and noise (`offset`) count from the first
    position after it.

    Raises:
        ValueError: ``padding`` does not have one number per sequence.
        UserError: the policy is unknown.
    """

    def __init__(
        self, model: LoopedLM, rows: int, capacity: int, padding: Sequence[int] | None = None, policy: str = "full"
    ) -> None:
        self.model, self.rows, self.capacity, self.policy = model, rows, capacity, policy
        self.kept = visits_kept(policy)
        self.padding = tuple(padding) if padding is not None and any(padding) else None
        if self.padding is not None and len(self.padding) != rows:
            raise ValueError(f"padding must have one number for each of {rows} rows, got {len(self.padding)}")
        self.length = 0
        """Number of positions so far, including padding."""
        self.slots: dict[SlotName, KeysValues] = {}
        self.names = {module: name for name, module in model.named_modules()}

    @property
    def offset(self) -> int | tuple[int, ...]:
        """Position of the next token: one number, or one for each sequence if there is padding. See `NoiseSource.offset`."""
        return self.length if self.padding is None else tuple(self.length - padding for padding in self.padding)

    @property
    def bytes(self) -> int:
        """Memory of all allocated slots, in bytes."""
        return tensor_bytes([tensor for slot in self.slots.values() for tensor in slot])

    def grow(self, count: int) -> Visible:
        """Make room for ``count`` more tokens of each sequence, for one pass over them.

        Call it once for each pass, under the same autocast as the pass.

        Returns:
            The attention mask of the pass. It reads and fills the slots.

        Raises:
            ValueError: the capacity is too small.
        """
        first, self.length = self.length, self.length + count
        if self.length > self.capacity:
            self.length = first
            raise ValueError(f"{first} + {count} positions exceed the cache's capacity of {self.capacity}")
        return self._visible(_Pass(self, first, self.length, Counter()))

    def _visible(self, past: _Pass) -> Visible:
        docs_BS = None
        if self.padding is not None:  # padding counts as another document, so it is hidden
            docs_BS = (torch.arange(past.stop) >= torch.tensor(self.padding)[:, None]).int()
        return self.model.served(Rule(past.stop - past.first, past.stop, docs_BS), past)

    def truncate(self, length: int) -> None:
        """Remove all positions from ``length`` on. Raises ValueError if there are fewer positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} positions to {length}")
        self.length = length

    def take(self, rows: Sequence[int], capacity: int | None = None) -> Cache:
        """Copy some sequences into a new cache.

        Args:
            rows: indices of the sequences, in their new order; an index may occur several times.
            capacity: positions of the new cache; by default those of this cache.

        Returns:
            The new cache. Padding that all its sequences share is removed.

        Raises:
            ValueError: the capacity is too small.
        """
        padding = [0] * len(rows) if self.padding is None else [self.padding[row] for row in rows]
        shared = min(padding, default=0)
        capacity = self.capacity if capacity is None else capacity
        other = Cache(self.model, len(rows), capacity, [pad - shared for pad in padding], self.policy)
        other.length = self.length - shared
        if other.length > capacity:
            raise ValueError(f"{other.length} positions exceed the new cache's capacity of {capacity}")

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
        """Keys and values of a slot, (B, H, capacity, E) each, allocated at the first call."""
        if name not in self.slots:
            shape = (self.rows, like_BHTE.shape[1], self.capacity, like_BHTE.shape[3])
            self.slots[name] = like_BHTE.new_empty(shape), like_BHTE.new_empty(shape)
        return self.slots[name]


@dataclass(eq=False)
class _Pass:
    """A pass over positions ``first`` to ``stop`` - 1 of a cache. Implements `model.attention.Past`."""

    cache: Cache
    first: int
    stop: int
    visits: Counter[nn.Module]
    """Number of visits to each layer so far in this pass."""

    def __post_init__(self) -> None:
        cos_SF, sin_SF = self.cache.model.rope(self.stop)
        here: slice | Tensor = slice(self.first, self.stop)
        if self.cache.padding is not None:  # positions of the padding itself may have any value
            padding_B1 = torch.tensor(self.cache.padding, device=cos_SF.device)[:, None]
            here = (torch.arange(self.first, self.stop, device=cos_SF.device) - padding_B1).clamp(min=0)
        self.rope = cos_SF[here], sin_SF[here]

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> KeysValues:
        if k_BHTE.requires_grad:
            raise ValueError("a cache is for inference only: use it under torch.no_grad()")
        visit, kept = self.visits[layer], self.cache.kept
        self.visits[layer] += 1
        k_BHSE, v_BHSE = self.cache.slot((self.cache.names[layer], visit % kept if kept else visit), k_BHTE)
        k_BHSE[:, :, self.first : self.stop] = k_BHTE
        v_BHSE[:, :, self.first : self.stop] = v_BHTE
        return k_BHSE[:, :, : self.stop], v_BHSE[:, :, : self.stop]
