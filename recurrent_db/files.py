"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recurrent_db.errors import UserError


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MOST_JSON_BYTES = 1 << 28
"""Largest JSON file that is read."""


def read_json(path: Path) -> Any:
    """The JSON value of a file, which may be a stranger's.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, nested too deeply, or larger than `MOST_JSON_BYTES`.
    """
    raw = bytearray()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):  # a read of so many bytes at most would first set as many aside
            raw += piece
            if len(raw) > MOST_JSON_BYTES:
                raise ValueError(f"larger than {MOST_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sealed(value: dict[str, Any]) -> str:
    """A table as JSON text that ends with the SHA-256 of what comes before it, under the key ``digest``."""
    digest = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    return json.dumps({**value, "digest": digest}, indent=1)


def is_altered(path: Path) -> bool:
    """Whether a file that `sealed` made has changed since."""
    raw = path.read_bytes()
    value = json.loads(raw.decode("utf-8"))
    value.pop("digest", None)
    return sealed(value).encode() != raw


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, all links followed, lies in ``folder`` (all links followed) or is it. False for what is no path."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, not a path, links in a circle
        return False


def check_links(folder: Path) -> None:
    """See that no symbolic link in ``folder`` leads out of it: a folder that came from a stranger must not make a command
    read or write elsewhere. Links of Weights & Biases, in its own folder ``wandb``, are not followed by any command.

    Raises:
        UserError: naming the first such link.
    """
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(parent) / name
            if path.is_symlink() and not is_inside(path, folder):
                raise UserError(f"{path} is a link that leads out of {folder}; nothing there is read or written")
        folders[:] = [name for name in folders if name != "wandb"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that one process at a time may write, by a lock on its file ``.lock``. The lock ends with the process,
    however that ends; the file stays.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise UserError(f"{folder} is in use by {holder}: two at once would destroy each other's work") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror}); start one trainer only", file=sys.stderr)
        with contextlib.suppress(OSError):  # on a full disk it is held namelessly
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def new_file_mode() -> int:
    """Permissions that an ordinary new file gets."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def check_output(path: Path) -> None:
    """Make the folder of an output file and see that it can be written, before the work and not after it.

    Raises:
        UserError: naming the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside ``path`` and rename into place: a reader sees the old file or the new one, and a crash leaves either.

    Text is written as UTF-8. The file gets the ordinary permissions of a new file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(new_file_mode())  # mkstemp's own mode is private
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
