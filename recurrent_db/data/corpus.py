"""The embedded corpus: the Python standard library's own sources, which are on every machine that runs this project.

It is about 10 MB of code and English in some 600 files. It leaves out tests, installed packages, byte code, and modules
that are tables rather than text: character encodings, pydoc's help topics, build settings, case-folding and
string-preparation tables, the grammar's token lists. The text depends on the Python version. A data directory's manifest
records its hash.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recurrent_db.errors import UserError

_LEFT_OUT_FOLDERS = {
    "test", "tests", "idle_test",  # tests
    "site-packages", "dist-packages", "ensurepip", "lib-dynload", "__pycache__",  # not the library's own sources
    "encodings", "pydoc_data",  # tables
}  # fmt: skip
_LEFT_OUT_FILES = {"stringprep.py", "token.py", "keyword.py", "re/_casefix.py", "sre_constants.py"}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and an id that does not depend on the corpus's folder."""

    id: str
    text: str


def hash_share(key: str) -> float:
    """Map ``key`` to a number in [0, 1) by its SHA-256. The result is the same on every machine."""
    digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def stdlib_root() -> Path:
    """Folder of the standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files() -> list[str]:
    """Sorted paths of the corpus's files, relative to `stdlib_root`, with "/" as separator.

    Raises:
        UserError: this Python was installed without its sources.
    """
    root = stdlib_root()
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS]
        for name in files:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if (
                name.endswith(".py")
                and relative not in _LEFT_OUT_FILES
                and not relative.rsplit("/", 1)[-1].startswith(_LEFT_OUT_PREFIXES)
                and not relative.startswith(_LEFT_OUT_PREFIXES)
            ):
                found.append(relative)
    if not found:
        raise UserError(f"no standard library sources under {root}: this Python was installed without them")
    return sorted(found)


def stdlib_split(relative_path: str, holdout: float = 0.05) -> str:
    """The split of a file, "train" or "validation", by a hash of its path. About ``holdout`` (0 to 1) are validation."""
    return "validation" if hash_share(f"holdout:{relative_path}") < holdout else "train"


def stdlib_documents(part: str | None = None, holdout: float = 0.05) -> Iterator[Document]:
    """The documents of the corpus, one per file, in the order of their paths. Bytes that are not UTF-8 become U+FFFD.

    Args:
        part: "train" or "validation"; None is both.
        holdout: share of the files in "validation" (0 to 1).

    Raises:
        UserError: as `stdlib_files`.
    """
    root = stdlib_root()
    for relative in stdlib_files():
        if part is None or stdlib_split(relative, holdout) == part:
            yield Document(relative, (root / relative).read_bytes().decode("utf-8", errors="replace"))
