"""Checkpoints as safetensors and JSON files. `folder` writes and checks their folders.

A checkpoint ``RUN/checkpoints/step-NNNNNNNN/`` holds all that rebuilds the model (weights, averaged weights, configuration,
vocabulary) and all that continues training (optimizer state, counters, the objective's state):

    config.json  state.json  manifest.json
    tokenizer.model  or, of a run on images, images.json
    model.safetensors  ema.safetensors  optimizer.safetensors     written by one process
    slots.safetensors                                             of an objective that keeps tensors between steps
    shard-*.safetensors                                           written by several processes, see `sharded`

`Checkpoint` and `load_checkpoint` read both kinds. Random numbers have no state to save: see `rng`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recurrent_db.config import Config, config_from_json, validate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.data.vocabulary import ImageClasses, Vocabulary
from recurrent_db.distributed.team import Team, sharded_like
from recurrent_db.errors import UserError
from recurrent_db.optim.ema import EMA
from recurrent_db.store.folder import (
    SLOTS_FILE,
    begin_checkpoint,
    cannot_write,
    discard,
    prune,
    seal_checkpoint,
    step_folder,
    write_small_files,
)
from recurrent_db.store.tensors import load_optimizer_tensors, load_weights, optimizer_tensors
from recurrent_db.store.train_state import TrainState, read_state

if TYPE_CHECKING:
    from recurrent_db.store.sharded import ShardedSaver

# `sharded` is imported only where shards are used, because torch.distributed.checkpoint takes a second to import.

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    run_dir: Path,
    config: Config,
    vocabulary: Vocabulary,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    state: TrainState,
    objective_state: dict[str, Any],
    slot_tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of step ``state.step``, and remove all but the newest ``config.run.keep`` checkpoints.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full or the folder cannot be written. Older checkpoints stay intact.
    """
    temporary = begin_checkpoint(run_dir, state.step)
    if temporary is None:
        prune(run_dir, config.run.keep)  # a killed process may have sealed this checkpoint without pruning
        return step_folder(run_dir, state.step)
    try:
        save_file(dict(model.state_dict()), temporary / "model.safetensors")
        save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        if ema is not None:
            save_file(ema.shadow, temporary / "ema.safetensors")
        if slot_tensors:
            save_file({name: t.contiguous() for name, t in slot_tensors.items()}, temporary / SLOTS_FILE)
        updates = ema.updates if ema is not None else 0
        write_small_files(temporary, config, vocabulary, state, objective_state, updates)
        return seal_checkpoint(run_dir, temporary, state.step, vocabulary, config.run.keep)
    except (OSError, SafetensorError) as error:
        discard(temporary)
        raise UserError(cannot_write(step_folder(run_dir, state.step), error)) from None


@dataclass
class Saver:
    """Writes the checkpoints of a run that trains in one process."""

    run_dir: Path
    config: Config
    vocabulary: Vocabulary

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        state: TrainState,
        objective_state: dict[str, Any],
        slot_tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint. See `save_checkpoint`."""
        what = model, optimizer, ema, state, objective_state, slot_tensors
        save_checkpoint(self.run_dir, self.config, self.vocabulary, *what)

    def finish(self) -> None:
        """Does nothing: `save` returns only when the checkpoint is complete."""


def build_saver(team: Team, run_dir: Path, config: Config, vocabulary: Vocabulary) -> Saver | ShardedSaver:
    """The saver of a run: whole files in mode "none", shards in modes "ddp" and "fsdp"."""
    if team.mode == "none":
        return Saver(run_dir, config, vocabulary)
    from recurrent_db.store.sharded import ShardedSaver

    return ShardedSaver(team, run_dir, config, vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Checkpoint:
    """A checkpoint that `folder.fault` found undamaged. Files are read when a method needs them."""

    path: Path

    def config(self) -> Config:
        """The run's configuration, with the size and classes of its images. Raises `UserError` if it is invalid."""
        text = (self.path / "config.json").read_text(encoding="utf-8", errors="replace")
        config = config_from_json(text, str(self.path / "config.json"))
        images = self.vocabulary() if self._of_images else None
        if isinstance(images, ImageClasses):
            config.model.image_size, config.model.n_classes = list(images.size), len(images.classes)
            validate(config)
        return config

    @property
    def _of_images(self) -> bool:
        return (self.path / ImageClasses.file_name).exists()

    def vocabulary(self) -> Vocabulary:
        """The run's tokenizer, or the classes of its images."""
        if self._of_images:
            return ImageClasses.from_bytes((self.path / ImageClasses.file_name).read_bytes())
        return self.tokenizer()

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer. Raises `UserError` if the run was trained on images."""
        path = self.path / Tokenizer.file_name
        if not path.exists():
            raise UserError(f"{self.path} was trained on images, not on text: use eval/images.py")
        return Tokenizer.from_bytes(path.read_bytes())

    def training(self) -> tuple[TrainState, dict[str, Any], int]:
        """The run's counters, the objective's state, and the number of EMA updates. See `read_state`."""
        return read_state(self.path / "state.json")

    @property
    def sharded(self) -> bool:
        """Whether several processes wrote the checkpoint as shards."""
        return not (self.path / "model.safetensors").exists()

    def weights(self, averaged: bool = False, keep: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """Whole parameters by name, on the CPU.

        Args:
            averaged: return the EMA of the weights if the run kept one.
            keep: selects parameters by name; None selects all. Other tensors of a whole file are not read.
        """
        if self.sharded:
            from recurrent_db.store.sharded import read_shards

            found = (averaged and read_shards(self.path, "average")) or read_shards(self.path, "weights")
            return {name: value for name, value in found.items() if keep is None or keep(name)}
        average = self.path / "ema.safetensors"
        return _tensors(average if averaged and average.exists() else self.path / "model.safetensors", keep)

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state as whole tensors on the CPU, named as in `optimizer_tensors`."""
        if self.sharded:
            from recurrent_db.store.sharded import read_shards

            return read_shards(self.path, "optimizer")
        return _tensors(self.path / "optimizer.safetensors")

    def slot_tensors(self, slots: range) -> dict[str, Tensor]:
        """What the objective keeps for these slots of the batch (`Objective.slot_tensors`), on the CPU."""
        numbers = set(map(str, slots))
        if self.sharded:
            from recurrent_db.store.sharded import read_shards

            return read_shards(self.path, "slots", lambda name: name.rpartition(".")[2] in numbers)
        path = self.path / SLOTS_FILE
        return _tensors(path, lambda name: name.rpartition(".")[2] in numbers) if path.exists() else {}


def _tensors(path: Path, keep: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU: the tensors that ``keep`` selects. Raises `UserError` for a bad file."""
    try:
        if keep is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> None:
    """Fill a model, its optimizer and its EMA from a checkpoint, to continue training.

    Optimizer state that the checkpoint lacks is cleared, because those parameters had not been trained.

    Raises:
        UserError: the tensors do not fit the model, or cannot be read.
    """
    optimizer.state.clear()
    if checkpoint.sharded:
        from recurrent_db.store.sharded import load_shards

        load_shards(checkpoint.path, model, optimizer, ema)
        return
    load_weights(model, checkpoint.weights(), str(checkpoint.path))
    load_optimizer_tensors(model, optimizer, checkpoint.optimizer())
    if ema is not None:
        averaged = checkpoint.weights(averaged=True)
        with torch.no_grad():
            for name, shadow in ema.shadow.items():
                shadow.copy_(sharded_like(averaged[name], shadow))
