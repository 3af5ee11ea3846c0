"""What a library's tokenizer is to `tokenizer.Tokenizer`: a function that encodes, and the bytes of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A loaded tokenizer, whichever library encodes."""

    encode: Callable[[Sequence[str], int], list[list[int]]]
    """(texts, threads) -> token ids of each text. The texts hold no lone surrogates."""
    token_bytes: list[bytes]
    """The bytes that each token stands for; b"" for special tokens."""
    eos_id: int
    bos_id: int
    pad_id: int
