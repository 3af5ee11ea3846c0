"""Tokenises text sources into a data directory of token shards."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from recurrent_db.data.corpus import Document, hash_share
from recurrent_db.data.holdout import split_documents
from recurrent_db.data.readers import ReadOptions, ReadReport
from recurrent_db.data.shard_writer import DEFAULT_SHARD_TOKENS, DataWriter
from recurrent_db.data.shards import check_source_name
from recurrent_db.data.sources import parse_source, read_documents
from recurrent_db.data.tokenizer import Tokenizer, replace_surrogates
from recurrent_db.errors import UserError

# Text given to the tokenizer's threads at once: enough to keep them busy, little enough to fit in memory.
_BYTES_PER_WORKER = 1 << 20
_MAX_CHUNK_BYTES = 64 << 20


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Prepared:
    """Result of `prepare`."""

    out: str
    documents: int
    tokens: int
    """Tokens of both splits, document separators included."""
    validation_tokens: int
    text_bytes: int
    """UTF-8 bytes of text."""
    seconds: float
    note: str | None
    """One line about what was replaced, skipped, left out or cut; None if nothing was."""
    manifest: dict[str, Any]

    def summary(self) -> str:
        """One line with the counts, the share held out and the speed."""
        share = 100 * self.validation_tokens / self.tokens
        return (
            f"{self.out}: {self.documents:,} documents, {self.tokens:,} tokens ({self.validation_tokens:,} held out, "
            f"{share:.3g} percent), {self.text_bytes / self.tokens:.2f} bytes per token, {self.seconds:.1f} s, "
            f"{self.text_bytes / 1e6 / max(self.seconds, 1e-9):.1f} MB/s"
        )


_Item = tuple[str, str, Document, bytes]
"""A document on its way to the writer: (split, source, document, its text in UTF-8)."""


@dataclass
class _Limit:
    """Documents and bytes that may still be read from one named source. None is no limit."""

    documents: int | None
    bytes: int | None

    def take(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield documents until a limit is reached. The last one is cut to fit, at a line end if it has one."""
        if self.spent():
            return
        for document in documents:
            text = replace_surrogates(document.text)
            if self.bytes is not None:
                raw = text.encode()
                if len(raw) > self.bytes:
                    raw = raw[: self.bytes]
                    text = raw[: raw.rfind(b"\n") + 1 or None].decode("utf-8", errors="ignore")
                self.bytes -= len(raw)
            if self.documents is not None:
                self.documents -= 1
            if text:
                yield Document(document.id, text)
            if self.spent():
                return

    def spent(self) -> bool:
        return self.documents == 0 or self.bytes == 0


def _by_name(sources: Sequence[str]) -> dict[str, list[str]]:
    """Group the locations of ``NAME=LOCATION`` strings by name. Raises `UserError` for a bad name."""
    groups: dict[str, list[str]] = {}
    for source in sources:
        name, location = parse_source(source)
        check_source_name(name)
        groups.setdefault(name, []).append(location)
    return groups


def prepare(
    sources: Sequence[str],
    tokenizer: str | os.PathLike[str] | Tokenizer,
    out: str | os.PathLike[str],
    *,
    val_sources: Sequence[str] = (),
    holdout: float = 0.05,
    workers: int | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    max_documents: int | None = None,
    max_bytes: int | None = None,
    part: tuple[int, int] = (1, 1),
    options: ReadOptions | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Prepared:
    """Tokenise ``sources`` into the data directory ``out``. The result does not depend on ``workers``.

    Args:
        sources: ``stdlib``, files, folders, or ``hf:NAME[:CONFIG[:SPLIT]]``. ``NAME=SOURCE`` gives a source a name.
            Sources without a name together form the source "default".
        tokenizer: a tokenizer, or the path of its model.
        val_sources: validation text. Without it, the share ``holdout`` (0 to 1) of ``sources`` is held out
            (`holdout.split_documents`).
        workers: tokenising threads; None uses all cores.
        shard_tokens: most tokens per shard.
        max_documents, max_bytes: most documents and UTF-8 bytes of text to read from each named source; None is no limit.
        part: (i, n) reads the i-th of n parts of ``sources``, counted from 1. A hash of a document's text chooses its part,
            so the parts have no document in common. ``val_sources`` are read whole.
        overwrite: replace an existing data directory once the new one is complete.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: an argument is wrong, an input cannot be read, there is no text, or ``out`` cannot be written. ``out`` is
            then unchanged.
    """
    _check_arguments(sources, holdout, part, workers=workers, max_documents=max_documents, max_bytes=max_bytes)
    started = time.perf_counter()
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
    workers = workers or cores()
    report = ReadReport()
    limit = _Limit(max_documents, max_bytes)
    items = _items(_by_name(sources), _by_name(val_sources), holdout, part, limit, options or ReadOptions(), report)
    tokens = {"train": 0, "validation": 0}
    count = text_bytes = 0
    with (
        DataWriter(out, tokenizer, shard_tokens, overwrite) as writer,
        tqdm(desc="tokenising", unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for chunk in _chunks(items, min(workers * _BYTES_PER_WORKER, _MAX_CHUNK_BYTES)):
            encoded = tokenizer.encode_batch([document.text for _, _, document, _ in chunk], workers)
            for (split, name, document, raw), ids in zip(chunk, encoded, strict=True):
                tokens[split] += writer.add(split, name, document.id, raw, ids)
                count += 1
                text_bytes += len(raw)
                bar.update(len(raw))
        note = report.note()
        _check_not_empty(tokens, sources, val_sources, holdout, note)
        settings = {"sources": list(sources), "val_sources": list(val_sources), "holdout": holdout}
        if part != (1, 1):
            settings["part"] = list(part)
        manifest = writer.commit(
            {**settings, "max_documents": max_documents, "max_bytes": max_bytes, **report.counts()}
        )
    seconds = time.perf_counter() - started
    return Prepared(
        str(out), count, sum(tokens.values()), tokens["validation"], text_bytes, seconds, note, manifest
    )  # fmt: skip


def _check_arguments(sources: Sequence[str], holdout: float, part: tuple[int, int], **limits: int | None) -> None:
    if not sources:
        raise UserError("no source is given")
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be at least 0 and below 1, not {holdout}")
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"{name} must be at least 1, not {limit}")
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: parts are numbered from 1 to {part[1]}")


def _items(
    train: dict[str, list[str]],
    validation: dict[str, list[str]],
    holdout: float,
    part: tuple[int, int],
    limit: _Limit,
    options: ReadOptions,
    report: ReadReport,
) -> Iterator[_Item]:
    """The documents of all sources with their splits. ``limit`` applies to each named source."""
    jobs = [("train", name, where) for name, where in train.items()]
    jobs += [("validation", name, where) for name, where in validation.items()]
    for split, name, locations in jobs:
        left = replace(limit)
        share = holdout if split == "train" and not validation else 0.0
        # Files and folders of one name are split together, so that copies in two of them are not parted.
        for embedded, group in itertools.groupby(locations, "stdlib".__eq__):
            every = itertools.chain.from_iterable(read_documents(location, options, report) for location in group)
            texts = left.take(_of_part(every, *part) if split == "train" else every)
            for side, document in split_documents("stdlib" if embedded else "", texts, share):
                yield (side if share else split), name, document, document.text.encode()


def _of_part(documents: Iterable[Document], part: int, parts: int) -> Iterator[Document]:
    for document in documents:
        if parts == 1 or int(hash_share(f"part:{document.text}") * parts) == part - 1:
            yield document


def _chunks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Group documents into chunks of about ``size`` bytes of text."""
    chunk: list[_Item] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += len(item[3])
        if held >= size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _check_not_empty(
    tokens: dict[str, int], sources: Sequence[str], val_sources: Sequence[str], holdout: float, note: str | None
) -> None:
    because = f" ({note})" if note else ""
    if not sum(tokens.values()) or (val_sources and not tokens["train"]):
        raise UserError(f"no text in {', '.join(sources)}{because}")
    if val_sources and not tokens["validation"]:
        raise UserError(f"no text in {', '.join(val_sources)}{because}")
    if not tokens["train"] or (holdout and not tokens["validation"]):
        missing = "left to train on" if not tokens["train"] else "held out for validation"
        raise UserError(
            f"nothing of {', '.join(sources)} was {missing} at --holdout {holdout}: "
            f"change the share, set --val-source, or use more text"
        )
