"""Reads tables: parquet and Arrow files with pyarrow, data sets of the Hugging Face hub with the library `datasets`.

Local paths go to pyarrow as open files. Libraries that take path names would read ``* ? [ ]`` and ``::`` as patterns.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from recurrent_db.data.readers import ReadOptions, ReadReport, text_of
from recurrent_db.data.unpacking import COMPRESSED_SUFFIXES
from recurrent_db.errors import UserError

Item = TypeVar("Item")

_BATCH_ROWS = 1024
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of an Arrow stream. pyarrow does not miss them in a file that was cut between two batches."""


def read_table(path: Path, name: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """The documents of a .parquet or .arrow file, as (id, text). Each id begins with ``name``."""
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise UserError(f"{path}: parquet and Arrow files compress themselves: unpack this one")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise _missing("parquet and Arrow files") from None
    read = _parquet_texts if path.suffix.lower() == ".parquet" else _arrow_texts
    try:
        with path.open("rb") as file:
            for number, text in enumerate(read(file, str(path), options)):
                if (found := text_of({options.text_key: text}, str(path), options, report)) is not None:
                    yield f"{name}#{number}", found
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types; all mean that the input is unreadable
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def _check_column(names: list[str], where: str, options: ReadOptions) -> None:
    text_of(dict.fromkeys(names, ""), where, options, ReadReport())
    if names.count(options.text_key) > 1:
        raise UserError(f"{where}: two columns {options.text_key!r}")


def _parquet_texts(file: IO[bytes], where: str, options: ReadOptions) -> Iterator[Any]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file, page_checksum_verification=True)
    if not table.metadata.num_rows:
        return
    _check_column(table.schema_arrow.names, where, options)
    for batch in table.iter_batches(_BATCH_ROWS, columns=[options.text_key]):
        yield from batch.column(options.text_key).to_pylist()


def _arrow_texts(file: IO[bytes], where: str, options: ReadOptions) -> Iterator[Any]:
    from pyarrow import ipc

    if file.read(6) == b"ARROW1":
        reader = ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_STREAM_END)))
        if file.read() != _STREAM_END:
            raise UserError(f"{where}: damaged or incomplete Arrow file: its end is missing")
        file.seek(0)
        reader = batches = ipc.open_stream(file)
    for batch in batches:
        if batch.num_rows:
            _check_column(reader.schema.names, where, options)
            column = batch.column(options.text_key)
            column.validate(full=True)
            yield from column.to_pylist()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _missing(what: str) -> UserError:
    return UserError(f"{what} need the library datasets: pip install 'recurrent-db[data]'")


# ---------------------------------------------------------------------------------------------------------------
# The hub


def _check_hub(name: str) -> None:
    """Raise `UserError` at once without a network. The hub's client would first retry for half a minute."""
    if Path(name).exists():
        if any(mark in name for mark in ("*", "?", "[", "::")):
            raise UserError(f"hf:{name}: this path would be read as a pattern: give the folder without hf:")
        return
    if urllib.request.getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise UserError(f"hf:{name}: cannot reach {host} (no network?); give local files instead") from None


def open_hub(location: str, what: Callable[[Any], Iterator[Item]]) -> Iterator[Item]:
    """Stream ``what(data set)`` of ``hf:NAME[:CONFIG[:SPLIT]]``. The data set is an ``IterableDataset``.

    Raises:
        UserError: while reading, if the library is missing, or the data set cannot be read.
    """
    name, _, rest = location.removeprefix("hf:").partition(":")
    config, _, part = rest.partition(":")
    if not name:
        raise UserError(f"{location}: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError:
        raise _missing("hf: sources") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    _check_hub(name)
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        # By default a parquet reader takes as many rows at once as the first row group has, even if it has none.
        if getattr(builder.config, "batch_size", _BATCH_ROWS) is None:
            builder.config.batch_size = _BATCH_ROWS
        yield from what(builder.as_streaming_dataset(split=part or "train"))
    except UserError:
        raise
    except Exception as error:  # the library and its readers raise many types; all mean that the input is unreadable
        raise UserError(f"cannot read {location}: {first_line(error)}") from None


def read_hub(location: str, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """The documents of ``hf:NAME[:CONFIG[:SPLIT]]``, as (id, text)."""
    name = location.removeprefix("hf:").partition(":")[0]

    def texts(rows: Any) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(rows):
            if (text := text_of(row, location, options, report)) is not None:
                yield f"{name}#{number}", text

    yield from open_hub(location, texts)
