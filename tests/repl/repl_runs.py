"""The models of the REPL's tests."""

from __future__ import annotations

from collections.abc import Callable

from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.model import LoopedLM

WINDOW = 64
Loaded = tuple[LoopedLM, Tokenizer]
Command = Callable[..., list[str]]
