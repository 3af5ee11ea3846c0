"""The token sequences that a decoder continues together, and the context of each that the model sees.

A sequence is a prompt and the tokens added to it, numbered like the prompts. A row is the place of one sequence in the
decoder's cache.

A context has at most ``window`` tokens (the model's ``max_seq_len``). A longer prompt is cut to its last tokens. When a
context outgrows the window, its older half is dropped and the rest is run again, as if the text started there. The context
of a long text thus varies between half a window plus one token and a whole window.
"""

from __future__ import annotations

from collections.abc import Sequence

from recurrent_db.errors import UserError


def context_start(prompt: int, length: int, window: int) -> int:
    """Start of the context in a sequence of ``length`` tokens, whose first ``prompt`` tokens are the prompt."""
    start, half = max(0, prompt - window), max(1, window // 2)
    return start + half * max(0, -((window + start - length) // half))


class SequenceBatch:
    """Sequences that grow until they end.

    Args:
        prompts: token ids, at least one per prompt.
        window: largest number of tokens in a context.
        max_new_tokens: largest number of tokens to add to a sequence.

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
        """Start of each sequence's context."""
        self.rows: list[int] = []
        """The sequence in each row of the cache."""

    def append(self, sequence: int, token: int) -> None:
        """Add a token. Ends the sequence after ``max_new_tokens``."""
        self.ids[sequence].append(token)
        if len(self.ids[sequence]) == self._prompts[sequence] + self.max_new_tokens:
            self.end(sequence)

    def end(self, sequence: int) -> None:
        self.active.remove(sequence)

    def context(self, sequence: int) -> list[int]:
        """The tokens that the model sees."""
        return self.ids[sequence][self.starts[sequence] :]

    def context_limit(self, sequence: int) -> int:
        """Largest number of positions that are run for the current context. The last token of a text is never run."""
        return min(self.window, self._prompts[sequence] + self.max_new_tokens - 1 - self.starts[sequence])

    def slide(self) -> list[int]:
        """Drop the older half of contexts that have outgrown the window. Returns the sequences concerned."""
        outgrown = [sequence for sequence in self.active if len(self.context(sequence)) > self.window]
        for sequence in outgrown:
            self.starts[sequence] = context_start(self._prompts[sequence], len(self.ids[sequence]), self.window)
        return outgrown

    @property
    def half_ended(self) -> bool:
        """Whether at least half of the rows hold sequences that have ended."""
        return 2 * len(self.active) <= len(self.rows)

    def drop_ended(self) -> list[int]:
        """Remove ended sequences from the rows. Returns the former numbers of the rows that remain."""
        kept = [row for row, sequence in enumerate(self.rows) if sequence in self.active]
        self.rows = list(self.active)
        return kept
