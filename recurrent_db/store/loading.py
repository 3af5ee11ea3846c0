"""Loads models from run directories: ``model, tokenizer = recurrent_db.load(RUN)``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from recurrent_db.accounting.hardware import choose_device
from recurrent_db.config import Config, validate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.data.vocabulary import ImageClasses, Vocabulary
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.errors import UserError
from recurrent_db.files import expand_user
from recurrent_db.model import LoopedLM
from recurrent_db.model.blocks_lm import BlocksLM, plain_weights
from recurrent_db.model.build import build_network
from recurrent_db.model.vit import ViT
from recurrent_db.objectives import Objective, build_objective, load_objective_state
from recurrent_db.objectives.block_choice import trains_shared
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.tensors import check_weights, load_weights


def trained_objective(checkpoint: Checkpoint, config: Config) -> Objective:
    """A checkpoint's objective with its saved state. Prints a warning if the core was never trained."""
    objective = build_objective(config)
    load_objective_state(objective, checkpoint.training()[1], str(checkpoint.path))
    if not objective.core_trained:
        print(
            f"warning: {checkpoint.path} was saved in the skip-core phase: its core is untrained",
            file=sys.stderr,
        )
    return objective


def load_with_config(
    path: str | Path,
    device: str | torch.device = "auto",
    averaged: bool = True,
    walk: Mapping[str, str | None] | None = None,
) -> tuple[LoopedLM, Tokenizer, Config, Path]:
    """Like `load`, but also returns the run's configuration and the checkpoint's folder.

    Args:
        walk: settings of a denoiser's walk that replace the run's own: ``bridge``, ``sampler``, ``grid`` of
            objective_config.DenoiseConfig. None values keep the run's own.
    """
    target = choose_device(str(device))
    checkpoint = Checkpoint(find_checkpoint(Path(expand_user(str(path)))))
    config = checkpoint.config()
    chosen = {name: value for name, value in (walk or {}).items() if value is not None}
    if chosen:
        if not all(hasattr(config.objective.own, name) for name in chosen):
            raise UserError(f"{path} is a {config.objective.name} run, which has no setting {', '.join(chosen)}")
        for name, value in chosen.items():
            setattr(config.objective.own, name, value)
        validate(config)
    tokenizer, model = checkpoint.tokenizer(), _load_network(checkpoint, config, averaged)
    assert isinstance(model, LoopedLM)
    model.recurrence = trained_objective(checkpoint, config).recurrence
    model.document_mask = config.data.document_mask
    return model.to(target).eval(), tokenizer, config, checkpoint.path


def _load_network(checkpoint: Checkpoint, config: Config, averaged: bool) -> nn.Module:
    """Build the network of a checkpoint and fill it, on the CPU. Raises `UserError` if the weights do not fit."""
    weights, shape, source = checkpoint.weights(averaged), config.model, str(checkpoint.path)
    # Check before allocating anything: a malicious configuration may claim any size.
    if shape.n_prelude + shape.n_core + shape.n_coda > len(weights):
        raise UserError(f"{source}: the configuration has more layers than the weights have tensors")
    check_weights(build_network(config, None, "meta"), weights, source)
    network = build_network(config, None)
    load_weights(network, weights, source)
    return network


@dataclass
class ImageRun:
    """A network that was trained on images, from a checkpoint."""

    network: ViT | DiffusionBlocks
    """In fp32 and evaluation mode."""
    images: ImageClasses
    """The size and classes of the images."""
    config: Config
    path: Path
    """The checkpoint's folder."""


def load_image_run(path: str | Path, device: str | torch.device = "auto", averaged: bool = True) -> ImageRun:
    """Load a network that was trained on images. Arguments and errors are those of `load`."""
    target = choose_device(str(device))
    checkpoint = Checkpoint(find_checkpoint(Path(expand_user(str(path)))))
    config, images = checkpoint.config(), checkpoint.vocabulary()
    if not isinstance(images, ImageClasses):
        raise UserError(f"{path} was trained on text, not on images")
    network = cast(ViT | DiffusionBlocks, _load_network(checkpoint, config, averaged))
    return ImageRun(network.to(target).eval(), images, config, checkpoint.path)


def load(
    path: str | Path, device: str | torch.device = "auto", averaged: bool = True, compiled: bool = False
) -> tuple[LoopedLM, Tokenizer]:
    """Load a model for inference. Nothing in a checkpoint is executed.

    Args:
        path: run directory, whose newest undamaged checkpoint is loaded, or checkpoint folder.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (CUDA if available).
        averaged: load the EMA of the weights if the run kept one.
        compiled: compile decoding with torch.compile (`LoopedLM.compile_decoding`). The first text then takes longer.

    Returns:
        The model in fp32 and evaluation mode, and its tokenizer.

    Raises:
        UserError: the run, an undamaged checkpoint or the device does not exist, or the checkpoint's files do not fit
            together.
    """
    model, tokenizer, _, _ = load_with_config(path, device, averaged)
    if compiled:
        model.compile_decoding()
    return model, tokenizer


def _is_shared(name: str) -> bool:
    """Whether a parameter of a model in blocks is shared by the blocks."""
    return not name.startswith("blocks.")


def start_from(model: nn.Module, config: Config, vocabulary: Vocabulary) -> str:
    """Fill a new run's model from the run ``init.from``. Returns a log line that says what was loaded.

    If only the new model is conditioned on noise, it keeps its zero-initialised conditioning. A model in blocks loads the
    shared parameters and the blocks that both runs hold. Nothing else is read.

    Raises:
        UserError: the run does not exist, its tokenizer or shape differs, or its core was never trained.
    """
    source = Checkpoint(find_checkpoint(Path(config.init.from_)))
    if source.vocabulary().hash != vocabulary.hash:
        raise UserError(
            f"init.from {config.init.from_} and data.path {config.data.path} have different {vocabulary.kind}"
        )
    if not trained_objective(source, source.config()).core_trained:
        raise UserError(
            f"init.from {config.init.from_} was saved in the skip-core phase, so its core is untrained:"
            " continue that run with --resume first"
        )
    if not isinstance(model, BlocksLM | DiffusionBlocks):
        load_weights(model, source.weights(averaged=True), str(source.path), allow_new=("noise_embedding.",))
        return f"starting from the weights of {source.path}"
    theirs = source.config().model
    if not theirs.n_blocks and theirs.n_core != config.model.n_core:
        raise UserError(
            f"init.from {config.init.from_} has {theirs.n_core} layers, but this model has {config.model.n_core} in blocks"
        )
    held = tuple(f"blocks.{number}." for number in model.held())
    keep = (lambda name: _is_shared(name) or name.startswith(held)) if theirs.n_blocks else None
    weights = plain_weights(source.weights(averaged=True, keep=keep), config.model)
    if not weights:
        raise UserError(f"init.from {config.init.from_} does not hold block {config.blocks.only}")
    load_weights(model, weights, str(source.path), allow_new=("noise_embedding.", "blocks."))
    taken = [number for number in model.held() if any(name.startswith(f"blocks.{number}.") for name in weights)]
    drawn = [number for number in model.held() if number not in taken]
    spent = source.training()[0].spent(source.config().budget)
    moves = config.blocks.only and config.blocks.shared == "owned" and not trains_shared(config, config.blocks.only)
    shared = ["its embedding"] if any(map(_is_shared, weights)) else []
    return (
        f"starting from {source.path}: "
        + ", ".join([*shared, *(f"block {number}" for number in taken)])
        + "".join(f"; block {number} is newly initialised" for number in drawn)
        + (f"; that run used {spent:.0%} of its budget and must not be trained further" if moves and spent < 1 else "")
    )


def check_owner(model: nn.Module, config: Config) -> None:
    """Check that a resumed block has the same shared parameters as the block that owns them, if the owner's run exists.

    Raises:
        UserError: they differ, because the owner was trained again or further.
    """
    only = config.blocks.only
    if (
        not only
        or config.blocks.shared != "owned"
        or trains_shared(config, only)
        or not Path(config.init.from_).exists()
    ):
        return
    theirs = Checkpoint(find_checkpoint(Path(config.init.from_))).weights(averaged=True, keep=_is_shared)
    ours = dict(model.named_parameters())
    if any(name in ours and not torch.equal(value, ours[name].detach().cpu()) for name, value in theirs.items()):
        raise UserError(
            f"cannot resume {config.run.dir}: {config.init.from_} was trained after block {only} had taken its embedding;"
            f" train block {only} again, with --overwrite or in another run directory"
        )
