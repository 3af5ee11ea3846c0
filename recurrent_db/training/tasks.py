"""A task is a kind of training data: it supplies batches and held-out scores. The trainer uses data only through it."""

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
"""Held-out sequences per forward pass."""


class Task(Protocol):
    """A kind of data, such as `TextTask`."""

    tokenizer: Tokenizer
    """Saved in every checkpoint, so that the model's outputs can be decoded."""
    floor: float
    """Entropy of the target frequencies in nats per token: the loss of a model that knows only these frequencies."""
    tokens_per_step: int
    """Positions that one optimizer step trains, over all processes."""

    def describe(self) -> str:
        """One log line about the data."""
        ...

    def batches(self, step: int, seed: int) -> Iterator[Iterable[Batch]]:
        """For each optimizer step from ``step`` on, this process's micro-batches, on its device.

        ``seed`` determines the order of the data.
        """
        ...

    def sample(self) -> Batch:
        """One micro-batch of this process, always the same."""
        ...

    def evaluate(self, model: LoopedLM, objective: Objective) -> dict[str, float]:
        """Held-out scores as columns of metrics.jsonl."""
        ...


def build_task(config: Config, team: Team) -> Task:
    """The task of a configuration. Arguments and errors are those of `TextTask`."""
    return TextTask(config, team)


class TextTask:
    """Next-token prediction on token shards.

    Args:
        config: the run's configuration. A ``model.vocab_size`` of 0 is replaced by the tokenizer's.
        team: the processes that share the batches.

    Raises:
        UserError: the data is missing or damaged, training and validation data have different tokenizers, or
            ``model.vocab_size`` is below the tokenizer's.
    """

    def __init__(self, config: Config, team: Team) -> None:
        data = config.data
        if not data.path:
            raise UserError("data.path is not set: name a folder made by train/prepare_data.py with --data.path DIR")
        self.config, self.team = config, team
        share = team.sequences_per_process(data.batch_size)
        self.micro_batch_size = min(data.micro_batch_size or share, share)
        self.tokens_per_step = data.batch_size * data.sequence_length
        self.shards = open_data(data.path, "train", verify=True)
        self.tokenizer = load_tokenizer(data.path)
        self.loader = Loader(self.shards, data.sequence_length, data.batch_size, config.seed, data.mixture or None)
        self.floor = unigram_entropy(self.shards, data.mixture)
        self.validation = open_data(
            data.val_path or data.path, "validation", expect_tokenizer_hash=self.tokenizer.hash, verify=True
        )
        rows = rows_of_vocabulary(config, self.tokenizer.vocab_size)
        config.model.vocab_size = config.model.vocab_size or rows
        if config.model.vocab_size < rows:
            raise UserError(
                f"model.vocab_size = {config.model.vocab_size} is below the tokenizer's {self.tokenizer.vocab_size} tokens"
            )
        if config.eval.points:  # fail before training if the validation data is too short
            next(validation_batches(self.validation, data.sequence_length, 1, data.sequence_length))

    def describe(self) -> str:
        line = f"{self.shards.tokens:,} training tokens, {self.tokens_per_step:,} per step"
        settings, length = self.config.eval, self.config.data.sequence_length
        there = sum(max(0, source.tokens - 1) // length for source in self.validation.sources.values()) * length
        if settings.points and there < settings.tokens // length * length:
            line += (
                f"; the validation split is short: {there:,} tokens are scored, not eval.tokens = {settings.tokens:,}"
            )
        return line

    def batches(self, step: int, seed: int) -> Iterator[Iterable[Batch]]:
        self.loader.seed = seed
        team = self.team
        return prefetch(self.loader, step, self.micro_batch_size, team.device, rank=team.rank, world=team.world)

    def sample(self) -> Batch:
        first = self.loader.micro_batches(0, self.micro_batch_size, self.team.rank, self.team.world)
        return next(iter(first)).to(self.team.device)

    def evaluate(self, model: LoopedLM, objective: Objective) -> dict[str, float]:
        """The objective's own held-out scores if it has any, else the NLL by K."""
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
