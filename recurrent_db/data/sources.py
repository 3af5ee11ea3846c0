"""Streams documents from the embedded corpus, files, folders and the Hugging Face hub in bounded memory.

A source is ``stdlib``, a file, a folder or ``hf:NAME[:CONFIG[:SPLIT]]``. A name in front of it, as in ``code=stdlib`` or
``web=crawl/``, lets a mixture weight it. A file's suffix says how it is read, whatever its case:

- Text (.txt .text .md .markdown .rst .tex .py, and any other file that is named explicitly): one document per file, or cut
  at a separator.
- .jsonl .ndjson .jsonlines: one document per line, with its text under a key.
- .json: such lines, or objects and lists of objects with at most 256 Mi characters in all.
- .parquet .arrow: one document per row.
- All but parquet and Arrow may be compressed as .gz or .zst. Incomplete or damaged data is an error.
- A folder is read recursively, in the order of its paths. Links to folders are followed, and each folder is read once. What
  is left out is counted by reason: hidden files, files of other kinds, those that match a pattern of `ReadOptions.exclude`,
  .json files without the key, and files that are JSON only by their suffix. In a folder that ``datasets.save_to_disk``
  wrote, the files that its state.json names are read.

Bytes that are not UTF-8 become U+FFFD and are counted. A file with a NUL byte in its first 8 KiB counts as binary, and its
NULs are replaced too. A file is skipped if more than 30 percent of its first MiB would be replaced. A byte order mark at
the start is dropped. Nothing else changes.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NoReturn

from recurrent_db.data import readers
from recurrent_db.data.corpus import Document, stdlib_files, stdlib_root
from recurrent_db.data.readers import (
    KNOWN_SUFFIXES,
    LINE_SUFFIXES,
    TABLE_SUFFIXES,
    NoText,
    NotJson,
    ReadOptions,
    ReadReport,
    kind_of,
    pieces,
    read_json,
    read_lines,
    read_text,
)
from recurrent_db.data.tables import read_hub, read_table
from recurrent_db.data.unpacking import COMPRESSED_SUFFIXES
from recurrent_db.errors import UserError
from recurrent_db.files import expand_user
from recurrent_db.files import read_json as read_json_file

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


def parse_source(source: str) -> tuple[str, str]:
    """Split "NAME=LOCATION" into (name, location). The name of a source without one is "default".

    The path of an existing file is taken as a location even if it contains "=". ``~`` is the home directory.
    """
    match = _NAMED.fullmatch(source)
    if match and not Path(source).exists():
        return match[1], expand_user(match[2])
    return "default", expand_user(source)


# ---------------------------------------------------------------------------------------------------------------
# Folders -> files


def _folders(folder: Path, report: ReadReport) -> Iterator[tuple[Path, list[str]]]:
    """The folders in ``folder`` and their files' names. Links are followed last, so a real folder keeps its own path."""

    def fail(error: OSError) -> NoReturn:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    seen = set()
    roots = [folder]
    for root in roots:
        for where, folders, names in os.walk(root, onerror=fail):
            parent = Path(where)
            status = parent.stat()
            if (status.st_dev, status.st_ino) in seen:
                report.skip("link(s) to folders that are read already", parent)
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in [name for name in folders if name.startswith(".")]:
                report.skip("hidden", parent / name)
                folders.remove(name)
            folders.sort()
            roots += [parent / name for name in folders if (parent / name).is_symlink()]
            yield parent, names


def _saved_files(parent: Path, names: list[str]) -> set[str] | None:
    """Names of the data files of a folder that ``datasets.save_to_disk`` wrote; None for any other folder."""
    if not {"state.json", "dataset_info.json"} <= set(names):
        return None
    try:
        found = {str(entry["filename"]) for entry in read_json_file(parent / "state.json")["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if missing := sorted(found - set(names)):
        raise UserError(f"{parent / missing[0]}: missing, but {parent / 'state.json'} names it")
    return found


def _excluded(relative: PurePath, patterns: tuple[str, ...]) -> bool:
    paths = (relative, *relative.parents[:-1])
    candidates = [candidate for path in paths for candidate in (path.name, path.as_posix(), f"/{path.as_posix()}")]
    cleaned = (pattern.removeprefix("./").rstrip("/") for pattern in patterns)
    return any(fnmatch.fnmatchcase(candidate, pattern) for pattern in cleaned for candidate in candidates)


def files_of(
    folder: Path, options: ReadOptions, report: ReadReport, suffixes: tuple[str, ...] = KNOWN_SUFFIXES
) -> list[tuple[str, Path]]:
    """The files of a folder with these suffixes, with their paths in it, in the order of these paths.

    Raises:
        UserError: a folder cannot be read, or lacks a file that its ``state.json`` names.
    """
    found = []
    for parent, names in _folders(folder, report):
        saved = _saved_files(parent, names)
        for name in names:
            path = parent / name
            kind = kind_of(path)
            if name.startswith("."):
                report.skip("hidden", path)
            elif _excluded(path.relative_to(folder), options.exclude):
                report.skip("excluded", path)
            elif not path.is_file():
                report.skip("broken link(s) or special file(s)", path)
            elif kind not in suffixes:
                packed = path.suffix.lower() if path.suffix.lower() in COMPRESSED_SUFFIXES else ""
                report.skip(f"{kind}{packed}" if kind or packed else "without a suffix", path)
            elif saved is not None and name not in saved:
                report.skip("beside the data files of a saved data set", path)
            else:
                found.append((path.relative_to(folder).as_posix(), path))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------
# Sources -> documents


def _read_file(
    path: Path, name: str, options: ReadOptions, report: ReadReport, in_folder: bool
) -> Iterator[tuple[str, str]]:
    """Stream the documents of a file.

    In a folder, a .json file without the key, such as package.json, is skipped. So is a file that is JSON only by its
    suffix.
    """
    kind = kind_of(path)
    if kind == ".json" or kind in LINE_SUFFIXES:
        documents = (read_json if kind == ".json" else read_lines)(path, name, options, report)
        try:
            yield from itertools.islice(documents, 1)
        except NoText as error:
            if not in_folder or (kind != ".json" and not isinstance(error, NotJson)):
                raise
            wrong = "not JSON" if isinstance(error, NotJson) else f"without the key {options.text_key!r}"
            report.skip(f"{kind} {wrong}", path)
        yield from documents
    elif kind in TABLE_SUFFIXES:
        yield from read_table(path, name, options, report)
    else:
        yield from read_text(path, name, options, report)


def _read(location: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    if location == "stdlib":
        root = stdlib_root()
        for relative in stdlib_files():
            yield from read_text(root / relative, relative, ReadOptions(), report)
        return
    if location.startswith("hf:"):
        yield from read_hub(location, options, report)
        return
    if not location:
        raise UserError("a source is empty text: give stdlib, a file, a folder or hf:NAME")
    path = Path(location)
    if path.is_dir():
        files = files_of(path, options, report)
        # A saved data set without rows has no data file.
        if not files and _saved_files(path, [file.name for file in path.iterdir()]) is None:
            note = f"; {report.note()}" if report.skipped else ""
            raise UserError(f"{location}: this folder has no file of a known kind ({' '.join(KNOWN_SUFFIXES)}){note}")
        for name, file in files:
            yield from _read_file(file, name, options, report, in_folder=True)
    elif path.exists():
        yield from _read_file(path, path.name, options, report, in_folder=False)
    else:
        raise UserError(f"{location}: no such file or folder; other sources are stdlib and hf:NAME")


def read_documents(
    location: str, options: ReadOptions | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """Stream the documents of one source in a fixed order. Documents without text are left out.

    Args:
        location: ``stdlib``, a file, a folder or ``hf:NAME[:CONFIG[:SPLIT]]``.
        options: how documents are found in files; None uses the defaults.
        report: receives counts of what was replaced, cut or left out. It is complete when the stream ends.

    Raises:
        UserError: while reading, if a file or column is missing, a line is not JSON, or the hub cannot be reached.
    """
    report = report if report is not None else ReadReport()
    for identity, text in _read(location, options or ReadOptions(), report):
        if len(text) > readers.MAX_DOCUMENT_CHARACTERS:
            report.cut_documents += 1
            yield from (Document(f"{identity}.{number}", part) for number, part in enumerate(pieces([text], None)))
        elif text and not text.isspace():
            yield Document(identity, text)
        else:
            report.empty_documents += 1
