"""Reads the bytes of files, compressed or not."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from recurrent_db.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".zst")

BLOCK_BYTES = 1 << 20
_PACKED_BYTES = 1 << 10
"""Compressed bytes that are unpacked at once. 1 KiB of zstandard can hold 32 MiB of text."""


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file in blocks of `BLOCK_BYTES`, unpacked if its suffix is one of `COMPRESSED_SUFFIXES`.

    Raises:
        UserError: the file cannot be read, or its compressed data is damaged or incomplete.
    """
    held = bytearray()
    try:
        with path.open("rb") as file:
            packed = path.suffix.lower() in COMPRESSED_SUFFIXES
            for block in _unpack(file, path) if packed else iter(lambda: file.read(BLOCK_BYTES), b""):
                held += block
                while len(held) >= BLOCK_BYTES:
                    yield bytes(held[:BLOCK_BYTES])
                    del held[:BLOCK_BYTES]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if held:
        yield bytes(held)


def _unpacker(path: Path) -> Callable[[], Any]:
    """A function that makes objects to unpack one stream, with ``decompress``, ``eof`` and ``unused_data``."""
    if path.suffix.lower() == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: .zst files need the library zstandard: pip install 'recurrent-db[data]'") from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _unpack(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Unpack all streams of a file. zstandard's own reader does not miss the end of a stream, or later streams."""

    def damaged(reason: object) -> UserError:
        return UserError(f"{path}: damaged or incomplete {path.suffix} file: {reason}")

    unpacker = _unpacker(path)
    raw = file.read(_PACKED_BYTES)
    if not raw:
        raise damaged("it is empty")
    while raw:
        stream = unpacker()
        while not stream.eof:
            if not raw:
                raw = file.read(_PACKED_BYTES)
            if not raw:
                raise damaged("its end is missing")
            try:
                block = stream.decompress(raw)
            except Exception as error:  # each library has its own types
                raise damaged(error) from None
            raw = b""
            yield block
        raw = stream.unused_data or file.read(_PACKED_BYTES)
        while raw and not (raw := raw.lstrip(b"\0")):  # padding with zeros is allowed
            raw = file.read(_PACKED_BYTES)
