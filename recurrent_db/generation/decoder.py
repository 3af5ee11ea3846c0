"""The base class of all decoders, and the statistics that they collect.

`sequential.SequentialDecoder` supports every model. Other decoders (`loop_decoder.LoopDecoder` and its subclasses) compute
iterations in another number or order. They need a model whose inference is a plain loop.

Noise and sampled tokens are a function of (seed, request, position). The other prompts of a batch therefore change a text
only through rounding.
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
    """Counts of a decoder, filled while it runs. All but ``tokens`` include tokens drawn after the end of a text."""

    tokens: int = 0
    """Number of new tokens, including tokens that ended a text."""
    steps: int = 0
    """Number of calls of `Decoder.step`."""
    drafted: int = 0
    """Number of drafted tokens that were accepted or rejected. The unverified diagonal sampler also counts each change of a
    token after later positions have used it."""
    accepted: int = 0
    """Number of drafted tokens that were accepted."""
    positions: int = 0
    """Number of positions whose next token was drawn."""
    iterations: int = 0
    """Core iterations of these positions, summed."""

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; NaN if none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def mean_k(self) -> float:
        """Mean number of core iterations per token; NaN without tokens."""
        return self.iterations / self.positions if self.positions else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """New tokens of all sequences per step; NaN without steps."""
        return self.tokens / self.steps if self.steps else float("nan")


EndsText = Callable[[int, int], bool]
"""Called with the index of a sequence and its new token; returns whether the token ends the text (and is not part of it)."""


def never(sequence: int, token: int) -> bool:
    """The `EndsText` of texts that only their length ends."""
    return False


class Decoder(ABC):
    """Continues several prompts together.

    Args:
        model: the model.
        prompts: token ids, at least one per prompt.
        options: options of the generation.
        requests: one number per prompt, which with the seed keys its random stream; 0, 1, ... by default.
        stats: counts, filled while the decoder runs.

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
        """Compute the next tokens of active sequences, as pairs (sequence, tokens).

        Sequences without new tokens are left out. The caller must append the tokens to ``batch`` before the next step.
        """

    @property
    @abstractmethod
    def flops(self) -> float:
        """Forward FLOPs so far, including rejected drafts and sequences that have ended but remain in the batch."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Allocated memory of the key-value cache, in bytes."""

    def stream(self, ends_text: EndsText = never) -> Iterator[tuple[int, int]]:
        """Yield (sequence, token) for each new token until all sequences have ended."""
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
        """A uniform random number in [0, 1), keyed by sequence, purpose and position."""
        return self.rng.uniform([self.requests[sequence]], (1,), f"{purpose}/{position}").item()

    def draw(self, sequence: int, logits_V: Tensor, ids: Sequence[int]) -> int:
        """Draw the token that follows ``ids`` in a sequence."""
        return draw(logits_V, self.options, ids, self.uniform(sequence, "token", len(ids)))
