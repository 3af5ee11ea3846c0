"""What a run trains on: batches to train, and held-out scores. The trainer knows no kind of data but through a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from recurrent_db.config import Config, rows_of_vocabulary
from recurrent_db.data import Batch, Loader, load_tokenizer, open_data, prefetch, validation_batches
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.distributed.team import Team
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import score
from recurrent_db.model import LoopedLM
from recurrent_db.objectives import Objective
from recurrent_db.training.guard import unigram_entropy

SCORED_AT_ONCE = 16
"""Held-out sequences in one forward pass."""


class Task(Protocol):
    """A kind of data. See `TextTask`."""

    tokenizer: Tokenizer
    """What checkpoints keep, so that their model's outputs can be read."""
    floor: float
    """Entropy of the targets' frequencies, in nats: what a model reaches that has learned nothing else."""
    tokens_per_step: int
    """Positions that an optimizer step trains, over all processes."""

    def describe(self) -> str:
        """A line about the data."""
        ...

    def batches(self, step: int, seed: int) -> Iterator[Iterable[Batch]]:
        """From ``step`` on, the micro-batches of each step that fall to this process, on its device. ``seed`` keys the order
        of the data."""
        ...

    def sample(self) -> Batch:
        """One micro-batch of this process."""
        ...

    def evaluate(self, model: LoopedLM, objective: Objective) -> dict[str, float]:
        """Held-out scores as columns of metrics.jsonl."""
        ...


def build_task(config: Config, team: Team) -> Task:
    """The task that a configuration describes. Arguments and errors as of the tasks."""
    return TextTask(config, team)


class TextTask:
    """Text: token shards in, next tokens out.

    Args:
        config: of the run; ``model.vocab_size`` is filled in from the tokenizer.
        team: the processes that share the batches.

    Raises:
        UserError: no data there, damaged data, data of two tokenizers, or a vocabulary that is too small.
    """

    def __init__(self, config: Config, team: Team) -> None:
        data = config.data
        if not data.path:
            raise UserError("data.path is not set: give a folder made by train/prepare_data.py with --data.path DIR")
        self.config, self.team = config, team
        share = team.sequences_per_process(data.batch_size)
        self.micro_batch_size = min(data.micro_batch_size or share, share)
        self.tokens_per_step = data.batch_size * data.sequence_length
        self.shards = open_data(data.path, "train", verify=True)
        self.tokenizer = load_tokenizer(data.path)
        self.loader = Loader(self.shards, data.sequence_length, data.batch_size, config.seed, data.mixture or None)
        self.floor = unigram_entropy(self.shards)
        self.validation = open_data(
            data.val_path or data.path, "validation", expect_tokenizer_hash=self.tokenizer.hash, verify=True
        )
        rows = rows_of_vocabulary(config, self.tokenizer.vocab_size)
        config.model.vocab_size = config.model.vocab_size or rows
        if config.model.vocab_size < rows:
            raise UserError(
                f"model.vocab_size = {config.model.vocab_size} is below the tokenizer's {self.tokenizer.vocab_size} tokens"
            )
        if config.eval.points:  # found out now, and not at the first evaluation
            next(validation_batches(self.validation, data.sequence_length, 1, data.sequence_length))

    def describe(self) -> str:
        return f"{self.shards.tokens:,} training tokens, {self.tokens_per_step:,} a step"

    def batches(self, step: int, seed: int) -> Iterator[Iterable[Batch]]:
        self.loader.seed = seed
        team = self.team
        return prefetch(self.loader, step, self.micro_batch_size, team.device, rank=team.rank, world=team.world)

    def sample(self) -> Batch:
        first = self.loader.micro_batches(0, self.micro_batch_size, self.team.rank, self.team.world)
        return next(iter(first)).to(self.team.device)

    def evaluate(self, model: LoopedLM, objective: Objective) -> dict[str, float]:
        """The objective's own scores, or the likelihood by K."""
        team, settings, length = self.team, self.config.eval, self.config.data.sequence_length
        batches = list(
            validation_batches(self.validation, length, SCORED_AT_ONCE, settings.tokens, team.rank, team.world)
        )
        row = objective.held_out(model, batches, self.tokenizer, self.config.seed)
        if row:
            return row
        lengths = self.tokenizer.byte_lengths()
        beating = team.beating(batches)
        return score(model, beating, settings.k, lengths, settings.draws, self.config.seed, team.processes).row()
