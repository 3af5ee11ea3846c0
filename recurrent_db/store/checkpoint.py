"""Checkpoints: safetensors and JSON, written whole or not at all, checked before they are believed.

A checkpoint ``RUN/checkpoints/step-NNNNNNNN/`` holds everything that rebuilds the model (weights, averaged weights,
configuration, tokenizer) and everything that continues training (optimizer state, counters, the objective's state). It
is written into a hidden folder, flushed to disk and renamed; ``manifest.json`` lists the size and SHA-256 of each file.
Several processes write shards in place of whole files of tensors: see `sharded`, which reads those too.
Randomness has no state to save: see `rng`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recurrent_db.accounting.flop_count import FlopCount
from recurrent_db.accounting.flops import Cost
from recurrent_db.config import MOST_INTEGER, BudgetConfig, Config, config_from_json, to_dict
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.distributed.team import sharded_like
from recurrent_db.errors import UserError
from recurrent_db.files import check_links, file_digest, is_altered, new_file_mode, read_json, sealed
from recurrent_db.optim.optimizer import EMA
from recurrent_db.optim.schedule import budget_progress

MANIFEST = "manifest.json"
FORMAT = 1
WRITING = ".writing-"
"""What the name of a folder starts with while a checkpoint is being written there."""


@dataclass
class TrainState:
    """The counters of a run. All of them are cumulative over resumptions."""

    step: int = 0
    tokens: int = 0
    flops: FlopCount = field(default_factory=FlopCount)
    seconds: float = 0.0
    energy_joules: float = 0.0
    """Of the GPU, where it has a meter."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    """Of the skipped steps, those whose loss was finite."""
    rollbacks: int = 0
    """Returns to an earlier checkpoint; they choose the order of the data."""
    flops_abandoned: float = 0.0
    """Spent on steps that were taken back; not part of ``flops``."""
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_count: int = 0
    """Running mean and variance of the loss, and over how many steps; see `guard`."""
    loss_lowest: float = 0.0
    """Lowest running mean at a log point."""

    def spent(self, budget: BudgetConfig) -> float:
        """Share of a budget that these counters are; 1 and above where it is spent."""
        return budget_progress(budget, self.flops.total, self.tokens, self.step, self.seconds)

    def count(self, cost: Cost, update: float, tokens: int) -> None:
        """Add a step: its cost per token, and FLOPs of its update."""
        self.tokens += tokens
        self.flops.add(cost, update, tokens)

    def row(self) -> dict[str, float]:
        """The counters that ``metrics.jsonl`` has too, by column."""
        return {"step": self.step, "tokens": self.tokens, **self.flops.row(), "seconds": self.seconds}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer state by parameter name


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named ``<entry>/<parameter name>``."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{entry}/{names[id(p)]}": value.contiguous()
        for p, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors`'s result back, on the parameters' devices. Raises `UserError` for what is not the model's."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, ()) or not value.is_floating_point():
            raise UserError(
                f"the optimizer state {key!r} belongs to no parameter of this model, or to one of another shape"
            )
        # Fused AdamW keeps its step counter on the parameter's device.
        value = value.to(parameter.device)
        if value.shape == parameter.shape:
            value = sharded_like(value, parameter)
        optimizer.state.setdefault(parameter, {})[entry] = value


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    run_dir: Path,
    config: Config,
    tokenizer: Tokenizer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    state: TrainState,
    objective_state: dict[str, Any],
) -> Path:
    """Write a checkpoint of ``state.step`` and remove all but the newest ``config.run.keep``.

    Raises:
        UserError: when the disk is full or the folder cannot be written; older checkpoints stay as they are.
    """
    temporary = begin(run_dir, state.step)
    if temporary is None:
        prune(run_dir, config.run.keep)  # a killed process may have come to writing, and no further
        return run_dir / "checkpoints" / f"step-{state.step:08d}"
    try:
        save_file(dict(model.state_dict()), temporary / "model.safetensors")
        save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        if ema is not None:
            save_file(ema.shadow, temporary / "ema.safetensors")
        updates = ema.updates if ema is not None else 0
        write_small_files(temporary, config, tokenizer, state, objective_state, updates)
        return seal(run_dir, temporary, state.step, tokenizer, config.run.keep)
    except (OSError, SafetensorError) as error:
        drop(temporary)
        raise UserError(_cannot_write(run_dir, state.step, error)) from None


def _cannot_write(run_dir: Path, step: int, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"cannot write checkpoint {run_dir}/checkpoints/step-{step:08d}: {reason}; earlier checkpoints are intact"


def begin(run_dir: Path, step: int) -> Path | None:
    """An empty folder to write a checkpoint into; None where a good one of this step is there. Raises `UserError`."""
    target = run_dir / "checkpoints" / f"step-{step:08d}"
    if target.exists() and fault(target) is None:
        return None
    temporary = target.with_name(WRITING + target.name)
    drop(temporary)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(_cannot_write(run_dir, step, error)) from None
    return temporary


def drop(temporary: Path) -> None:
    """Remove what was begun."""
    shutil.rmtree(temporary, ignore_errors=True)


def write_small_files(
    temporary: Path,
    config: Config,
    tokenizer: Tokenizer,
    state: TrainState,
    objective_state: dict[str, Any],
    ema_updates: int,
) -> None:
    """Everything of a checkpoint that is no large tensor."""
    (temporary / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    (temporary / "config.json").write_text(json.dumps(to_dict(config), indent=1), encoding="utf-8")
    training = {"counters": asdict(state), "objective": objective_state, "ema_updates": ema_updates}
    (temporary / "state.json").write_text(json.dumps(training, indent=1), encoding="utf-8")


def settle_file(path: Path) -> None:
    """Give a written file ordinary permissions (safetensors makes private files) and see it onto the disk."""
    path.chmod(new_file_mode())
    _fsync(path)


def seal(
    run_dir: Path,
    temporary: Path,
    step: int,
    tokenizer: Tokenizer,
    keep: int,
    settled: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Make a checkpoint of a folder in which all is written, and remove all but the newest ``keep``. ``settled`` are the
    manifest's entries of files that were seen onto the disk already."""
    folder, target = run_dir / "checkpoints", run_dir / "checkpoints" / f"step-{step:08d}"
    settled = settled or {}
    files = sorted(p for p in temporary.iterdir() if p.name not in settled)
    listing = settled | {p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in files}
    manifest = {"format": FORMAT, "step": step, "tokenizer": tokenizer.hash, "files": dict(sorted(listing.items()))}
    (temporary / MANIFEST).write_text(sealed(manifest), encoding="utf-8")
    for path in (*files, temporary / MANIFEST):
        settle_file(path)
    _fsync(temporary)
    if target.exists():  # a damaged one, see `begin`
        target.rename(folder / f".deleting-{target.name}")
    temporary.rename(target)
    _fsync(folder)
    shutil.rmtree(folder / f".deleting-{target.name}", ignore_errors=True)
    prune(run_dir, keep)
    return target


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``."""
    for old in list_checkpoints(run_dir)[:-keep]:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = old.with_name(f".deleting-{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, good or not."""
    return sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8))


def clean_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (".writing-*", ".deleting-*"):
        for path in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as it was written."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        weights = () if any(name.startswith("shard-") for name in files) else ("model.safetensors",)
        for name in (*weights, "config.json", "tokenizer.model", "state.json"):
            if name not in files:
                return f"{name} is not listed"
        for name, entry in files.items():
            path = checkpoint / name
            if Path(name).name != name or name in ("", "..") or path.is_symlink():
                return f"{name!r} is not a plain file name"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if file_digest(path) != entry["sha256"]:
                return f"{name} was altered (checksum)"
        if is_altered(checkpoint / MANIFEST):
            return f"{MANIFEST} was altered (checksum)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def content_hash(checkpoint: Path) -> str:
    """SHA-256 (hexadecimal) of what decides a good checkpoint's answers: weights, configuration, tokenizer, the
    objective's state. Copies of a checkpoint have the same one."""
    files = read_json(checkpoint / MANIFEST)["files"]
    optimizer = ("optimizer.safetensors", "-00003-of-00003.safetensors")
    listing = sorted((name, entry["sha256"]) for name, entry in files.items() if not name.endswith(optimizer))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def find_checkpoint(path: Path, fall_back: bool = True) -> Path:
    """The checkpoint that a run directory (or a checkpoint's own folder) stands for: its newest good one.

    With ``fall_back`` a damaged newest checkpoint is passed over with a line on standard error.

    Raises:
        UserError: when there is none, the newest is damaged and ``fall_back`` is off, or a link leads out of ``path``.
    """
    try:
        there = path.exists()
    except OSError as error:  # a name that no file can have
        raise UserError(f"no run directory or checkpoint {str(path)[:200]}: {error.strerror}") from None
    if not there:
        raise UserError(f"no run directory or checkpoint {path}")
    candidates = [path] if (path / MANIFEST).exists() else list_checkpoints(path)[::-1]
    check_links(path)
    if not candidates:
        raise UserError(f"{path} holds no checkpoint")
    for candidate in candidates:
        problem = fault(candidate)
        if problem is None:
            return candidate
        if not fall_back and len(candidates) > 1:
            raise UserError(f"checkpoint {candidate} is damaged: {problem}; --resume last-good takes the one before")
        if len(candidates) == 1:
            raise UserError(f"checkpoint {candidate} is damaged: {problem}; there is no other")
        print(f"warning: checkpoint {candidate} is damaged: {problem}; trying the one before", file=sys.stderr)
    raise UserError(f"{path} holds no undamaged checkpoint ({candidates[0].name}: {fault(candidates[0])})")


@dataclass
class Checkpoint:
    """A checkpoint that was found good; tensors are read when asked for."""

    path: Path

    def config(self) -> Config:
        text = (self.path / "config.json").read_text(encoding="utf-8", errors="replace")
        return config_from_json(text, str(self.path / "config.json"))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bytes((self.path / "tokenizer.model").read_bytes())

    @property
    def sharded(self) -> bool:
        """Whether several processes wrote it, each its part."""
        return not (self.path / "model.safetensors").exists()

    def weights(self, averaged: bool = False, keep: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """Parameters by name, whole, on the CPU; with ``averaged`` their moving average where one was kept. ``keep`` says
        which names are wanted: of a checkpoint in one file no others are read."""
        if self.sharded:
            from recurrent_db.store import sharded

            found = (averaged and sharded.read(self.path, "average")) or sharded.read(self.path, "weights")
            return {name: value for name, value in found.items() if keep is None or keep(name)}
        average = self.path / "ema.safetensors"
        return _tensors(average if averaged and average.exists() else self.path / "model.safetensors", keep)

    def optimizer(self) -> dict[str, Tensor]:
        """`optimizer_tensors`'s result, whole, on the CPU."""
        if self.sharded:
            from recurrent_db.store import sharded

            return sharded.read(self.path, "optimizer")
        return _tensors(self.path / "optimizer.safetensors")

    def training(self) -> tuple[TrainState, dict[str, Any], int]:
        """Counters, the objective's state, and how often the average was updated. Raises `UserError` for other content."""
        source = self.path / "state.json"
        try:
            values = read_json(source)
            counters, objective, updates = {**values["counters"]}, values["objective"], values["ema_updates"]
            state = TrainState(**{**counters, "flops": FlopCount(**counters.get("flops", {}))})
            defaults = {**vars(TrainState()), **FlopCount().row(), "ema_updates": 0}
            for name, value in {**vars(state), **state.flops.row(), "ema_updates": updates}.items():
                whole = isinstance(defaults[name], int)
                if type(value) is not int and (whole or type(value) is not float):
                    raise ValueError(f"{name} is no {'whole ' * whole}number")
                if not 0 <= value <= (MOST_INTEGER if type(value) is int else sys.float_info.max):
                    raise ValueError(f"{name} is out of range")
            if not isinstance(objective, dict):
                raise ValueError("objective is no table")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{source} is not what training saves: {error}") from None
        return state, objective, updates


def _tensors(path: Path, keep: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file (those that ``keep`` asks for), on the CPU. Raises `UserError`."""
    try:
        if keep is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow_new: tuple[str, ...] = ()) -> None:
    """See that weights are a model's, which may be on the meta device. ``allow_new`` as of `load_weights`.

    Raises:
        UserError: for a missing or unknown parameter, a shape that differs or numbers that are none, naming the first.
    """
    parameters = dict(model.named_parameters())
    for name in parameters.keys() | weights.keys():
        if name.startswith(allow_new or ("\0",)) and (name not in parameters or name not in weights):
            continue
        if name not in weights:
            raise UserError(f"{source} has no parameter {name}: it was made with another model shape")
        if name not in parameters:
            raise UserError(f"{source} has a parameter {name} that this model lacks: it was made with another shape")
        if parameters[name].shape != weights[name].shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, this model needs {tuple(parameters[name].shape)}"
            )
        if not weights[name].is_floating_point():
            raise UserError(f"{source}: {name} holds {weights[name].dtype}, not floating-point numbers")


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow_new: tuple[str, ...] = ()) -> None:
    """Copy weights into a model by name.

    Parameters whose names start with one of ``allow_new`` may be absent on either side (then they keep their values, or
    are left out). Raises as `check_weights` does.
    """
    check_weights(model, weights, source, allow_new)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(sharded_like(weights[name], parameter))


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
    """Fill a model, its optimizer and its average from a checkpoint, sharded or not, whatever wrote it. What the optimizer
    had and the checkpoint has not is dropped: the state of parameters that were not trained yet."""
    optimizer.state.clear()
    if checkpoint.sharded:
        from recurrent_db.store import sharded

        sharded.restore(checkpoint, model, optimizer, ema)
        return
    load_weights(model, checkpoint.weights(), str(checkpoint.path))
    load_optimizer_tensors(model, optimizer, checkpoint.optimizer())
    if ema is not None:
        averaged = checkpoint.weights(averaged=True)
        with torch.no_grad():
            for name, shadow in ema.shadow.items():
                shadow.copy_(sharded_like(averaged[name], shadow))
