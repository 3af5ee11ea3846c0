"""The token sequences that a decoder continues together, and the part of each that the model sees.

A sequence is a prompt and the tokens added to it; it is known by its place among the prompts. A row is a place in the
decoder's cache, which holds one sequence.

A context holds at most a window of tokens (the model's ``max_seq_len``). A longer prompt is cut to its last tokens. When a
context outgrows the window, its older half is forgotten and the rest is read again, so a context is what it would be if
the text had started there: from half a window and one token to a whole window.
"""

from __future__ import annotations

from collections.abc import Sequence

from recurrent_db.errors import UserError


def context_start(prompt: int, length: int, window: int) -> int:
    """Where the context of a sequence of ``length`` tokens starts whose first ``prompt`` tokens are the prompt."""
    start, half = max(0, prompt - window), max(1, window // 2)
    return start + half * max(0, -((window + start - length) // half))


class SequenceBatch:
    """Sequences that grow until they end.

    Args:
        prompts: token ids, one or more each.
        window: the most tokens of a context.
        max_new_tokens: the most tokens to add to a sequence.

    Raises:
        UserError: a prompt is empty.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], window: int, max_new_tokens: int) -> None:
        if not all(prompts):
            raise UserError("a prompt needs at least one token")
        self.window, self.max_new_tokens = window, max_new_tokens
        self.ids = [list(prompt) for prompt in prompts]
        self.active = list(range(len(prompts))) if max_new_tokens else []
        """Sequences that have not ended, in order."""
        self._prompts = [len(prompt) for prompt in prompts]
        self.starts = [context_start(length, length, window) for length in self._prompts]
        """Where each sequence's context starts."""
        self.rows: list[int] = []
        """The sequence of each row of the cache."""

    def append(self, sequence: int, token: int) -> None:
        """Add a token, and end the sequence where it was the last of ``max_new_tokens``."""
        self.ids[sequence].append(token)
        if len(self.ids[sequence]) == self._prompts[sequence] + self.max_new_tokens:
            self.end(sequence)

    def end(self, sequence: int) -> None:
        self.active.remove(sequence)

    def context(self, sequence: int) -> list[int]:
        """The tokens that the model sees."""
        return self.ids[sequence][self.starts[sequence] :]

    def context_limit(self, sequence: int) -> int:
        """The most positions of a context that are ever run; the last token of a text is not."""
        return min(self.window, self._prompts[sequence] + self.max_new_tokens - 1 - self.starts[sequence])

    def slide(self) -> list[int]:
        """Forget the older half of contexts that have outgrown the window. Returns their sequences."""
        outgrown = [sequence for sequence in self.active if len(self.context(sequence)) > self.window]
        for sequence in outgrown:
            self.starts[sequence] = context_start(self._prompts[sequence], len(self.ids[sequence]), self.window)
        return outgrown

    @property
    def half_ended(self) -> bool:
        """Whether at least half of the rows hold sequences that have ended."""
        return 2 * len(self.active) <= len(self.rows)

    def drop_ended(self) -> list[int]:
        """Give rows to active sequences alone. Returns the old numbers of the rows that stay."""
        kept = [row for row, sequence in enumerate(self.rows) if sequence in self.active]
        self.rows = list(self.active)
        return kept
