"""Checkpoint folders: atomic writing, checking, finding and removing.

A checkpoint is written into a hidden folder, flushed to disk and then renamed to ``RUN/checkpoints/step-NNNNNNNN``, so an
interrupted save never looks like a checkpoint. Its ``manifest.json`` lists the size and SHA-256 of each file, which are
checked before a checkpoint is used. `checkpoint` (one process) and `sharded` (several) write the files inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from recurrent_db.config import Config
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.data.vocabulary import ImageClasses, Vocabulary
from recurrent_db.errors import UserError
from recurrent_db.files import check_links, file_digest, is_altered, new_file_mode, read_json, sealed
from recurrent_db.schema import to_dict
from recurrent_db.store.train_state import TrainState, write_state

MANIFEST = "manifest.json"
VOCABULARY_FILES = (Tokenizer.file_name, ImageClasses.file_name)
FORMAT = 1
SLOTS_FILE = "slots.safetensors"
"""What the objective keeps for the slots of the batch, in a checkpoint of one process."""
WRITING, DELETING = ".writing-", ".deleting-"
"""Name prefixes of a checkpoint's folder while it is being written, and while it is being deleted."""

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def begin_checkpoint(run_dir: Path, step: int) -> Path | None:
    """Create an empty hidden folder to write a checkpoint into. None if this step already has an undamaged checkpoint.

    Raises:
        UserError: the folder cannot be created.
    """
    target = step_folder(run_dir, step)
    if target.exists() and fault(target) is None:
        return None
    temporary = target.with_name(WRITING + target.name)
    discard(temporary)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None
    return temporary


def discard(temporary: Path) -> None:
    """Remove the hidden folder of an unfinished checkpoint."""
    shutil.rmtree(temporary, ignore_errors=True)


def cannot_write(target: Path, error: BaseException, who: str = "") -> str:
    """The error message for a checkpoint that could not be written. ``who`` names the process among several."""
    reason = getattr(error, "strerror", None) or str(error)
    return f"cannot write checkpoint {target}{who}: {reason}; earlier checkpoints are intact"


def write_small_files(
    temporary: Path,
    config: Config,
    vocabulary: Vocabulary,
    state: TrainState,
    objective_state: dict[str, Any],
    ema_updates: int,
) -> None:
    """Write all files without tensors: vocabulary, configuration, and ``state.json`` (see `write_state`)."""
    (temporary / vocabulary.file_name).write_bytes(vocabulary.model_bytes)
    (temporary / "config.json").write_text(json.dumps(to_dict(config), indent=1), encoding="utf-8")
    write_state(temporary / "state.json", state, objective_state, ema_updates)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_file(path: Path) -> None:
    """Flush a file to disk, and give it ordinary permissions, because safetensors creates files that are private."""
    path.chmod(new_file_mode())
    _fsync(path)


def manifest_entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: its size in bytes and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def seal_checkpoint(
    run_dir: Path,
    temporary: Path,
    step: int,
    vocabulary: Vocabulary,
    keep: int,
    flushed: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write the manifest, rename a finished hidden folder to its checkpoint, and remove all but the newest ``keep``.

    Args:
        temporary: the hidden folder of `begin_checkpoint`.
        flushed: manifest entries of files that are already hashed and flushed to disk, by file name.

    Returns:
        The checkpoint's folder.
    """
    target, flushed = step_folder(run_dir, step), flushed or {}
    files = sorted(p for p in temporary.iterdir() if p.name not in flushed)
    listing = flushed | {p.name: manifest_entry(p) for p in files}
    manifest = {"format": FORMAT, "step": step, "vocabulary": vocabulary.hash, "files": dict(sorted(listing.items()))}
    (temporary / MANIFEST).write_text(sealed(manifest), encoding="utf-8")
    for path in (*files, temporary / MANIFEST):
        flush_file(path)
    _fsync(temporary)
    damaged = target.with_name(DELETING + target.name)
    if target.exists():  # it is damaged, else `begin_checkpoint` would have returned None
        target.rename(damaged)
    temporary.rename(target)
    _fsync(target.parent)
    shutil.rmtree(damaged, ignore_errors=True)
    prune(run_dir, keep)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Removing


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that an interrupted deletion does not leave a damaged checkpoint."""
    doomed = checkpoint.with_name(DELETING + checkpoint.name)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for old in list_checkpoints(run_dir)[:-keep]:
        remove_checkpoint(old)


def clean_leftovers(run_dir: Path) -> None:
    """Remove the half-written and half-deleted folders of killed processes."""
    for prefix in (WRITING, DELETING):
        for path in (run_dir / "checkpoints").glob(prefix + "*"):
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, including damaged ones."""
    return sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8))


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words. None if every file matches the manifest."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        weights = () if any(name.startswith("shard-") for name in files) else ("model.safetensors",)
        vocabulary = next((name for name in VOCABULARY_FILES if name in files), VOCABULARY_FILES[0])
        for name in (*weights, "config.json", vocabulary, "state.json"):
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
    """SHA-256 (hexadecimal) of all that determines a model's outputs, from an undamaged checkpoint's manifest.

    It covers weights, configuration, vocabulary and ``state.json``, and leaves out what only training needs: the
    optimizer's state and what the objective keeps for the slots. Copies of a checkpoint have the same hash.
    """
    files = read_json(checkpoint / MANIFEST)["files"]
    training = ("optimizer.safetensors", SLOTS_FILE, "-00003-of-00003.safetensors")
    listing = sorted((name, entry["sha256"]) for name, entry in files.items() if not name.endswith(training))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def find_checkpoint(path: Path, fall_back: bool = True) -> Path:
    """Find the newest undamaged checkpoint.

    Args:
        path: a run directory, or the folder of one checkpoint.
        fall_back: if a checkpoint is damaged, print a warning and try the previous one.

    Raises:
        UserError: there is no checkpoint, all are damaged, the newest is damaged and ``fall_back`` is off, or a link
            points out of ``path``.
    """
    try:
        exists = path.exists()
    except OSError as error:  # the name is too long or invalid
        raise UserError(f"no run directory or checkpoint {str(path)[:200]}: {error.strerror}") from None
    if not exists:
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
            raise UserError(
                f"checkpoint {candidate} is damaged: {problem}; --resume last-good uses the newest undamaged one"
            )
        if len(candidates) == 1:
            raise UserError(f"checkpoint {candidate} is damaged: {problem}; there is no other")
        print(f"warning: checkpoint {candidate} is damaged: {problem}; trying the previous one", file=sys.stderr)
    raise UserError(f"{path} holds no undamaged checkpoint ({candidates[0].name}: {fault(candidates[0])})")
