"""Writes a data directory of token shards. The format is described in `shards`."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recurrent_db.data.directory import NewDirectory
from recurrent_db.data.shards import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    check_source_name,
    token_dtype,
)
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import file_digest

DEFAULT_SHARD_TOKENS = 64_000_000


@dataclass
class _SourceWriter:
    """Appends documents of one (split, source) to its shards."""

    folder: Path
    stem: str
    dtype: np.dtype[Any]
    shard_tokens: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    text_hash: Any = field(default_factory=hashlib.sha256)
    file: BinaryIO | None = None
    offsets: list[int] = field(default_factory=list)

    def add(self, identity: str, text: bytes, tokens: np.ndarray) -> None:
        for part in (identity.encode("utf-8", errors="surrogatepass"), text):
            self.text_hash.update(len(part).to_bytes(8, "little"))
            self.text_hash.update(part)
        if self.file is not None and self.offsets[-1] + len(tokens) > self.shard_tokens:
            self.close_shard()
        if self.file is None:
            self.name = f"{self.stem}-{len(self.shards):05d}"
            self.file = (self.folder / f"{self.name}.bin").open("wb")
            self.file_hash = hashlib.sha256()
            self.offsets = [0]
            self.text_bytes = 0
        raw = tokens.astype(self.dtype, copy=False).tobytes()
        self.file.write(raw)
        self.file_hash.update(raw)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.text_bytes += len(text)

    def close_shard(self) -> None:
        if self.file is None:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        offsets = self.folder / f"{self.name}.offsets.npy"
        np.save(offsets, np.array(self.offsets, dtype=np.int64), allow_pickle=False)
        self.shards.append(
            {
                "file": f"{self.name}.bin",
                "tokens": self.offsets[-1],
                "documents": len(self.offsets) - 1,
                "bytes": self.text_bytes,
                "sha256": self.file_hash.hexdigest(),
                "offsets_file": offsets.name,
                "offsets_sha256": file_digest(offsets),
            }
        )

    def entry(self) -> dict[str, Any]:
        self.close_shard()
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("tokens", "documents", "bytes")}
        return {**totals, "text_sha256": self.text_hash.hexdigest(), "shards": self.shards}


class DataWriter:
    """Builds a data directory as a context manager, as `directory.NewDirectory` says.

    Args:
        out, overwrite: as in `directory.NewDirectory`.
        tokenizer: the tokenizer of the documents' tokens; it is saved with them.
        shard_tokens: most tokens per shard. A longer document has a shard of its own.

    Raises:
        UserError: ``out`` exists or cannot be created, or ``shard_tokens`` is below 1.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        tokenizer: Tokenizer,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        overwrite: bool = False,
    ) -> None:
        if shard_tokens < 1:
            raise UserError("the number of tokens per shard must be at least 1")
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self._writers: dict[tuple[str, str], _SourceWriter] = {}
        self._directory = NewDirectory(out, overwrite)

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        for writer in self._writers.values():
            if writer.file is not None:
                with contextlib.suppress(OSError):  # on a full disk the flush fails again
                    writer.file.close()
        self._directory.__exit__(*failure)

    def add(self, split: str, source: str, identity: str, text: bytes, ids: Sequence[int]) -> int:
        """Append one document.

        Args:
            split: "train" or "validation".
            source: name of the source.
            identity: id of the document, which enters the source's text hash.
            text: the document's text in UTF-8.
            ids: its token ids, without a separator.

        Returns:
            The number of tokens written, separator included.

        Raises:
            UserError: ``source`` cannot be part of a file name.
        """
        writer = self._writers.get((split, source))
        if writer is None:
            check_source_name(source)
            dtype = token_dtype(self.tokenizer.vocab_size)
            writer = _SourceWriter(self._directory.folder, f"{split}-{source}", dtype, self.shard_tokens)
            self._writers[split, source] = writer
        tokens = np.empty(len(ids) + 1, dtype=writer.dtype)
        tokens[:-1] = ids
        tokens[-1] = self.tokenizer.eos_id
        writer.add(identity, text, tokens)
        return len(tokens)

    def commit(self, reading: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Finish the shards, write the manifest, rename the directory to ``out``, and return the manifest.

        Args:
            reading: options and counts of reading, recorded in the manifest. No program reads them.

        Raises:
            UserError: ``out`` was created in the meantime.
        """
        splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
        for (split, source), writer in self._writers.items():
            splits[split][source] = writer.entry()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dtype": token_dtype(self.tokenizer.vocab_size).name,
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "tokenizer": {"file": TOKENIZER_FILE, "hash": self.tokenizer.hash},
            "splits": splits,
            "reading": dict(reading or {}),
        }
        self.tokenizer.save(self._directory.folder / TOKENIZER_FILE)
        self._directory.commit(manifest)
        return manifest
