"""Streams documents from the embedded corpus, files, folders and the Hugging Face hub in bounded memory.

A source is ``stdlib``, a file, a folder or ``hf:NAME[:CONFIG[:SPLIT]]``. A name in front of it, as in ``code=stdlib`` or
``web=crawl/``, lets a mixture weight it. How files are read:

- Text (.txt .md .rst .py, and any other file that is named explicitly): one document per file, or cut at a separator.
- .jsonl .ndjson: one document per line, with its text under a key.
- .json: such lines, or one list of such objects with at most 256 Mi characters.
- .parquet: through the library `datasets`.
- All but parquet may be compressed as .gz or .zst.
- A folder is read recursively, in the order of its paths, without hidden files and files of other kinds.

Bytes that are not UTF-8 become U+FFFD and are counted. A file with a NUL byte in its first 8 KiB counts as binary, and its
NULs are replaced too. A file is skipped if more than 30 percent of its first MiB would be replaced. A byte order mark at
the start is dropped. Nothing else changes.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import socket
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from recurrent_db.data.corpus import Document, hash_share, stdlib_files, stdlib_root, stdlib_split
from recurrent_db.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".json", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")

MAX_DOCUMENT_CHARACTERS = 4 << 20
"""A longer text is cut at a line end into several documents, so that memory stays bounded."""

MAX_LINE_CHARACTERS = 64 << 20
"""A longer JSON line is refused, and a longer text between two separators is cut. This bounds memory, even for a small
compressed file that unpacks to a huge one."""

MAX_TABLE_CHARACTERS = 1 << 28
"""A longer list in one .json file is refused, because it must be held in memory."""

FEW_DOCUMENTS = 64
"""A source with fewer documents is not split by document. The end of each document is held out instead."""

_BLOCK_BYTES = 1 << 20
_SNIFF_BYTES = 8 << 10
_MAX_REPLACED_SHARE = 0.3
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


@dataclass
class ReadReport:
    """Counts of what reading replaced, cut or left out. Filled in while documents are read."""

    replaced_bytes: int = 0
    """Bytes that were replaced by U+FFFD: not UTF-8, or NULs of a binary file."""
    replaced_files: int = 0
    """Files in which bytes were replaced."""
    binary_files: int = 0
    """Files with a NUL byte in their first 8 KiB that were nevertheless read."""
    skipped_files: int = 0
    """Files left out because more than 30 percent of their first MiB would be replaced."""
    empty_documents: int = 0
    """Documents that were left out because they hold only white space or nothing."""
    cut_documents: int = 0
    """Documents that were cut because they were longer than `MAX_DOCUMENT_CHARACTERS`."""
    first_replaced: str = ""
    """Path of the first file in which bytes were replaced."""
    first_skipped: str = ""
    """Path of the first file that was left out."""

    def note(self) -> str | None:
        """One line about replaced bytes, skipped files and cut documents; None if there are none."""
        parts = []
        if self.replaced_bytes:
            binary = f", {self.binary_files} of them binary" if self.binary_files else ""
            parts.append(
                f"replaced {self.replaced_bytes} undecodable bytes by U+FFFD in {self.replaced_files} file(s){binary} "
                f"(first: {self.first_replaced})"
            )
        if self.skipped_files:
            parts.append(f"skipped {self.skipped_files} file(s) as not text (first: {self.first_skipped})")
        if self.cut_documents:
            parts.append(
                f"cut {self.cut_documents} document(s) longer than {MAX_DOCUMENT_CHARACTERS >> 20} Mi characters"
            )
        return "; ".join(parts) or None

    def counts(self) -> dict[str, int]:
        """The counts without the paths, for the manifest."""
        return {key: value for key, value in vars(self).items() if isinstance(value, int)}


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files."""

    text_key: str = "text"
    """Key or column of the text in JSON lines, JSON, parquet and hub data sets."""
    document_separator: str | None = None
    """String at which text files are cut into documents. None makes each file one document."""


def parse_source(source: str) -> tuple[str, str]:
    """Split "NAME=LOCATION" into (name, location). The name of a source without one is "default".

    The path of an existing file is taken as a location even if it contains "=".
    """
    match = _NAMED.fullmatch(source)
    if match and not Path(source).exists():
        return match[1], match[2]
    return "default", source


# ---------------------------------------------------------------------------------------------------------------
# Bytes -> text

_undecodable = 0


def _replace_and_count(error: UnicodeError) -> tuple[str, int]:
    global _undecodable
    assert isinstance(error, UnicodeDecodeError)
    _undecodable += error.end - error.start
    return "\ufffd", error.end


codecs.register_error("recurrent_db.count", _replace_and_count)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: reading .zst files needs pip install zstandard") from None
        return cast(IO[bytes], zstandard.open(path, "rb"))
    return path.open("rb")


def _text_blocks(path: Path, report: ReadReport) -> Iterator[str]:
    """The text of a file in blocks of about 1 MiB. Yields nothing for a file that is skipped."""
    decoder = codecs.getincrementaldecoder("utf-8")("recurrent_db.count")
    replaced, binary, first = 0, False, True
    try:
        with _open(path) as file:
            while True:
                raw = file.read(_BLOCK_BYTES)
                before = _undecodable
                text = decoder.decode(raw, final=not raw)
                bad = _undecodable - before
                if first:
                    binary = b"\x00" in raw[:_SNIFF_BYTES]
                    if raw and (bad + raw.count(b"\x00")) / len(raw) > _MAX_REPLACED_SHARE:
                        report.skipped_files += 1
                        report.first_skipped = report.first_skipped or str(path)
                        return
                    text = text.removeprefix("\ufeff")
                    first = False
                if binary:
                    bad += text.count("\x00")
                    text = text.replace("\x00", "\ufffd")
                replaced += bad
                if text:
                    yield text
                if not raw:
                    break
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if replaced:
        report.replaced_bytes += replaced
        report.replaced_files += 1
        report.binary_files += binary
        report.first_replaced = report.first_replaced or str(path)


def _pieces(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
    """Join ``blocks`` and cut them at ``separator``.

    Long texts are also cut at a line end: above `MAX_DOCUMENT_CHARACTERS` without a separator, above
    `MAX_LINE_CHARACTERS` between two separators.
    """
    most = MAX_LINE_CHARACTERS if separator else MAX_DOCUMENT_CHARACTERS
    buffer = ""
    for block in blocks:
        buffer += block
        if separator:
            *complete, buffer = buffer.split(separator)
            yield from complete
        while len(buffer) > most:
            end = buffer.rfind("\n", 0, most) + 1 or most
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


def _lines(path: Path, report: ReadReport) -> Iterator[str]:
    """The lines of a file. Raises `UserError` for a line longer than `MAX_LINE_CHARACTERS`."""
    held: list[str] = []
    size = number = 0
    for block in _text_blocks(path, report):
        first, *others = block.split("\n")
        held.append(first)
        size += len(first)
        if size > MAX_LINE_CHARACTERS:
            raise UserError(f"{path}:{number + 1}: line longer than {MAX_LINE_CHARACTERS >> 20} Mi characters")
        if others:
            yield "".join(held)
            yield from others[:-1]
            number += len(others)
            held, size = [others[-1]], len(others[-1])
    if size:
        yield "".join(held)


# ---------------------------------------------------------------------------------------------------------------
# Files -> (id, text)


def _kind(path: Path) -> str:
    """The suffix of ``path`` without its compression suffix, in lower case."""
    return Path(path.stem).suffix.lower() if path.suffix in COMPRESSED_SUFFIXES else path.suffix.lower()


def _read_text(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    parts = _pieces(_text_blocks(path, report), options.document_separator)
    for number, text in enumerate(parts):
        if number == 1 and not options.document_separator:
            report.cut_documents += 1
        yield (f"{name}#{number}" if number or options.document_separator else name), text


def _text_of(row: Any, where: str, options: ReadOptions) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the key {options.text_key!r}, found {type(row).__name__}")
    if options.text_key not in row:
        keys = ", ".join(map(str, itertools.islice(row, 12))) or "none"
        raise UserError(f"{where}: no column {options.text_key!r} (it has: {keys}); choose one with --text-key")
    text = row[options.text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: column {options.text_key!r} holds {type(text).__name__}, not text")
    return text or ""


def _read_lines(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path, report), start=1):
        if line.strip():
            row = _parse_json(line, f"{path}:{number}: not a line of JSON")
            yield f"{name}#{number}", _text_of(row, f"{path}:{number}", options)


def _parse_json(text: str, message: str) -> Any:
    """Parse JSON. Raises `UserError` with ``message`` and a reason."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{message} (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{message} ({getattr(error, 'msg', error)})") from None


def _read_json(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """Read a .json file: one list of objects, or JSON lines."""
    blocks = _text_blocks(path, report)
    start = next((block for block in blocks if block.strip()), "")
    if not start.lstrip().startswith("["):
        yield from _read_lines(path, name, options, report)
        return
    held, size = [start], len(start)
    for block in blocks:
        held.append(block)
        size += len(block)
        if size > MAX_TABLE_CHARACTERS:
            raise UserError(
                f"{path}: list longer than {MAX_TABLE_CHARACTERS >> 20} Mi characters: write JSON lines instead"
            )
    for number, row in enumerate(_parse_json("".join(held), f"cannot read {path}: not JSON")):
        yield f"{name}#{number}", _text_of(row, str(path), options)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("parquet and hf: sources need the library datasets: pip install 'recurrent-db[data]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _rows(where: str, arguments: dict[str, Any], name: str, options: ReadOptions) -> Iterator[tuple[str, str]]:
    datasets = _datasets()
    try:
        for number, row in enumerate(datasets.load_dataset(streaming=True, **arguments)):
            yield f"{name}#{number}", _text_of(row, where, options)
    except UserError:
        raise
    except Exception as error:  # the library and its readers raise many types; all mean that the input is unreadable
        raise UserError(f"cannot read {where}: {_first_line(error)}") from None


def _read_parquet(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    return _rows(str(path), {"path": "parquet", "data_files": str(path.absolute()), "split": "train"}, name, options)


def _read_file(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    kind = _kind(path)
    if kind in LINE_SUFFIXES:
        return _read_lines(path, name, options, report)
    if kind in TABLE_SUFFIXES:
        return (_read_json if kind == ".json" else _read_parquet)(path, name, options, report)
    return _read_text(path, name, options, report)


def _files_of(folder: Path) -> list[Path]:
    known = (*TEXT_SUFFIXES, *LINE_SUFFIXES, *TABLE_SUFFIXES)
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(
        (path for path in found if _kind(path) in known), key=lambda path: path.relative_to(folder).as_posix()
    )


# ---------------------------------------------------------------------------------------------------------------
# The hub


def _check_hub(name: str) -> None:
    """Raise `UserError` at once without a network. The hub's client would first retry for half a minute."""
    if Path(name).exists() or urllib.request.getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise UserError(f"hf:{name}: cannot reach {host} (no network?); give local files instead") from None


def _read_hub(location: str, options: ReadOptions) -> Iterator[tuple[str, str]]:
    name, _, rest = location.removeprefix("hf:").partition(":")
    config, _, part = rest.partition(":")
    if not name:
        raise UserError(f"{location}: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    _datasets()
    _check_hub(name)
    return _rows(location, {"path": name, "name": config or None, "split": part or "train"}, name, options)


# ---------------------------------------------------------------------------------------------------------------
# Sources -> documents


def _read(location: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    if location == "stdlib":
        root = stdlib_root()
        for relative in stdlib_files():
            yield from _read_text(root / relative, relative, ReadOptions(), report)
        return
    if location.startswith("hf:"):
        yield from _read_hub(location, options)
        return
    path = Path(location)
    if path.is_dir():
        files = _files_of(path)
        if not files:
            kinds = " ".join((*TEXT_SUFFIXES, *LINE_SUFFIXES, *TABLE_SUFFIXES))
            raise UserError(f"{location}: this folder has no file of a known kind ({kinds})")
        for file in files:
            yield from _read_file(file, file.relative_to(path).as_posix(), options, report)
    elif path.exists():
        yield from _read_file(path, path.name, options, report)
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
        if len(text) > MAX_DOCUMENT_CHARACTERS:
            report.cut_documents += 1
            yield from (Document(f"{identity}.{number}", part) for number, part in enumerate(_pieces([text], None)))
        elif text and not text.isspace():
            yield Document(identity, text)
        else:
            report.empty_documents += 1


def _hold_out_end(document: Document, holdout: float) -> Iterator[tuple[str, Document]]:
    """Cut one document in two, at a line end if possible: about the last ``holdout`` (0 to 1) of it is validation."""
    text = document.text
    end = round(len(text) * (1 - holdout))
    end = text.rfind("\n", end // 2, end) + 1 or end
    if text[:end]:
        yield "train", Document(document.id, text[:end])
    if text[end:]:
        yield "validation", Document(f"{document.id}@end", text[end:])


def split_documents(location: str, documents: Iterable[Document], holdout: float) -> Iterator[tuple[str, Document]]:
    """Assign the documents of one source to "train" and "validation": yields (split, document).

    The embedded corpus is split by a hash of each file's path, other sources by a hash of each document's text, so that
    copies of a document are in the same split. In a source of fewer than `FEW_DOCUMENTS` documents, such as one book in
    one file, the end of each document is held out instead.

    Args:
        holdout: share that goes to "validation" (0 to 1).
    """
    documents = iter(documents)
    if holdout <= 0:
        yield from (("train", document) for document in documents)
    elif location == "stdlib":
        yield from ((stdlib_split(document.id, holdout), document) for document in documents)
    else:
        head = list(itertools.islice(documents, FEW_DOCUMENTS))
        if len(head) < FEW_DOCUMENTS:
            for document in head:
                yield from _hold_out_end(document, holdout)
            return
        for document in itertools.chain(head, documents):
            yield ("validation" if hash_share(document.text) < holdout else "train"), document
