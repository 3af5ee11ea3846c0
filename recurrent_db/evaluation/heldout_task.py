"""Makes tasks for the lm-eval harness from the held-out documents of a data directory, so that a run can be evaluated
offline. Nothing is downloaded. The same data give the same items.

- ``heldout_cloze``, multiple choice: a context that ends at a line break, and four candidates for the next line. One is
  true; the other three are lines of about the same length from other held-out documents. Chance is 0.25.
- ``heldout_last_word``, in the style of LAMBADA (arXiv:1606.06031): a passage whose last word occurred earlier in it. The
  answer is that whole word.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from recurrent_db.data import document, load_tokenizer, open_data
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.rng import key

N_CHOICES = 4

# Limits on the text that is read, so that a split of any size takes about a second.
_DOCUMENTS = 128
_TOKENS_PER_DOCUMENT = 1 << 14
_LINES_PER_DOCUMENT = 64

# Lengths in characters. Longer lines (a paragraph of prose) are cut at the end of a word.
_CONTEXT, _LEAST_CONTEXT = 256, 64
_LINE = 80
_LETTERS = 8
_PASSAGE = 300
_WORD = re.compile(r"(?<= )[^\W\d_]{4,}(?!\w)")


@dataclass(frozen=True)
class _Line:
    """A line that may become the answer of an item."""

    document: str
    context: str
    text: str
    hash: int
    """Random key that orders the lines."""


@dataclass(frozen=True)
class Item:
    """One question, as in the JSONL file."""

    context: str
    choices: list[str]
    label: int
    """Index of the true continuation in ``choices``."""
    document: str
    """Source and number of the held-out document."""


@dataclass(frozen=True)
class Passage:
    """A text whose last word must be predicted, as in the JSONL file."""

    text: str
    document: str
    """Source and number of the held-out document."""


def _context(text: str, end: int, most: int = _CONTEXT) -> str:
    """At most ``most`` characters before ``end``, starting at a line or else at a word if possible."""
    if end <= most:
        return text[:end]
    start = end - most
    for border in ("\n", " "):
        found = text.find(border, start, end - most // 2)
        if found >= 0:
            return text[found + 1 : end]
    return text[start:end]


def _lines(name: str, text: str, seed: int) -> Iterator[_Line]:
    """Lines of a document with enough context before them, and enough letters to differ from other documents' lines."""
    for match in re.finditer(r"(?<=\n)[^\n]+(?=\n)", text):
        if len(text[: match.start()].strip()) < _LEAST_CONTEXT:
            continue
        line = match[0].rstrip()
        if len(line) > _LINE:
            line = line[:_LINE].rsplit(" ", 1)[0].rstrip()
        if sum(map(str.isalpha, line)) >= _LETTERS:
            yield _Line(name, _context(text, match.start()), line, key("line", seed, name, match.start(), line))


def _documents(directory: Path, seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of a random sample of held-out documents. Of a long document, only a part."""
    tokenizer = load_tokenizer(directory)
    data = open_data(directory, "validation", verify=True)
    names = [(source, number) for source in data.sources for number in range(data.sources[source].documents)]
    names.sort(key=lambda name: key("document", seed, *name))
    for source, number in names[:_DOCUMENTS]:
        ids = document(data.sources[source], number)
        spare = len(ids) - _TOKENS_PER_DOCUMENT
        start = key("start", seed, source, number) % (spare + 1) if spare > 0 else 0
        text = tokenizer.decode(ids[start : start + _TOKENS_PER_DOCUMENT])
        yield f"{source}/{number}", text[text.find("\n") + 1 :] if start else text


def heldout_items(directory: Path, count: int = 200, seed: int = 0) -> list[Item]:
    """At most ``count`` items from the validation split of a data directory, the same in every call.

    Raises:
        UserError: there is no data directory, or too little held-out text (an item needs lines of several documents).
    """
    by_document = []
    for name, text in _documents(directory, seed):
        lines = sorted(_lines(name, text, seed), key=lambda line: line.hash)
        by_document.append(lines[:_LINES_PER_DOCUMENT])
    pool = [line for lines in by_document for line in lines]
    # Take one line per document in turn, so that no document dominates.
    turns = (lines[turn] for turn in range(_LINES_PER_DOCUMENT) for lines in by_document if turn < len(lines))
    items: list[Item] = []
    for line in turns:
        others = _nearest(line, pool)
        if len(others) == N_CHOICES - 1:
            label = key("label", line.hash) % N_CHOICES
            choices = [*others[:label], line.text, *others[label:]]
            items.append(Item(line.context, choices, label, line.document))
        if len(items) == count:
            break
    if not items:
        raise UserError(f"{directory}: too little held-out text for heldout_cloze: it needs lines of several documents")
    return items


def _nearest(line: _Line, pool: list[_Line]) -> list[str]:
    """Up to three lines of other documents that differ from ``line`` and from each other. Lines whose length is within a
    tenth of its own come first, in random order, then the lines nearest in length."""
    length = len(line.text)

    def order(other: _Line) -> tuple[int, int]:
        distance = abs(len(other.text) - length)
        return distance if distance > max(2, length // 10) else 0, other.hash ^ line.hash

    chosen: dict[str, str] = {}
    for other in sorted(pool, key=order):
        stripped = other.text.strip()
        if other.document != line.document and stripped != line.text.strip() and stripped not in chosen:
            chosen[stripped] = other.text
            if len(chosen) == N_CHOICES - 1:
                break
    return list(chosen.values())


def heldout_passages(directory: Path, count: int = 200, seed: int = 0) -> list[Passage]:
    """At most ``count`` passages from the validation split of a data directory, the same in every call.

    Raises:
        UserError: there is no data directory, or no held-out passage repeats its last word.
    """
    by_document: list[list[tuple[int, Passage]]] = []
    for name, text in _documents(directory, seed):
        found = []
        for match in _WORD.finditer(text):
            before = _context(text, match.start(), _PASSAGE)
            if len(before.strip()) >= _LEAST_CONTEXT and re.search(rf"\b{match[0]}\b", before):
                found.append((key("word", seed, name, match.start()), Passage(before + match[0], name)))
        by_document.append(sorted(found, key=lambda pair: pair[0]))
    longest = max(map(len, by_document), default=0)
    turns = (found[turn][1] for turn in range(longest) for found in by_document if turn < len(found))
    passages = list(islice(turns, count))
    if not passages:
        raise UserError(f"{directory}: no held-out text for heldout_last_word: no passage repeats its last word")
    return passages


_MAKERS: dict[str, Callable[[Path, int, int], Sequence[Item | Passage]]] = {
    "heldout_cloze": heldout_items,
    "heldout_last_word": heldout_passages,
}


def write_heldout_task(directory: Path, task: str = "heldout_cloze", count: int = 200, seed: int = 0) -> Path:
    """Write a task's items as JSONL into the data directory, or into a new temporary folder if that is read-only.

    Items are made anew in each call, so the file is never out of date.

    Returns:
        The file's absolute path.

    Raises:
        UserError: as `heldout_items` and `heldout_passages`.
    """
    text = "".join(json.dumps(asdict(item)) + "\n" for item in _MAKERS[task](directory, count, seed))
    path = directory.resolve() / f"{task}.jsonl"
    try:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="heldout-")) / path.name
        write_atomic(path, text)
    return path
