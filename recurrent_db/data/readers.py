"""Reads the documents of one file, as (id, text), in bounded memory. `sources` lists the formats."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurrent_db.data.unpacking import COMPRESSED_SUFFIXES, read_blocks
from recurrent_db.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".py")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".json", ".parquet", ".arrow")
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, *TABLE_SUFFIXES)

MAX_DOCUMENT_CHARACTERS = 4 << 20
"""A longer text is cut at a line end into several documents, so that memory stays bounded."""

MAX_LINE_CHARACTERS = 64 << 20
"""A longer JSON line is refused, and a longer text between two separators is cut. This bounds memory, even for a small
compressed file that unpacks to a huge one."""

MAX_TABLE_CHARACTERS = 1 << 28
"""A longer .json file that is not JSON lines is refused, because it must be held in memory."""

_SNIFF_BYTES = 8 << 10
_MAX_REPLACED_SHARE = 0.3
_MOST_REASONS = 8


@dataclass
class ReadReport:
    """Counts of what reading replaced, cut or left out. Filled in while documents are read."""

    replaced_bytes: int = 0
    """Bytes that were replaced by U+FFFD: not UTF-8, or NULs of a binary file."""
    replaced_files: int = 0
    """Files in which bytes were replaced."""
    binary_files: int = 0
    """Files with a NUL byte in their first 8 KiB that were nevertheless read."""
    null_texts: int = 0
    """Rows of tables and JSON lines that were left out because their text is null."""
    empty_documents: int = 0
    """Other documents that were left out because they hold only white space or nothing."""
    cut_documents: int = 0
    """Documents that were cut because they were longer than `MAX_DOCUMENT_CHARACTERS`."""
    first_replaced: str = ""
    """Path of the first file in which bytes were replaced."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files and folders that were left out, by reason."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """Path of the first file that was left out, by reason."""

    @property
    def skipped_files(self) -> int:
        """Files and folders that were left out."""
        return self.skipped.total()

    def skip(self, reason: str, path: Path) -> None:
        """Count a file or folder that is left out."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, str(path))

    def note(self) -> str | None:
        """One line about replaced bytes, skipped files, and documents left out or cut; None if there are none."""
        parts = []
        if self.replaced_bytes:
            binary = f", {self.binary_files} of them binary" if self.binary_files else ""
            parts.append(
                f"replaced {self.replaced_bytes} undecodable bytes by U+FFFD in {self.replaced_files} file(s){binary} "
                f"(first: {self.first_replaced})"
            )
        if self.skipped:
            reasons = [
                f"{count} {reason} (first: {self.first_skipped[reason]})"
                for reason, count in self.skipped.most_common(_MOST_REASONS)
            ]
            others = sum(count for _, count in self.skipped.most_common()[_MOST_REASONS:])
            reasons += [f"{others} for other reasons"] if others else []
            parts.append(f"skipped {self.skipped_files} file(s): {', '.join(reasons)}")
        if self.null_texts:
            parts.append(f"left out {self.null_texts} null text(s)")
        if self.empty_documents:
            parts.append(f"left out {self.empty_documents} empty document(s)")
        if self.cut_documents:
            parts.append(
                f"cut {self.cut_documents} document(s) longer than {MAX_DOCUMENT_CHARACTERS >> 20} Mi characters"
            )
        return "; ".join(parts) or None

    def counts(self) -> dict[str, Any]:
        """The counts without the paths, for the manifest."""
        numbers = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {**numbers, "skipped_files": dict(self.skipped)}


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files."""

    text_key: str = "text"
    """Key or column of the text in JSON lines, JSON, parquet, Arrow and hub data sets."""
    document_separator: str | None = None
    """String at which text files are cut into documents. None makes each file one document."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of files and folders that are left out of folders. A pattern is compared with names and with paths
    in the folder."""


class NoText(UserError):
    """A table or JSON file has no text under the key."""


class NotJson(NoText):
    """A file's content has nothing in common with the JSON that its suffix promises."""


def kind_of(path: Path) -> str:
    """The suffix of ``path`` without its compression suffix, in lower case."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path.name).suffix.lower()


# ---------------------------------------------------------------------------------------------------------------
# Bytes -> text

_undecodable = 0


def _replace_and_count(error: UnicodeError) -> tuple[str, int]:
    global _undecodable
    assert isinstance(error, UnicodeDecodeError)
    _undecodable += error.end - error.start
    return "\ufffd", error.end


codecs.register_error("recurrent_db.count", _replace_and_count)


def _text_blocks(path: Path, report: ReadReport) -> Iterator[str]:
    """The text of a file in blocks of about 1 MiB. Yields nothing for a file that is skipped."""
    decoder = codecs.getincrementaldecoder("utf-8")("recurrent_db.count")
    replaced, binary = 0, False
    for number, raw in enumerate(itertools.chain(read_blocks(path), [b""])):
        before = _undecodable
        text = decoder.decode(raw, final=not raw)
        bad = _undecodable - before
        if not number:
            binary = b"\x00" in raw[:_SNIFF_BYTES]
            if raw and (bad + raw.count(b"\x00")) / len(raw) > _MAX_REPLACED_SHARE:
                report.skip("not text", path)
                return
            text = text.removeprefix("\ufeff")
        if binary:
            bad += text.count("\x00")
            text = text.replace("\x00", "\ufffd")
        replaced += bad
        if text:
            yield text
    if replaced:
        report.replaced_bytes += replaced
        report.replaced_files += 1
        report.binary_files += binary
        report.first_replaced = report.first_replaced or str(path)


def pieces(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
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
# Text -> documents


def read_text(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """The documents of a text file, as (id, text). Each id begins with ``name``."""
    parts = pieces(_text_blocks(path, report), options.document_separator)
    for number, text in enumerate(parts):
        if number == 1 and not options.document_separator:
            report.cut_documents += 1
        yield (f"{name}#{number}" if number or options.document_separator else name), text


def text_of(row: Any, where: str, options: ReadOptions, report: ReadReport) -> str | None:
    """The text of one row of a table. A null text is counted."""
    if not isinstance(row, dict):
        raise NoText(f"{where}: expected an object with the key {options.text_key!r}, found {type(row).__name__}")
    if options.text_key not in row:
        keys = ", ".join(map(str, itertools.islice(row, 12))) or "none"
        raise NoText(
            f"{where}: no column {options.text_key!r} (it has: {keys}); choose one with --text-key, or leave the file "
            "out of its folder with --exclude"
        )
    text = row[options.text_key]
    if text is None:
        report.null_texts += 1
    elif not isinstance(text, str):
        raise UserError(f"{where}: column {options.text_key!r} holds {type(text).__name__}, not text")
    return text


def read_lines(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """The documents of a file of JSON lines.

    Raises:
        NoText: a line has no text under the key. `NotJson` if the first line does not even begin as JSON.
        UserError: a line is not JSON, or too long.
    """
    read = False
    for number, line in enumerate(_lines(path, report), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                kind = UserError if read or line.lstrip().startswith(("{", "[")) else NotJson
                raise kind(f"{path}:{number}: not a line of JSON ({_reason(error)})") from None
            read = True
            if (text := text_of(row, f"{path}:{number}", options, report)) is not None:
                yield f"{name}#{number}", text


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))


def _begins_with_lines(path: Path) -> bool:
    """Whether the first line of a .json file is an object, as in JSON lines. A line longer than a block counts too."""
    blocks = _text_blocks(path, ReadReport())
    start = next((block for block in blocks if not block.isspace()), "").lstrip()
    line, end, _ = start.partition("\n")
    try:
        return line.startswith("{") and (isinstance(json.loads(line), dict) if end else any(blocks))
    except (ValueError, RecursionError):
        return False


def _values(text: str) -> Iterator[Any]:
    """The values of JSON text: objects one after the other, and the elements of lists."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
    at = blank.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]
        at = blank.match(text, at).end()  # type: ignore[union-attr]


def read_json(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """The documents of a .json file: JSON lines, or objects and lists of objects, which may be indented.

    Raises:
        NoText: a value has no text under the key. `NotJson` if the file is not JSON and the key is nowhere in it.
        UserError: the file is not JSON, or too long.
    """
    if _begins_with_lines(path):
        yield from read_lines(path, name, options, report)
        return
    held, size = [], 0
    for block in _text_blocks(path, report):
        held.append(block)
        size += len(block)
        if size > MAX_TABLE_CHARACTERS:
            raise UserError(f"{path}: longer than {MAX_TABLE_CHARACTERS >> 20} Mi characters: write JSON lines instead")
    text = "".join(held)
    try:
        for number, row in enumerate(_values(text)):
            if (found := text_of(row, str(path), options, report)) is not None:
                yield f"{name}#{number}", found
    except (ValueError, RecursionError) as error:
        kind = UserError if json.dumps(options.text_key) in text else NotJson
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise kind(f"{path}{line}: not JSON ({_reason(error)})") from None
