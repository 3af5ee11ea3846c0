"""A task is a kind of training data: it supplies batches and held-out scores. The trainer uses data only through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from recurrent_db.config import Config, rows_of_vocabulary
from recurrent_db.data import Batch, Loader, Slots, load_tokenizer, open_data, validation_batches
from recurrent_db.data.vocabulary import Vocabulary
from recurrent_db.distributed.team import Team
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import score
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.attention import Need, choose
from recurrent_db.objectives import Objective
from recurrent_db.training import guard
from recurrent_db.training.image_task import ImageTask
from recurrent_db.training.loader_task import LoaderTask

SCORED_AT_ONCE = 16
"""Held-out sequences per forward pass."""


class Task(Protocol):
    """A kind of data, such as `TextTask`."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Saved in every checkpoint, so that the model's outputs can be decoded."""
        ...

    floor: float
    """Entropy of the target frequencies in nats per token: the loss of a model that knows only these frequencies."""
    tokens_per_step: int
    """Positions that one optimizer step trains, over all processes."""

    def build_model(self, objective: Objective, bfloat16: bool) -> Any:
        """The network that the objective trains, with its initial weights. ``bfloat16``: it runs under autocast."""
        ...

    def describe(self, model: Any) -> Iterator[str]:
        """Log lines about the network and the data."""
        ...

    def batches(self, step: int, seed: int, slots: Slots) -> Iterator[Iterable[Any]]:
        """For each optimizer step from ``step`` on, this process's micro-batches, on its device.

        ``seed`` determines the order of the data, and ``slots`` for how many steps a sample is used.
        """
        ...

    def sample(self) -> Any:
        """One micro-batch of this process, always the same."""
        ...

    def evaluate(self, model: Any, objective: Objective) -> dict[str, float]:
        """Held-out scores as columns of metrics.jsonl."""
        ...

    def state_rms(self, model: Any, batch: Any) -> list[float]:
        """RMS of the state after each iteration for one sample of a batch; empty if the network has no loop."""
        ...


def build_task(config: Config, team: Team) -> Task:
    """The task of a configuration: `TASKS` by the data that its objective trains on."""
    return TASKS[config.objective.own.data](config, team)


class TextTask(LoaderTask[Batch]):
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
        super().__init__(config, team)
        self.tokens_per_step = data.batch_size * data.sequence_length
        self.shards = open_data(data.path, "train", verify=True)
        self.vocabulary = self.tokenizer = load_tokenizer(data.path)
        self.loader = Loader(self.shards, data.sequence_length, data.batch_size, config.seed, data.mixture or None)
        self.floor = guard.unigram_entropy(self.shards, data.mixture)
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

    def build_model(self, objective: Objective, bfloat16: bool) -> LoopedLM:
        """The model with its recurrence and attention back end."""
        config, device = self.config, self.team.device
        need = Need(
            device=device,
            dtype=torch.bfloat16 if bfloat16 else torch.float32,
            head_size=config.model.d_head,
            documents=config.data.document_mask,
            two_stream=objective.two_stream,
        )
        attention, self.attention_line = choose(config.run.attention, need)
        model = build_model(config.model, config.seed, device, config.blocks.only)
        model.recurrence, model.attention = objective.recurrence, attention
        model.document_mask = config.data.document_mask
        model.checkpoint_activations(config.run.activation_checkpointing)
        if config.run.compile:
            model.compile_parts()
        objective.prepare(model)
        return model

    def describe(self, model: LoopedLM) -> Iterator[str]:
        counts = model.parameter_counts()
        yield (
            f"{self.config.objective.name} on {self.team}: {counts['total']:,} parameters"
            f" ({counts['total'] - counts['embedding']:,} without the embedding)"
            f" + {counts['noise_conditioning']:,} for noise conditioning"
        )
        line = f"{self.shards.tokens:,} training tokens, {self.tokens_per_step:,} per step"
        settings, length = self.config.eval, self.config.data.sequence_length
        there = sum(max(0, source.tokens - 1) // length for source in self.validation.sources.values()) * length
        if settings.points and there < settings.tokens // length * length:
            line += (
                f"; the validation split is short: {there:,} tokens are scored, not eval.tokens = {settings.tokens:,}"
            )
        yield line
        yield self.attention_line

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

    def state_rms(self, model: LoopedLM, batch: Batch) -> list[float]:
        return guard.state_rms(model, batch.tokens_BT, self.config)


TASKS: dict[str, Callable[[Config, Team], Task]] = {"text": TextTask, "images": ImageTask}
"""The task of each kind of data (`ObjectiveSection.data`)."""
