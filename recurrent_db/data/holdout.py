"""Splits the documents of a source into "train" and "validation", so that the share held out is near the one asked for.

Short documents go whole to one of the two, and long ones give their end to "validation". The split is a function of the
documents alone. Copies of a document are split in the same way: together, or at the same place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from recurrent_db.data.corpus import Document, hash_share, stdlib_split

HEAD_BYTES = 32 << 20
"""UTF-8 bytes of text that are read before the first document is assigned. They say which documents are long."""

_LONG = 1 / 20
"""A document is long if it and its copies hold more than this share of the bytes to be held out of the head."""
_SHORT_BYTES = 100
"""A document is not long below this size, in bytes."""
_LINE_SHARE = 1 / 8
"""A cut moves to the nearest line end, or else to the nearest blank, within this share of the part held out."""


def split_documents(location: str, documents: Iterable[Document], holdout: float) -> Iterator[tuple[str, Document]]:
    """Assign the documents of one source to "train" and "validation": yields (split, document) in the same order.

    The embedded corpus is split by a hash of each file's path. In other sources the short documents of the head are held
    out in the order of their hashes until their share is reached. Later ones are assigned by their hash alone.

    Args:
        location: where the documents are from; only ``stdlib`` matters.
        holdout: share of the text that goes to "validation" (0 to 1).
    """
    documents = iter(documents)
    if holdout <= 0:
        yield from (("train", document) for document in documents)
        return
    if location == "stdlib":
        yield from ((stdlib_split(document.id, holdout), document) for document in documents)
        return
    head: list[tuple[float, Document]] = []
    groups: dict[float, int] = defaultdict(int)  # the bytes of a text and its copies, by its hash
    total = 0
    for document in documents:
        size = _size(document)
        key = hash_share(document.text)
        head.append((key, document))
        groups[key] += size
        total += size
        if total >= HEAD_BYTES:
            break
    longest = max(total * holdout * _LONG, _SHORT_BYTES)
    long = {key for key, size in groups.items() if size > longest}
    held_out = _choose({key: size for key, size in groups.items() if key not in long}, holdout)
    for key, document in head:
        if key in long:
            yield from _hold_out_end(document, holdout)
        else:
            yield ("validation" if key in held_out else "train"), document
    head.clear()
    for document in documents:
        key = hash_share(document.text)
        if key in long or (key not in groups and _size(document) > longest):
            yield from _hold_out_end(document, holdout)
        else:
            yield ("validation" if (key in held_out if key in groups else key < holdout) else "train"), document


def _size(document: Document) -> int:
    return len(document.text.encode("utf-8", errors="surrogatepass"))


def _choose(sizes: dict[float, int], holdout: float) -> set[float]:
    """The hashes of the texts to hold out: in rising order, each that brings the share nearer to ``holdout``."""
    left = sum(sizes.values()) * holdout
    chosen = set()
    for key in sorted(sizes):
        if sizes[key] <= 2 * left:
            chosen.add(key)
            left -= sizes[key]
    return chosen


def _hold_out_end(document: Document, holdout: float) -> Iterator[tuple[str, Document]]:
    """Cut one document in two: about the last ``holdout`` (0 to 1) of it is validation."""
    text = document.text
    held = len(text) * holdout
    end, reach = round(len(text) - held), int(held * _LINE_SHARE)
    for mark in ("\n", " "):
        near = [text.rfind(mark, end - reach, end) + 1, text.find(mark, end, end + reach) + 1]
        if any(near):
            end = min((cut for cut in near if cut), key=lambda cut: abs(cut - end))
            break
    if text[:end]:
        yield "train", Document(document.id, text[:end])
    if text[end:]:
        yield "validation", Document(f"{document.id}@end", text[end:])
