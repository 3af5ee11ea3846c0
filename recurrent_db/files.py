"""Safe files: atomic writes, digests, locks, and checks of files from untrusted sources."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recurrent_db.errors import UserError


def expand_user(path: str) -> str:
    """Replace a leading ``~`` or ``~user`` by the home directory, as a shell does. An unknown user's stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises for an unknown user


def expand_shell(path: str) -> str:
    """Replace a leading ``~`` and each ``$NAME`` or ``${NAME}``, as a shell does in a path.

    Raises:
        UserError: a variable is not set.
    """
    expanded = expand_user(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"the variable {unset[0]} in {path} is not set")
    return expanded


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MOST_JSON_BYTES = 1 << 28
"""Largest JSON file that `read_json` reads, in bytes."""


def read_json(path: Path) -> Any:
    """Read a JSON file, which may come from an untrusted source.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON in UTF-8, is nested too deeply, or is larger than `MOST_JSON_BYTES`.
    """
    raw = bytearray()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):  # read(MOST_JSON_BYTES) would allocate so much memory for any file
            raw += piece
            if len(raw) > MOST_JSON_BYTES:
                raise ValueError(f"larger than {MOST_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sealed(value: dict[str, Any]) -> str:
    """JSON text of a table, with a last key ``digest``: the SHA-256 of the table's JSON text without it."""
    digest = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    return json.dumps({**value, "digest": digest}, indent=1)


def is_altered(path: Path) -> bool:
    """Whether a file with the text of `sealed` has been changed."""
    raw = path.read_bytes()
    value = json.loads(raw.decode("utf-8"))
    value.pop("digest", None)
    return sealed(value).encode() != raw


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or in it, after following all links in both. False for an invalid path."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, invalid, or a cycle of links
        return False


def check_links(folder: Path) -> None:
    """Check that no symbolic link in ``folder`` leads out of it.

    A folder from an untrusted source could otherwise make a command read or write elsewhere. Links in subfolders ``wandb``
    are not checked: Weights & Biases makes them, and no command follows them.

    Raises:
        UserError: a link leads out of the folder.
    """
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(parent) / name
            if path.is_symlink() and not is_inside(path, folder):
                raise UserError(
                    f"{path} is a link that leads out of {folder}: remove it, or replace it by the file itself"
                )
        folders[:] = [name for name in folders if name != "wandb"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, so that only one process at a time writes to it.

    The lock is on the folder's file ``.lock``. The operating system releases it when the process ends, also after a crash.
    The file remains. On a file system without locks a warning is printed instead.

    Raises:
        UserError: another process has locked the folder, or the folder cannot be written.
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
            raise UserError(f"{folder} is in use by {holder}: wait until it ends, or use another folder") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror}); start one trainer only", file=sys.stderr)
        with contextlib.suppress(OSError):  # on a full disk the holder's name is not written
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def new_file_mode() -> int:
    """Permissions of an ordinary new file under the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def check_output(path: Path) -> None:
    """Create the folder of an output file and check that the file can be written. Call it before the work starts.

    Raises:
        UserError: the file cannot be written.
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
    """Replace a file atomically: readers see the old content or the new one, also after a crash.

    The content is written to a temporary file in the same folder, which is then renamed. Text is written as UTF-8. The file
    gets the permissions of an ordinary new file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(new_file_mode())  # mkstemp makes files that only their owner can read
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
