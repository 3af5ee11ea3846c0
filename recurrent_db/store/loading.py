"""From a path to a model that can be used: ``model, tokenizer = recurrent_db.load(RUN)``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from recurrent_db.accounting.hardware import choose_device
from recurrent_db.config import Config, validate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.blocks_lm import BlocksLM, plain_weights
from recurrent_db.objectives import Objective, build_objective, load_objective_state
from recurrent_db.objectives.block_choice import trains_shared
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.tensors import check_weights, load_weights


def trained_objective(checkpoint: Checkpoint, config: Config) -> Objective:
    """A checkpoint's objective, with what it had learned. Prints a line on standard error if the core never ran."""
    objective = build_objective(config)
    load_objective_state(objective, checkpoint.training()[1], str(checkpoint.path))
    if not objective.core_trained:
        print(
            f"warning: {checkpoint.path} was stopped before its core's blocks began to run: they are untrained",
            file=sys.stderr,
        )
    return objective


def load_with_config(
    path: str | Path,
    device: str | torch.device = "auto",
    averaged: bool = True,
    walk: Mapping[str, str | None] | None = None,
) -> tuple[LoopedLM, Tokenizer, Config, Path]:
    """`load`, which also returns the run's configuration and the checkpoint's folder.

    ``walk`` overrides how a denoiser runs its iterations (``bridge``, ``sampler``, ``grid`` of
    objective_config.DenoiseConfig); None values leave the run's own.
    """
    checkpoint = Checkpoint(find_checkpoint(Path(path)))
    config = checkpoint.config()
    chosen = {name: value for name, value in (walk or {}).items() if value is not None}
    if chosen:
        if not all(hasattr(config.objective.own, name) for name in chosen):
            raise UserError(f"{path} is a {config.objective.name} run: it has no {', '.join(chosen)} to choose")
        for name, value in chosen.items():
            setattr(config.objective.own, name, value)
        validate(config)
    weights, shape, source = checkpoint.weights(averaged), config.model, str(checkpoint.path)
    # Before anything is allocated: a configuration may claim any size.
    if shape.n_prelude + shape.n_core + shape.n_coda > len(weights):
        raise UserError(f"{source}: its configuration has more blocks than its weights have tensors")
    check_weights(build_model(shape, None, "meta", config.blocks.only), weights, source)
    model = build_model(shape, seed=None, only_block=config.blocks.only)
    load_weights(model, weights, source)
    model.recurrence = trained_objective(checkpoint, config).recurrence
    model.document_mask = config.data.document_mask
    target = choose_device(device) if isinstance(device, str) else device
    return model.to(target).eval(), checkpoint.tokenizer(), config, checkpoint.path


def load(
    path: str | Path, device: str | torch.device = "auto", averaged: bool = True, compiled: bool = False
) -> tuple[LoopedLM, Tokenizer]:
    """Load a run's newest good checkpoint (or the one whose folder is given), ready for inference.

    Args:
        path: run directory or checkpoint folder.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        averaged: take the moving average of the weights where the run kept one.
        compiled: compile what generation runs for each token (`LoopedLM.compile_decoding`); the first text takes longer.

    Returns:
        The model in fp32, in evaluation mode, and its tokenizer. Nothing in a checkpoint is executed: weights are
        safetensors, the rest is JSON and a sentencepiece model.

    Raises:
        UserError: there is no run, no undamaged checkpoint, or no such device.
    """
    model, tokenizer, _, _ = load_with_config(path, device, averaged)
    if compiled:
        model.compile_decoding()
    return model, tokenizer


def _tables(name: str) -> bool:
    """Whether a parameter of a model in blocks belongs to the tables that blocks share."""
    return not name.startswith("blocks.")


def start_from(model: LoopedLM, config: Config, tokenizer: Tokenizer) -> str:
    """Fill a new run's model from the run that ``init.from`` names. Returns a line that says what it took.

    A model that is newly conditioned on noise keeps its zero-initialised conditioning. A model in blocks takes the shared
    tables and the blocks that both runs hold; nothing else is read.

    Raises:
        UserError: there is no run, its tokenizer or shape differs, or its core was never trained.
    """
    source = Checkpoint(find_checkpoint(Path(config.init.from_)))
    if source.tokenizer().hash != tokenizer.hash:
        raise UserError(f"init.from {config.init.from_} was trained with another tokenizer than {config.data.path}")
    if not trained_objective(source, source.config()).core_trained:
        raise UserError(
            f"init.from {config.init.from_} was stopped before its core's blocks began to run:"
            " continue it with --resume first"
        )
    if not isinstance(model, BlocksLM):
        load_weights(model, source.weights(averaged=True), str(source.path), allow_new=("noise_embedding.",))
        return f"starting from the weights of {source.path}"
    theirs = source.config().model
    if not theirs.n_blocks and theirs.n_core != config.model.n_core:
        raise UserError(
            f"init.from {config.init.from_} has {theirs.n_core} layers, and {config.model.n_core} are cut into blocks here"
        )
    held = tuple(f"blocks.{number}." for number in model.held())
    keep = (lambda name: _tables(name) or name.startswith(held)) if theirs.n_blocks else None
    weights = plain_weights(source.weights(averaged=True, keep=keep), config.model)
    load_weights(model, weights, str(source.path), allow_new=("noise_embedding.", "blocks."))
    taken = [number for number in model.held() if any(name.startswith(f"blocks.{number}.") for name in weights)]
    drawn = [number for number in model.held() if number not in taken]
    spent = source.training()[0].spent(source.config().budget)
    moves = config.blocks.only and config.blocks.shared == "owned" and not trains_shared(config, config.blocks.only)
    return (
        f"starting from {source.path}: its embedding"
        + "".join(f", block {number}" for number in taken)
        + "".join(f"; block {number} as drawn" for number in drawn)
        + (f"; its owner was stopped at {spent:.0%} and must not train on" if moves and spent < 1 else "")
    )


def check_owner(model: LoopedLM, config: Config) -> None:
    """Check that a resumed block still has its owner's tables, if the owner's run is there.

    Raises:
        UserError: the owner was trained further or again.
    """
    only = config.blocks.only
    if (
        not only
        or config.blocks.shared != "owned"
        or trains_shared(config, only)
        or not Path(config.init.from_).exists()
    ):
        return
    theirs = Checkpoint(find_checkpoint(Path(config.init.from_))).weights(averaged=True, keep=_tables)
    ours = dict(model.named_parameters())
    if any(name in ours and not torch.equal(value, ours[name].detach().cpu()) for name, value in theirs.items()):
        raise UserError(
            f"cannot resume {config.run.dir}: the embedding of {config.init.from_} is no longer the one that block {only}"
            f" was trained on; train block {only} anew, in another run directory or with --overwrite"
        )
