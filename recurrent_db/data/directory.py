"""What data directories of text and of images share: a sealed manifest, checksums, and an atomic build.

A directory is built under another name and renamed when it is complete, so an interrupted build never looks like one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrent_db.errors import UserError
from recurrent_db.files import file_digest, is_inside, read_json, sealed

MANIFEST = "manifest.json"


def read_format(directory: str | os.PathLike[str], name: str, version: int, what: str, script: str) -> dict[str, Any]:
    """Read the manifest of a data directory. The caller checks the keys of its own format.

    Args:
        name, version: the format that is expected.
        what: what the directory holds, and the ``script`` that makes it; both for messages.

    Raises:
        UserError: the manifest is missing, unreadable, or not of this format and version.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = read_json(path)
    except OSError as error:
        if not Path(directory).is_dir():
            raise UserError(f"{directory}: no such data directory; make one with {script}") from None
        raise UserError(f"{path}: {error.strerror or error}; was this made by {script}?") from None
    except ValueError:
        raise UserError(f"{path}: damaged: not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != name:
        raise UserError(f"{path}: not a manifest of {what}")
    if manifest.get("version") != version:
        raise UserError(f"{path}: version {manifest.get('version')!r}, but this program reads {version}")
    return manifest


def is_count(value: Any) -> bool:
    """Whether a value of a manifest is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def path_inside(directory: Path, name: str) -> Path:
    """``directory / name``. Raises `UserError` if it is outside ``directory``: a manifest may be malicious."""
    outside = Path(name).is_absolute() or ".." in Path(name).parts or not is_inside(directory / name, directory)
    if outside or not name.isprintable():
        raise UserError(f"{directory / MANIFEST}: file name {name[:200]!r} points outside the data directory")
    return (directory / name).resolve()


def check_size(path: Path, expected: int) -> None:
    """Raise UserError unless the file has ``expected`` bytes."""
    actual = path.stat().st_size
    if actual != expected:
        state = "truncated" if actual < expected else "too long"
        raise UserError(f"{path}: {state}: {actual} bytes instead of {expected}; prepare the data again")


def check_digest(path: Path, expected: str) -> None:
    """Raise UserError unless the file's SHA-256 is ``expected``."""
    if file_digest(path) != expected:
        raise UserError(f"{path}: damaged: its SHA-256 is not the manifest's; prepare the data again")


class NewDirectory:
    """Builds a data directory as a context manager. Without a call of `commit` it leaves ``out`` unchanged.

    A process that is killed leaves its unfinished ``.NAME.partial-PID`` beside ``out``, which may be deleted.

    Args:
        out: the directory to create. Missing parents are created too.
        overwrite: replace an existing data directory once the new one is complete. Any other folder is refused.

    Raises:
        UserError: ``out`` exists or cannot be created.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.out = Path(os.path.realpath(out))
        self.overwrite = overwrite
        check_target(self.out, overwrite)
        self.folder = self.out.with_name(f".{self.out.name}.partial-{os.getpid()}")
        """Where files are written until `commit` renames it."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"cannot create {self.out}: {error.filename} is not a folder") from None
        except OSError as error:
            raise UserError(f"cannot create {self.out}: {error.strerror or error}") from None

    def __enter__(self) -> NewDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and rename the directory to ``out``.

        Raises:
            UserError: ``out`` was created in the meantime.
        """
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(sealed(dict(manifest)))
            file.flush()
            os.fsync(file.fileno())
        check_target(self.out, self.overwrite)  # check again: another process may have created it
        old = self.out.with_name(f".{self.out.name}.replaced-{os.getpid()}")
        if self.out.exists():
            self.out.rename(old)
        try:
            self.folder.rename(self.out)
        except BaseException:
            with contextlib.suppress(OSError):
                old.rename(self.out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_target(out: Path, overwrite: bool) -> None:
    """Raise UserError unless ``out`` may be written.

    It must not exist, or, with ``overwrite``, it must be a data directory or an empty folder.
    """
    try:
        present = out.exists()
        replaceable = present and out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"cannot create {out}: {error.strerror or error}") from None
    if present and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or replace it with --overwrite True")
    if present and not replaceable:
        raise UserError(f"{out} exists and is not a data directory (no {MANIFEST} in it): not replaced")
