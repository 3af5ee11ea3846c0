"""Reads documents from the embedded corpus, files, folders and the Hugging Face hub, as a stream in bounded memory.

A source is written ``stdlib``, a FILE, a DIR or ``hf:NAME[:CONFIG[:SPLIT]]``. A name in front of it, as in
``code=stdlib`` or ``web=crawl/``, lets a mixture weight it.

- Text (.txt .md .rst .py, and any other file named explicitly): one document per file, or cut at a separator.
- .jsonl .ndjson: one document per line, the text under a key. .json: such lines, or one list of such objects, of at most
  256 Mi characters. .parquet: through `datasets`.
- Each of these also as .gz or .zst, except parquet. A folder is read recursively in order of path; hidden files, and
  files of other kinds, are left out.

Bytes that are not UTF-8 become U+FFFD, and are counted. A file with a NUL byte in its first 8 KiB counts as binary: its
NULs are replaced as well. A file is skipped if more than 30 percent of its first MiB would be replaced. A byte order mark
at the start is dropped. Nothing else is changed.
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
"""A longer text is cut at a line end into several documents, so that a file of any size streams."""

MAX_LINE_CHARACTERS = 64 << 20
"""A longer line of JSON is refused, and a longer text without a separator is cut, so that no file fills the memory, nor what
a small compressed file unpacks to."""

MAX_TABLE_CHARACTERS = 1 << 28
"""A larger list in one .json file is refused. JSON lines and parquet stream."""

FEW_DOCUMENTS = 64
"""A source with fewer documents is not split by document: the end of each document is held out instead."""

_BLOCK_BYTES = 1 << 20
_SNIFF_BYTES = 8 << 10
_MAX_REPLACED_SHARE = 0.3
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


@dataclass
class ReadReport:
    """What reading had to change or leave out; filled in while documents are read."""

    replaced_bytes: int = 0
    """Bytes that were not UTF-8, or NULs of a binary file, now U+FFFD."""
    replaced_files: int = 0
    binary_files: int = 0
    """Files with a NUL byte in their first 8 KiB that were read all the same."""
    skipped_files: int = 0
    """Files left out because more than 30 percent of them was unreadable."""
    empty_documents: int = 0
    """Documents without text, or with nothing but white space."""
    cut_documents: int = 0
    """Documents that were longer than `MAX_DOCUMENT_CHARACTERS`."""
    first_replaced: str = ""
    first_skipped: str = ""

    def note(self) -> str | None:
        """One line for people, or None when there is nothing to say."""
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
        """The numbers alone, for the manifest."""
        return {key: value for key, value in vars(self).items() if isinstance(value, int)}


@dataclass(frozen=True)
class ReadOptions:
    """How text is found in files."""

    text_key: str = "text"
    """Column or key that holds a document's text in JSON lines, JSON, parquet and hub data sets."""
    document_separator: str | None = None
    """Cut text files at this string into documents; None takes each file as one document."""


def parse_source(source: str) -> tuple[str, str]:
    """("NAME=SOURCE" or "SOURCE") -> (name, location). Sources without a name together form "default"."""
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
    """The file's text in blocks of about 1 MiB; nothing for a file that is skipped."""
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
    """Join ``blocks`` and cut them at ``separator``. Without a separator, or in a long text between two, cut parts that fit
    in memory."""
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
    """The lines of a file. Raises `UserError` for one that is longer than `MAX_LINE_CHARACTERS`."""
    held: list[str] = []
    size = number = 0
    for block in _text_blocks(path, report):
        first, *others = block.split("\n")
        held.append(first)
        size += len(first)
        if size > MAX_LINE_CHARACTERS:
            raise UserError(f"{path}:{number + 1}: a line of more than {MAX_LINE_CHARACTERS >> 20} Mi characters")
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
    """The suffix that says how to read ``path``, compression set aside."""
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
            row = _parsed(line, f"{path}:{number}: not a line of JSON")
            yield f"{name}#{number}", _text_of(row, f"{path}:{number}", options)


def _parsed(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{complaint} (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{complaint} ({getattr(error, 'msg', error)})") from None


def _read_json(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """A list of objects, or lines of JSON."""
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
                f"{path}: a list of more than {MAX_TABLE_CHARACTERS >> 20} Mi characters: write JSON lines instead"
            )
    for number, row in enumerate(_parsed("".join(held), f"cannot read {path}: not JSON")):
        yield f"{name}#{number}", _text_of(row, str(path), options)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("parquet and hf: sources need the datasets library: pip install recurrent-db[data]") from None
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
    except Exception as error:  # whatever the library or its readers raise, it is the input that they cannot read
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
    """Fail at once without a network: the hub's client would retry for half a minute first."""
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
            raise UserError(f"{location}: no files of a known kind in this folder ({kinds})")
        for file in files:
            yield from _read_file(file, file.relative_to(path).as_posix(), options, report)
    elif path.exists():
        yield from _read_file(path, path.name, options, report)
    else:
        raise UserError(f"{location}: no such file or folder (nor 'stdlib' nor 'hf:NAME')")


def read_documents(
    location: str, options: ReadOptions | None = None, report: ReadReport | None = None
) -> Iterator[Document]:
    """Stream the documents of one source, in a fixed order; documents without text are left out.

    Args:
        location: ``stdlib``, a file, a folder or ``hf:NAME[:CONFIG[:SPLIT]]``.
        report: counts what was replaced, cut or left out; complete once the stream has ended.

    Raises:
        UserError: while reading: a missing file or column, a line that is no JSON, an unreachable hub.
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
    """Cut one document in two: its last ``holdout`` share, from a line end on, is validation."""
    text = document.text
    end = round(len(text) * (1 - holdout))
    end = text.rfind("\n", end // 2, end) + 1 or end
    if text[:end]:
        yield "train", Document(document.id, text[:end])
    if text[end:]:
        yield "validation", Document(f"{document.id}@end", text[end:])


def split_documents(location: str, documents: Iterable[Document], holdout: float) -> Iterator[tuple[str, Document]]:
    """Turn the documents of one source into (split, document), about ``holdout`` of them going to "validation".

    The embedded corpus is split by the path of the file; other sources by a hash of the document's text, so that two
    copies of it fall on the same side. A source of fewer than `FEW_DOCUMENTS` documents has no such choice (think of
    one book in one file): the end of each document is held out.
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
