"""The format of a data directory of token shards, and how it is read. `shard_writer` writes it.

A data directory holds

- ``manifest.json``: format version, dtype, vocabulary size, tokenizer, and the shards of each split and source with their
  sizes and SHA-256 checksums;
- ``tokenizer.model``: a copy of the tokenizer that made the tokens;
- ``SPLIT-SOURCE-NNNNN.bin``: token ids as raw little-endian uint16 (vocabulary up to 65,536) or uint32. The tokenizer's
  end-of-sequence token follows each document. A document never spans two shards;
- ``SPLIT-SOURCE-NNNNN.offsets.npy``: int64, shape (documents + 1,). The position in the shard at which each document
  begins, then the length of the shard.

A directory is built under another name and renamed when it is complete, so an interrupted build never looks like one.
"""

from __future__ import annotations

import itertools
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_db.data.directory import MANIFEST, check_digest, check_size, is_count, path_inside, read_format
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import is_altered

FORMAT = "recurrent_db.tokens"
FORMAT_VERSION = 1
TOKENIZER_FILE = "tokenizer.model"
SPLITS = ("train", "validation")
PIECE = 1 << 22
"""Token ids that are read at once while a whole shard is checked."""

_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian uint16 if it holds every id below ``vocab_size``, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def check_source_name(name: str) -> None:
    """Raise UserError for a source name that cannot be part of a file name."""
    if not _SOURCE_NAME.fullmatch(name):
        raise UserError(f"source name {name!r}: use letters, digits, '.', '_' and '-'")


class FileArray:
    """A one-dimensional array in a file, which need not fit in memory. Slicing reads the slice into a new NumPy array.

    If the file is truncated while it is open, reading raises an error; a memory map would kill the process (SIGBUS). A
    file that was removed can still be read.

    Args:
        path: the file. It stays open as long as the array exists.
        dtype: dtype of the elements.
        count: number of elements.
        start: offset of the first element in the file, in bytes.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int, start: int = 0) -> None:
        self.path, self.dtype, self.start, self._count = path, dtype, start, count
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, piece: slice) -> np.ndarray:
        """Read a slice of step 1.

        Raises:
            UserError: the file was truncated, or cannot be read.
            ValueError: another step.
        """
        begin, end, step = piece.indices(self._count)
        if step != 1:
            raise ValueError(f"a slice of a FileArray must have step 1, not {step}")
        values = np.empty(max(0, end - begin), self.dtype)
        left, place = values.view(np.uint8).data, self.start + begin * self.dtype.itemsize
        try:
            while left:
                read = os.pread(self._descriptor, len(left), place)
                if not read:
                    size, whole = os.fstat(self._descriptor).st_size, self.start + self._count * self.dtype.itemsize
                    raise UserError(f"{self.path}: truncated while in use: {size} bytes of {whole} are left")
                left[: len(read)] = read
                left, place = left[len(read) :], place + len(read)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        return values


@dataclass
class TokenSource:
    """The concatenated shards of one source: ``tokens`` token ids, which need not fit in memory."""

    name: str
    arrays: Sequence[np.ndarray | FileArray]
    """Token ids of each shard, uint16 or uint32, 1-dimensional."""
    offsets: Sequence[np.ndarray | FileArray]
    """Document boundaries of each shard, int64, shape (documents + 1,)."""
    bytes: int
    """UTF-8 bytes of the text."""

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *(len(array) for array in self.arrays)])
        self.tokens = int(self.starts[-1])
        self.documents = sum(len(offsets) - 1 for offsets in self.offsets)

    def read(self, start: int, count: int) -> np.ndarray:
        """Token ids ``start`` to ``start + count`` (exclusive), shape (count,), in the shards' dtype.

        Raises:
            IndexError: the range is outside the source.
            UserError: a shard was truncated after it was opened, or cannot be read.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(
                f"tokens {start} to {start + count} are outside source {self.name!r}, which has {self.tokens} tokens"
            )
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while count > 0:
            begin = start - int(self.starts[shard])
            part = self.arrays[shard][begin : begin + count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        if not parts:
            return self.arrays[0][:0] if self.arrays else np.empty(0, dtype=np.uint16)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass
class TokenData:
    """One split of a data directory."""

    sources: dict[str, TokenSource]
    vocab_size: int
    eos_id: int
    tokenizer_hash: str = ""
    directory: Path | None = None
    split: str = "train"

    @property
    def tokens(self) -> int:
        """Number of tokens of all sources, document separators included."""
        return sum(source.tokens for source in self.sources.values())

    @property
    def documents(self) -> int:
        """Number of documents of all sources."""
        return sum(source.documents for source in self.sources.values())

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all sources."""
        return sum(source.bytes for source in self.sources.values())

    @property
    def where(self) -> str:
        """The name of this data in error messages."""
        return f"{self.directory or 'data'} ({self.split})"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], vocab_size: int, eos_id: int) -> TokenData:
        """Data in memory, for tests and experiments.

        Args:
            arrays: token ids of each source by name, 1-dimensional.
        """
        sources = {}
        for name, array in arrays.items():
            ends = np.flatnonzero(array == eos_id) + 1
            if len(array) and (not len(ends) or ends[-1] != len(array)):
                ends = np.append(ends, len(array))
            sources[name] = TokenSource(name, [array], [np.concatenate([[0], ends]).astype(np.int64)], bytes=0)
        return cls(sources, vocab_size, eos_id)


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the manifest of a data directory.

    Raises:
        UserError: the manifest is missing, unreadable, or not of this format and version.
    """
    manifest = read_format(directory, FORMAT, FORMAT_VERSION, "token shards", "train/prepare_data.py")
    problem = _problem(manifest)
    if problem:
        raise UserError(f"{Path(directory) / MANIFEST}: damaged: {problem}")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the keys and types of a manifest; None if they are right."""
    if not is_count(manifest.get("vocab_size")) or not is_count(manifest.get("eos_id")):
        return "vocab_size and eos_id must be numbers"
    if manifest.get("dtype") not in ("uint16", "uint32"):
        return f"dtype {manifest.get('dtype')!r} is neither uint16 nor uint32"
    tokenizer = manifest.get("tokenizer")
    if not isinstance(tokenizer, dict) or not all(isinstance(tokenizer.get(key), str) for key in ("file", "hash")):
        return "no tokenizer file and hash"
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(sources, dict) for sources in splits.values()):
        return "no splits"
    for split, sources in splits.items():
        for name, entry in sources.items():
            if not _SOURCE_NAME.fullmatch(name):
                return f"{name[:200]!r} is not a source name"
            shards = entry.get("shards") if isinstance(entry, dict) else None
            if not isinstance(shards, list):
                return f"{split}.{name} has no shards"
            for shard in shards:
                texts = ("file", "sha256", "offsets_file", "offsets_sha256")
                if not isinstance(shard, dict) or not all(isinstance(shard.get(key), str) for key in texts):
                    return f"a shard of {split}.{name} lacks its files and checksums"
                if not all(is_count(shard.get(key)) for key in ("tokens", "documents", "bytes")):
                    return f"a shard of {split}.{name} lacks its sizes"
    return None


_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)(\{'descr': '<i8', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n)", re.DOTALL
)


def _open_offsets(path: Path) -> FileArray | None:
    """Open a file of offsets written by `shard_writer`, int64 and not empty. None for any other file.

    NumPy's own reader is too permissive for untrusted files: it accepts archives, parses headers as Python, and believes
    any size.
    """
    with path.open("rb") as file:
        match = _NPY_HEADER.match(file.read(256))
    if match is None or int.from_bytes(match[1], "little") != len(match[2]):
        return None
    count = int(match[3])
    if not count or path.stat().st_size != match.end() + 8 * count:
        return None
    return FileArray(path, np.dtype("<i8"), count, match.end())


def _open_shard(
    directory: Path, shard: dict[str, Any], dtype: np.dtype[Any], vocab_size: int, verify: bool
) -> tuple[FileArray, FileArray]:
    path, offsets_path = path_inside(directory, shard["file"]), path_inside(directory, shard["offsets_file"])
    try:
        check_size(path, shard["tokens"] * dtype.itemsize)
        if verify:
            check_digest(path, shard["sha256"])
            check_digest(offsets_path, shard["offsets_sha256"])
        tokens = FileArray(path, dtype, shard["tokens"])
        offsets = _open_offsets(offsets_path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    if offsets is None:
        raise UserError(f"{offsets_path}: damaged: not an array of offsets; prepare the data again")
    ends = [*offsets[:1].tolist(), *offsets[-1:].tolist()]
    fits = len(offsets) == shard["documents"] + 1 and ends == [0, shard["tokens"]]
    if not fits or (verify and bool((np.diff(offsets[:]) < 0).any())):
        raise UserError(f"{offsets_path}: damaged: it does not fit its shard; prepare the data again")
    for start in range(0, len(tokens) if verify else 0, PIECE):
        largest = int(tokens[start : start + PIECE].max())
        if largest >= vocab_size:
            raise UserError(f"{path}: damaged: token id {largest} outside the vocabulary of {vocab_size}")
    return tokens, offsets


def open_data(
    directory: str | os.PathLike[str],
    split: str,
    expect_tokenizer_hash: str | None = None,
    verify: bool = False,
) -> TokenData:
    """Open one split of a data directory. Tokens are read from disk as they are needed.

    Args:
        split: "train" or "validation".
        expect_tokenizer_hash: `Tokenizer.hash` that the data must have; None accepts any.
        verify: check every file's SHA-256 and every token id. Sizes are always checked.

    Raises:
        UserError: the manifest or a file is missing or damaged, the tokenizer is another, a file name points outside the
            directory, or the split is empty.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    found = manifest["tokenizer"]["hash"]
    if expect_tokenizer_hash is not None and found != expect_tokenizer_hash:
        raise UserError(
            f"{directory}: made with tokenizer {found}, but this run uses tokenizer {expect_tokenizer_hash}: "
            f"prepare the data with that tokenizer"
        )
    dtype = np.dtype("<u2" if manifest["dtype"] == "uint16" else "<u4")
    sources: dict[str, TokenSource] = {}
    for name, entry in manifest["splits"].get(split, {}).items():
        opened = [_open_shard(directory, shard, dtype, manifest["vocab_size"], verify) for shard in entry["shards"]]
        arrays, offsets = [tokens for tokens, _ in opened], [offsets for _, offsets in opened]
        sources[name] = TokenSource(name, arrays, offsets, sum(shard["bytes"] for shard in entry["shards"]))
    if verify and is_altered(directory / MANIFEST):
        raise UserError(f"{directory / MANIFEST}: damaged: its checksum is wrong; prepare the data again")
    if not any(source.tokens for source in sources.values()):
        there = [name for name, entries in manifest["splits"].items() if entries]
        raise UserError(f"{directory}: no {split!r} split (it has: {', '.join(there) or 'none'})")
    return TokenData(sources, manifest["vocab_size"], manifest["eos_id"], found, directory, split)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a data directory. Raises UserError if it is missing or differs from the manifest's."""
    manifest = read_manifest(directory)
    path = path_inside(Path(directory), manifest["tokenizer"]["file"])
    tokenizer = Tokenizer(path)
    if tokenizer.hash != manifest["tokenizer"]["hash"]:
        raise UserError(f"{path}: damaged: not the tokenizer that made these data (hash {tokenizer.hash})")
    return tokenizer


def document(source: TokenSource, number: int) -> np.ndarray:
    """Token ids of document ``number`` (from 0) of ``source``, separator included. Raises IndexError if there is none."""
    counts = itertools.accumulate(len(offsets) - 1 for offsets in source.offsets)
    before = 0
    for shard, until in enumerate(counts):
        if before <= number < until:
            begin, end = source.offsets[shard][number - before : number - before + 2].tolist()
            return source.arrays[shard][begin:end]
        before = until
    raise IndexError(f"no document {number} in source {source.name!r}, which has {source.documents}")
