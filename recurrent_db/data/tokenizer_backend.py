"""The interface between `tokenizer.Tokenizer` and the tokenizer libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A loaded tokenizer of one library."""

    encode: Callable[[Sequence[str], int], list[list[int]]]
    """(texts, threads) -> token ids of each text. The texts contain no lone surrogates."""
    token_bytes: list[bytes]
    """The bytes that each token id stands for; b"" for special tokens."""
    eos_id: int
    bos_id: int
    pad_id: int
