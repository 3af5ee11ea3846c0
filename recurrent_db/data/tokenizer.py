"""The tokenizer class of the project, and the training of new tokenizers.

`Tokenizer` opens two kinds of model: a sentencepiece model with byte fallback (`sentencepiece_tokenizer`), and a
Hugging Face byte-level BPE (`byte_level_tokenizer`).

``decode(encode(text))`` returns any UTF-8 text unchanged, and the byte lengths of its tokens add up to its length in UTF-8.
Bits per byte divide by this length. To guarantee both, texts are joined from the tokens' bytes (`Tokenizer.decode_bytes`)
and not by the libraries. One exception: a lone surrogate, which a Python ``str`` may hold, has no UTF-8 form and is
encoded as U+FFFD.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece

from recurrent_db.data import byte_level_tokenizer, sentencepiece_tokenizer
from recurrent_db.data.sentencepiece_tokenizer import SPACE_MARK
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic

MIN_VOCAB = 272
"""Smallest vocabulary that can be trained, in tokens: 4 special tokens, 256 bytes and a few characters."""

MAX_VOCAB = 1 << 24
"""Largest vocabulary of a model (``model.vocab_size``), in tokens. It fits into the 32 bits of sentencepiece's options."""

_SURROGATE = re.compile("[\ud800-\udfff]")

HOSTILE_TEXTS = (
    "",
    "\x00",
    "a\x00b",
    " ",
    "   leading and trailing   ",
    "\t\ttabs\tinside\t",
    "line\r\nline\rline\n\n\n",
    "def f(x):\n    if x:\n        return  x\n",
    "\u2581",
    " \u2581\u2581 \u2581a",
    "\u2047 \ufffd \ufeff",
    "\u0301lone combining mark",
    "e\u0301 \u00e9 \ufb01 \u2126 \uff21",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\u05e9\u05dc\u05d5\u05dd \u202e\u0645\u0631\u062d\u0628\u0627\u202c",
    "\u65e5\u672c\u8a9e\u3000\u5168\u89d2",
    "\u00a0\u2003\u2028\u2029\u0085",
    "<s></s><unk><pad><0x41><0xFF>",
    "1234567890 3.14159",
    "\U0010ffff\ue000",
    "x" * 10_000,
)
"""Texts that a tokenizer must decode unchanged. Training raises an error for a model that does not."""


def replace_surrogates(text: str) -> str:
    """``text`` with each lone surrogate replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


class Tokenizer:
    """Lossless tokenizer: each token stands for a fixed sequence of bytes.

    Args:
        path: a sentencepiece ``.model`` file with byte fallback, or a Hugging Face tokenizer as an imported checkpoint
            stores it (`byte_level_tokenizer.wrap`). The latter may be lossy if it normalises text.

    Raises:
        UserError: the file is missing, unreadable or not a tokenizer, cannot represent every text, or has no
            end-of-sequence token.
    """

    kind: ClassVar[str] = "tokenizers"
    file_name: ClassVar[str] = "tokenizer.model"
    """Its file in data directories and checkpoints."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer model {path}: {error.strerror or error}") from None
        self._load(model_bytes, f"tokenizer model {path}")

    @classmethod
    def from_bytes(cls, model_bytes: bytes, name: str = "tokenizer model") -> Tokenizer:
        """Build from the bytes of a model file. ``name`` is its name in error messages. Raises as the class does."""
        self = cls.__new__(cls)
        self._load(bytes(model_bytes), name)
        return self

    def _load(self, model_bytes: bytes, name: str) -> None:
        self.is_byte_level = byte_level_tokenizer.is_wrapped(model_bytes)
        """Whether this is a byte-level Hugging Face tokenizer."""
        load = byte_level_tokenizer.load if self.is_byte_level else sentencepiece_tokenizer.load
        backend = load(model_bytes, name)
        self._encode, self._token_bytes = backend.encode, backend.token_bytes
        self.model_bytes = model_bytes
        """The unchanged bytes of the model file."""
        self.hash = hashlib.sha256(model_bytes).hexdigest()[:16]
        """The first 16 hexadecimal digits of the SHA-256 of `model_bytes`."""
        self.vocab_size: int = len(backend.token_bytes)
        self.eos_id: int = backend.eos_id
        """Id of the document separator."""
        self.bos_id: int = backend.bos_id
        self.pad_id: int = backend.pad_id
        self._byte_lengths = np.array([len(piece) for piece in self._token_bytes], dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        No special token is added. Text that looks like a special token ("</s>") is encoded as ordinary text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of several texts, on ``threads`` threads. The result does not depend on the number of threads."""
        return self._encode([replace_surrogates(text) for text in texts], max(1, threads))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for. Special tokens have none.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        pieces = self._token_bytes
        chosen = [int(i) for i in ids]
        if chosen and not 0 <= min(chosen) <= max(chosen) < len(pieces):
            raise IndexError(f"token id outside the vocabulary of {len(pieces)}: {min(chosen)} to {max(chosen)}")
        return b"".join([pieces[i] for i in chosen])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, without special tokens. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Number of bytes that each token stands for, int32, shape (vocab_size,). 0 for special tokens."""
        return self._byte_lengths.copy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file atomically. An existing file is replaced."""
        write_atomic(Path(path), self.model_bytes)


# ---------------------------------------------------------------------------------------------------------------
# Training


def _lines_to_chunks(text: str, size: int = 2048) -> Iterator[str]:
    """Cut ``text`` into chunks of whole lines with about ``size`` characters each.

    sentencepiece drops "sentences" that are too long. With several lines in a chunk, pieces that contain line breaks can
    form. A line longer than 2 * ``size`` is cut.
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1
        if end <= 0 or end - start > 2 * size:
            end = min(len(text), start + 2 * size)
        yield text[start:end]
        start = end


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of chunks with at most ``max_bytes`` UTF-8 bytes, drawn in one pass. Deterministic."""
    heap: list[tuple[int, int, int, str]] = []  # (-hash, -order, bytes, chunk): the largest hash is removed first
    total = order = 0
    for text in texts:
        for chunk in _lines_to_chunks(text):
            order += 1
            draw = int.from_bytes(hashlib.blake2b(f"{seed}/{order}".encode(), digest_size=8).digest(), "big")
            if total >= max_bytes and -heap[0][0] < draw:
                continue
            size = len(chunk.encode())
            heapq.heappush(heap, (-draw, -order, size, chunk))
            total += size
            while total > max_bytes and len(heap) > 1:
                total -= heapq.heappop(heap)[2]
    return [chunk for _, _, _, chunk in sorted(heap, key=lambda item: -item[1])]


RESERVED = "\u2585"
"""sentencepiece drops every training text with this character. It can only be a piece that is asked for by name."""


def _count(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    for text in texts:
        counts.update(text)
        yield text


def _frequent_characters(counts: Counter[str], vocab_size: int) -> set[str]:
    """The characters that get a piece of their own in a vocabulary of longer pieces.

    At least half of the remaining pieces are then longer than a character. sentencepiece's own coverage option cannot do
    this for a small vocabulary, because it does not go below 98 percent.
    """
    kept: set[str] = set()
    covered, total = 0, counts.total()
    for character, count in _ranked(counts)[: (vocab_size - 260) // 2]:
        kept.add(character)
        covered += count
        if covered >= 0.9995 * total:
            break
    return kept


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _restrict_characters(chunks: list[str], kept: set[str]) -> list[str]:
    """Replace other characters by spaces, so that they get no piece of their own and are encoded as bytes."""
    table = {ord(character): " " for chunk in chunks for character in set(chunk) - kept}
    return [chunk if kept.issuperset(chunk) else chunk.translate(table) for chunk in chunks]


def _chunks_and_characters(
    texts: Iterable[str], vocab_size: int, model_type: str, max_bytes: int, seed: int
) -> tuple[list[str], set[str]]:
    """A sample of ``texts``, and the characters that get a piece of their own."""
    counts: Counter[str] = Counter()
    # A space mark and a NUL cannot have a piece of their own.
    cleaned = (replace_surrogates(text).replace(SPACE_MARK, " ").replace("\x00", " ") for text in texts)
    chunks = _sample(_count(cleaned, counts) if model_type == "char" else cleaned, max_bytes, seed)
    if not any(chunk.strip() for chunk in chunks):
        raise UserError("there is no text to train a tokenizer on")
    if model_type == "char":
        kept = {" ", *[character for character, _ in _ranked(counts) if character != " "][: vocab_size - 261]}
        chunks += _lines_to_chunks("".join(sorted(kept.difference(*chunks))))  # the sample may lack rare characters
    else:
        for chunk in chunks:
            counts.update(chunk)
        kept = _frequent_characters(counts, vocab_size)
    return chunks, kept


def train(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    max_bytes: int = 8 << 20,
    seed: int = 0,
) -> bytes:
    """Train a lossless sentencepiece model. The same texts and arguments give the same bytes.

    Args:
        texts: documents, read once in order.
        vocab_size: tokens in the vocabulary, including 4 special tokens and 256 byte pieces.
        model_type: "bpe", "unigram" (slower to train, no better for source code) or "char" (one token for each character of
            ``texts``, the most frequent first; ``vocab_size`` is then an upper limit, and the vocabulary may be smaller).
        max_bytes: UTF-8 bytes of text to train on, sampled uniformly from ``texts``.
        seed: seed of the sample.

    Returns:
        The bytes of the model file.

    Raises:
        UserError: there is no text, ``vocab_size`` is below `MIN_VOCAB` or above `MAX_VOCAB`, or the text cannot fill the
            vocabulary. The message then says how many tokens it can fill.
    """
    if model_type not in ("bpe", "unigram", "char"):
        raise UserError(f"unknown tokenizer model type {model_type!r}: choose bpe, unigram or char")
    if vocab_size < MIN_VOCAB:
        raise UserError(f"vocabulary size {vocab_size} is too small: 256 bytes and 4 special tokens need {MIN_VOCAB}")
    if vocab_size > MAX_VOCAB:
        raise UserError(f"vocabulary size {vocab_size} is too large: use at most {MAX_VOCAB}")
    if max_bytes < 1:
        raise UserError("the tokenizer must be trained on at least 1 byte of text")
    chunks, kept = _chunks_and_characters(texts, vocab_size, model_type, max_bytes, seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_restrict_characters(chunks, kept - {RESERVED})),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=model_type != "char",
            model_type=model_type,
            character_coverage=1.0,
            required_chars=SPACE_MARK,
            user_defined_symbols=[RESERVED] if model_type == "char" and RESERVED in kept else [],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=4,  # fixed, because unigram's floating-point sums depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit:
            raise UserError(
                f"this text can fill a vocabulary of at most {limit[1]} tokens, not {vocab_size}: "
                f"use more text or a smaller vocabulary"
            ) from None
        raise UserError(f"sentencepiece could not train: {str(error).rsplit(']', 1)[-1].strip() or error}") from None
    trained = model.getvalue()
    tokenizer = Tokenizer.from_bytes(trained, "the trained tokenizer")
    if tokenizer.vocab_size != vocab_size and not (model_type == "char" and tokenizer.vocab_size < vocab_size):
        raise UserError(f"sentencepiece made {tokenizer.vocab_size} tokens, not the {vocab_size} asked for")
    check_lossless(tokenizer, [*HOSTILE_TEXTS, *chunks[:100]])
    return trained


def check_lossless(tokenizer: Tokenizer, texts: Sequence[str] = HOSTILE_TEXTS) -> None:
    """Raise RuntimeError unless each text is decoded unchanged and its tokens' byte lengths add up to its own length."""
    lengths = tokenizer.byte_lengths()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        size = int(lengths[np.array(ids, dtype=np.int64)].sum())
        if tokenizer.decode(ids) != text or size != len(text.encode()):
            raise RuntimeError(f"the tokenizer does not round-trip {text[:80]!r}")
