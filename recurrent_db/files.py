"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from pathlib import Path

from recurrent_db.errors import UserError


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
