"""A lossless tokenizer, mostly around a sentencepiece model, and the training of such.

Any UTF-8 text survives ``decode(encode(text))`` exactly, and the byte lengths of its tokens add up to the length of
the text in UTF-8, which is what bits per byte divide by. Three things make that true of any model with byte fallback:

- the model's own normalisation (Unicode folding, dummy prefix, whitespace collapse) is switched off on loading;
- sentencepiece writes a space as U+2581, so a literal U+2581 would come back as a space: the text is cut around it,
  and its three byte pieces are put there directly;
- texts are joined from bytes here (`Tokenizer.decode_bytes`), not by sentencepiece.

The one exception: a lone surrogate, which a Python ``str`` may hold, has no UTF-8 form and is encoded as U+FFFD.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic

SPACE_MARK = "\u2581"
MIN_VOCAB = 272
"""Smallest vocabulary that can be trained: 4 special tokens, 256 bytes and a few characters."""

# Long texts are cut at a line end before encoding: one call's memory and time stay bounded and one document
# can use many threads. The cut depends on the text alone, so the tokens never depend on the number of threads.
_SEGMENT_CHARACTERS = 1 << 17

# ModelProto.normalizer_spec (field 3) = {precompiled_charsmap: "", add_dummy_prefix: false, remove_extra_whitespaces:
# false}. Protocol buffers merge a repeated message field, so these bytes after a model override its own choices.
_IDENTITY_NORMALIZER = b"\x1a\x06\x12\x00\x18\x00\x20\x00"

# How a wrapped Hugging Face tokenizer begins, and no sentencepiece model does; see `hf_tokenizer`.
_WRAPPED = b'{"format": "recurrent_db: '

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

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
"""Texts that a tokenizer has to give back unchanged; training refuses to write a model that does not."""


def replace_surrogates(text: str) -> str:
    """``text`` with each lone surrogate, which has no UTF-8 form, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _segments(text: str) -> Iterator[str | None]:
    """Cut ``text`` into pieces that are encoded by themselves; None stands for one literal U+2581."""
    for n, part in enumerate(text.split(SPACE_MARK)):
        if n:
            yield None
        start = 0
        while len(part) - start > _SEGMENT_CHARACTERS:
            end = part.rfind("\n", start, start + _SEGMENT_CHARACTERS) + 1 or start + _SEGMENT_CHARACTERS
            yield part[start:end]
            start = end
        if start < len(part):
            yield part[start:]


@dataclass(frozen=True)
class Pieces:
    """What a tokenizer consists of, whichever library encodes."""

    encode: Callable[[Sequence[str], int], list[list[int]]]
    """Ids of each of several texts without lone surrogates, on so many threads."""
    token_bytes: list[bytes]
    """What each token stands for; nothing for special tokens."""
    eos_id: int
    bos_id: int
    pad_id: int


def _sentencepiece(model_bytes: bytes, name: str) -> Pieces:
    """Build from a sentencepiece model file. Raises as `Tokenizer` does."""
    sentencepiece.set_min_log_level(3)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes + _IDENTITY_NORMALIZER)
        size = model.get_piece_size()
    except (RuntimeError, ValueError):
        size = 0
    if not size:
        raise UserError(f"{name}: not a sentencepiece model, or a damaged one")
    eos_id = model.eos_id()
    if eos_id < 0:
        raise UserError(f"{name}: it has no end-of-sequence token, which separates documents")

    token_bytes: list[bytes] = []
    byte_ids: dict[int, int] = {}
    try:
        spelled = [model.id_to_piece(i) for i in range(size)]
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a sentencepiece model, or a damaged one (a piece is not UTF-8)") from None
    for i in range(size):
        if model.is_byte(i):
            match = _BYTE_PIECE.fullmatch(spelled[i])
            if match is None:
                raise UserError(f"{name}: not a sentencepiece model, or a damaged one (byte piece {i})")
            byte_ids[int(match[1], 16)] = i
            token_bytes.append(bytes.fromhex(match[1]))
        elif model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            token_bytes.append(b"")
        else:
            token_bytes.append(spelled[i].replace(SPACE_MARK, " ").encode())
    if len(byte_ids) != 256:
        raise UserError(f"{name}: it was trained without byte fallback and cannot represent every text")
    if model.piece_to_id(SPACE_MARK) == model.unk_id():
        raise UserError(f"{name}: it has no piece for a space and cannot represent every text")
    mark_ids = [byte_ids[byte] for byte in SPACE_MARK.encode()]

    def encode(texts: Sequence[str], threads: int) -> list[list[int]]:
        cut = [list(_segments(text)) for text in texts]
        flat = [part for parts in cut for part in parts if part is not None]
        encoded: Iterator[list[int]] = iter(model.encode(flat, out_type=int, num_threads=threads))
        result: list[list[int]] = []
        for parts in cut:
            if len(parts) == 1 and parts[0] is not None:
                result.append(next(encoded))
                continue
            ids: list[int] = []
            for part in parts:
                ids.extend(mark_ids if part is None else next(encoded))
            result.append(ids)
        return result

    # A model without one of these uses its separator there: nothing in the project feeds or predicts them.
    bos_id, pad_id = (i if i >= 0 else eos_id for i in (model.bos_id(), model.pad_id()))
    return Pieces(encode, token_bytes, eos_id, bos_id, pad_id)


class Tokenizer:
    """A tokenizer whose tokens stand for bytes: text <-> token ids, without loss.

    Args:
        path: a sentencepiece ``.model`` file with byte fallback, or a Hugging Face tokenizer as an imported checkpoint
            keeps it (see `hf_tokenizer`), whose own normalisation, where it has one, may lose something.

    Raises:
        UserError: the file is missing or unreadable, is no sentencepiece model, has no byte fallback or no
            end-of-sequence token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer model {path}: {error.strerror or error}") from None
        self._load(model_bytes, f"tokenizer model {path}")

    @classmethod
    def from_bytes(cls, model_bytes: bytes, name: str = "tokenizer model") -> Tokenizer:
        """Build from the bytes of a model file; ``name`` is what error messages call it. Raises as the class does."""
        self = cls.__new__(cls)
        self._load(bytes(model_bytes), name)
        return self

    def _load(self, model_bytes: bytes, name: str) -> None:
        self.is_json = model_bytes.startswith(_WRAPPED)
        """Whether this is a Hugging Face tokenizer."""
        if self.is_json:
            from recurrent_db.data import byte_level_tokenizer as hf_tokenizer

            pieces = hf_tokenizer.load(model_bytes, name)
        else:
            pieces = _sentencepiece(model_bytes, name)
        self._encode, self._token_bytes = pieces.encode, pieces.token_bytes
        self.model_bytes = model_bytes
        """The model file, byte for byte as given."""
        self.hash = hashlib.sha256(model_bytes).hexdigest()[:16]
        """The first 16 hexadecimal digits of the SHA-256 of `model_bytes`."""
        self.vocab_size: int = len(pieces.token_bytes)
        self.eos_id: int = pieces.eos_id
        """The document separator."""
        self.bos_id: int = pieces.bos_id
        self.pad_id: int = pieces.pad_id
        self._byte_lengths = np.array([len(piece) for piece in self._token_bytes], dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added, and text that looks like one ("</s>") stays text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` for many texts on ``threads`` threads; the result does not depend on their number."""
        return self._encode([replace_surrogates(text) for text in texts], max(1, threads))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that ``ids`` stand for; special tokens stand for none.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        pieces = self._token_bytes
        chosen = [int(i) for i in ids]
        if chosen and not 0 <= min(chosen) <= max(chosen) < len(pieces):
            raise IndexError(f"token id outside the vocabulary of {len(pieces)}: {min(chosen)} to {max(chosen)}")
        return b"".join([pieces[i] for i in chosen])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``: special tokens dropped, bytes that are not UTF-8 shown as U+FFFD. Raises IndexError."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 of shape (vocab_size,); 0 for special tokens."""
        return self._byte_lengths.copy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file atomically, replacing an older one."""
        write_atomic(Path(path), self.model_bytes)


# ---------------------------------------------------------------------------------------------------------------
# Training


def _lines_to_chunks(text: str, size: int = 2048) -> Iterator[str]:
    """Cut ``text`` into runs of whole lines of about ``size`` characters.

    sentencepiece drops "sentences" that are too long. Several lines together let pieces with line breaks form;
    a line longer than 2 x ``size`` is cut.
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1
        if end <= 0 or end - start > 2 * size:
            end = min(len(text), start + 2 * size)
        yield text[start:end]
        start = end


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of at most ``max_bytes`` UTF-8 bytes of chunks in one pass, the same for the same texts."""
    heap: list[tuple[int, int, int, str]] = []  # (-hash, -order, bytes, chunk): the largest hash leaves first
    total = order = 0
    for text in texts:
        for chunk in _lines_to_chunks(replace_surrogates(text).replace(SPACE_MARK, " ").replace("\x00", " ")):
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


def _restrict_characters(chunks: list[str], vocab_size: int) -> list[str]:
    """Replace rare characters by a space: they stay byte pieces, and at least half of the other pieces are longer.

    sentencepiece's own coverage option does not go below 98 percent, which a small vocabulary needs.
    """
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk)
    kept: set[str] = set()
    covered, total = 0, counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: (vocab_size - 260) // 2]:
        kept.add(character)
        covered += count
        if covered >= 0.9995 * total:
            break
    table = {ord(character): " " for character in counts.keys() - kept}
    return [chunk if kept.issuperset(chunk) else chunk.translate(table) for chunk in chunks]


def train(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    max_bytes: int = 8 << 20,
    seed: int = 0,
) -> bytes:
    """Train a lossless sentencepiece model; the same texts and arguments give the same bytes.

    Args:
        texts: documents; read once, in order.
        vocab_size: tokens in the vocabulary, special tokens (4) and byte pieces (256) included.
        model_type: "bpe", "unigram" (slower to train, no better for source code) or "char" (a token for each character;
            the vocabulary is then as large as the text's characters need, at most ``vocab_size``).
        max_bytes: UTF-8 bytes of text to sample for training.
        seed: of the sample.

    Raises:
        UserError: no text, a vocabulary below `MIN_VOCAB`, or one that the text cannot fill (the message says how
            many pieces it could make).
    """
    if model_type not in ("bpe", "unigram", "char"):
        raise UserError(f"unknown tokenizer model type {model_type!r}: choose bpe, unigram or char")
    if vocab_size < MIN_VOCAB:
        raise UserError(f"vocabulary size {vocab_size} is too small: 256 bytes and 4 special tokens need {MIN_VOCAB}")
    if max_bytes < 1:
        raise UserError("the tokenizer needs more than 0 bytes of text to train on")
    chunks = _sample(texts, max_bytes, seed)
    if not any(chunk.strip() for chunk in chunks):
        raise UserError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_restrict_characters(chunks, vocab_size)),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=model_type != "char",
            model_type=model_type,
            character_coverage=1.0,
            required_chars=SPACE_MARK,
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
            num_threads=4,  # fixed: unigram's sums depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit:
            raise UserError(
                f"this text can fill a vocabulary of at most {limit[1]} tokens, not {vocab_size}: "
                f"give more text, or a smaller vocabulary"
            ) from None
        raise UserError(f"sentencepiece could not train: {str(error).rsplit(']', 1)[-1].strip() or error}") from None
    trained = model.getvalue()
    tokenizer = Tokenizer.from_bytes(trained, "the trained tokenizer")
    if tokenizer.vocab_size != vocab_size and not (model_type == "char" and tokenizer.vocab_size < vocab_size):
        raise UserError(f"sentencepiece made {tokenizer.vocab_size} tokens, not the {vocab_size} asked for")
    check_lossless(tokenizer, [*HOSTILE_TEXTS, *chunks[:100]])
    return trained


def check_lossless(tokenizer: Tokenizer, texts: Sequence[str] = HOSTILE_TEXTS) -> None:
    """Raise RuntimeError unless every text comes back exactly and its tokens' byte lengths add up to its own."""
    lengths = tokenizer.byte_lengths()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        size = int(lengths[np.array(ids, dtype=np.int64)].sum())
        if tokenizer.decode(ids) != text or size != len(text.encode()):
            raise RuntimeError(f"the tokenizer does not round-trip {text[:80]!r}")
