"""The run directory: locking and creating it, and checking whether its run can be continued."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from recurrent_db.config import Config
from recurrent_db.data.vocabulary import Vocabulary
from recurrent_db.distributed.rendezvous import job_identity, restarted
from recurrent_db.errors import UserError
from recurrent_db.files import check_links, locked, write_atomic
from recurrent_db.schema import to_dict
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import clean_leftovers, find_checkpoint, list_checkpoints


def after_restart(config: Config, resume: str, overwrite: bool) -> tuple[str, bool]:
    """The values of ``resume`` and ``overwrite`` to use.

    They are returned unchanged, except after a restart by torchrun: then the run that this job began is continued from its
    newest undamaged checkpoint.
    """
    with contextlib.suppress(OSError, ValueError):
        if restarted() and json.loads((Path(config.run.dir) / "job.json").read_text()) == job_identity():
            return "last-good", False
    return resume, overwrite


def check_run_dir(config: Config, resume: str, overwrite: bool, held: contextlib.ExitStack) -> Checkpoint | None:
    """Check the run directory, lock it if it exists, and find the checkpoint to continue from. Changes no file in it.

    Args:
        resume, overwrite: as in `training.trainer.train`.
        held: releases the lock when it closes.

    Returns:
        The checkpoint to continue from; None to start at step 0.

    Raises:
        UserError: the directory exists without ``resume`` or ``overwrite``, is not a run directory, is in use, or its
            checkpoint is damaged.
    """
    if not config.run.dir:
        raise UserError("run.dir is not set: name the run directory with --run.dir DIR")
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir {run_dir} is a file")
    if run_dir.exists() and any(run_dir.iterdir()) and not resume:
        if not overwrite:
            raise UserError(f"run directory {run_dir} exists; continue it with --resume or replace it with --overwrite")
        if not (run_dir / "config.json").exists():
            raise UserError(f"{run_dir} is not a run directory (no config.json); --overwrite does not touch it")
    if resume and run_dir.exists():
        check_links(run_dir)
    if run_dir.exists() and (resume or overwrite):
        held.enter_context(locked(run_dir))
    if resume and list_checkpoints(run_dir):
        return Checkpoint(find_checkpoint(run_dir, fall_back=resume == "last-good"))
    return None


def make_run_dir(config: Config, resume: str, overwrite: bool, held: contextlib.ExitStack) -> Path:
    """Create the run directory, or with ``overwrite`` empty an existing one. Call it only after set-up has succeeded.

    Raises:
        UserError: the directory cannot be written, or another process has just created it.
    """
    run_dir = Path(config.run.dir)
    try:
        if not run_dir.exists() or not (resume or overwrite):
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir))
            if (run_dir / "config.json").exists():
                raise UserError(f"run directory {run_dir} was just created by another process")
        for path in run_dir.iterdir() if overwrite else ():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        clean_leftovers(run_dir)
        write_atomic(run_dir / "config.json", json.dumps(to_dict(config), indent=1))
        if (job := job_identity()) is not None:
            write_atomic(run_dir / "job.json", json.dumps(job))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None
    return run_dir


def check_resumable(config: Config, checkpoint: Checkpoint, vocabulary: Vocabulary) -> list[str]:
    """Check that a run can be continued with this configuration.

    Returns:
        A note for each other setting of data, optimizer, schedule or budget that has changed.

    Raises:
        UserError: the objective, model, blocks, seed, vocabulary or optimizer has changed.
    """
    before, now = to_dict(checkpoint.config()), to_dict(config)
    for section in ("objective", "model", "blocks", "seed"):
        if before[section] != now[section]:
            old, new = json.dumps(before[section]), json.dumps(now[section])
            if isinstance(before[section], dict):
                key = next(k for k in now[section] if before[section][k] != now[section][k])
                old, new, section = before[section][key], now[section][key], f"{section}.{key}"
            raise UserError(f"cannot resume {config.run.dir}: {section} was {old} and is now {new}")
    if checkpoint.vocabulary().hash != vocabulary.hash:
        raise UserError(f"cannot resume {config.run.dir}: the run and data.path have different {vocabulary.kind}")
    if before["optim"]["name"] != now["optim"]["name"]:  # one optimizer cannot use the other's state
        old, new = before["optim"]["name"], now["optim"]["name"]
        raise UserError(f"cannot resume {config.run.dir}: optim.name was {old} and is now {new}")
    return [
        f"note: resuming with {section}.{key} = {value} (was {before[section][key]})"
        for section in ("data", "optim", "schedule", "budget")
        for key, value in now[section].items()
        if before[section][key] != value
    ]
