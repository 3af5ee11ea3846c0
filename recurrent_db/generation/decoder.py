"""What continues prompts: the base class of all decoders, and what they count.

`sequential.SequentialDecoder` serves every model. The others (`loop_decoder.LoopDecoder` and its subclasses) serve models
whose inference is a plain loop, and take other numbers of iterations or other orders.

The draws of noise and of tokens are a function of (seed, request, position). What a prompt is batched with thus changes its
text by no more than rounding can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sampling import draw
from recurrent_db.generation.sequences import SequenceBatch
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import EVALUATION_STEP, Rng


@dataclass
class DecodingStats:
    """Counts of a decoder, filled while it runs. All but ``tokens`` include tokens that were drawn after a text's end."""

    tokens: int = 0
    """New tokens, with those that ended a text."""
    steps: int = 0
    """Calls of `Decoder.step`."""
    drafted: int = 0
    """Drafted tokens that a verification has decided on. Along an unverified diagonal, also each change of a token that
    later positions were built on."""
    accepted: int = 0
    """Drafted tokens that held."""
    positions: int = 0
    """Positions whose next token was drawn."""
    iterations: int = 0
    """Core iterations of these positions, summed."""

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that held; nan without any."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def mean_k(self) -> float:
        """Mean number of iterations behind a token; nan without any."""
        return self.iterations / self.positions if self.positions else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """New tokens of all sequences for each step; nan without any."""
        return self.tokens / self.steps if self.steps else float("nan")


EndsText = Callable[[int, int], bool]
"""Called with a sequence and its new token: whether the token ends the text, and is no part of it."""


def never(sequence: int, token: int) -> bool:
    """The `EndsText` of texts that end by their length alone."""
    return False


class Decoder(ABC):
    """Continues prompts together.

    Args:
        prompts: token ids, one or more each.
        requests: keys of the draws, one for each prompt; 0, 1, ... by default.
        stats: filled while the decoder runs.

    Raises:
        UserError: a prompt is empty.
    """

    def __init__(
        self,
        model: LoopedLM,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        requests: Sequence[int] | None = None,
        stats: DecodingStats | None = None,
    ) -> None:
        self.model, self.options, self.k = model, options, options.k
        self.batch = SequenceBatch(prompts, model.config.max_seq_len, options.max_new_tokens)
        self.requests = list(range(len(prompts))) if requests is None else list(requests)
        self.rng = Rng(options.seed, EVALUATION_STEP)
        self.stats = DecodingStats() if stats is None else stats

    @abstractmethod
    def step(self) -> list[tuple[int, list[int]]]:
        """The next tokens of active sequences, as (sequence, tokens). Sequences without new tokens are left out. The caller
        appends the tokens to the batch before the next step."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Forward FLOPs so far, with lost drafts and rows of ended sequences."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the key-value cache, filled or not."""

    def stream(self, ends_text: EndsText = never) -> Iterator[tuple[int, int]]:
        """Yield (sequence, token) as tokens are drawn, until all sequences have ended."""
        batch = self.batch
        while batch.active:
            for sequence, tokens in self.step():
                for token in tokens:
                    self.stats.tokens += 1
                    if ends_text(sequence, token):
                        batch.end(sequence)
                        break
                    batch.append(sequence, token)
                    yield sequence, token
                    if sequence not in batch.active:
                        break

    def uniform(self, sequence: int, purpose: str, position: int) -> float:
        """A uniform draw in [0, 1) for the token at a position of a sequence."""
        return self.rng.uniform([self.requests[sequence]], (1,), f"{purpose}/{position}").item()

    def draw(self, sequence: int, logits_V: Tensor, ids: Sequence[int]) -> int:
        """The token that follows ``ids`` in a sequence."""
        return draw(logits_V, self.options, ids, self.uniform(sequence, "token", len(ids)))
