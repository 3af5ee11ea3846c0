"""Byte-level BPE tokenizers of the Hugging Face library ``tokenizers`` behind `tokenizer.Tokenizer`.

A ``tokenizer.json`` does not say which token separates documents. A checkpoint therefore keeps one JSON object that
holds the file and the ids of the special tokens (`wrap`). There is no post-processing: no special token is added, and
text that looks like one stays text. The file is data: nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from recurrent_db.data.tokenizer_backend import Backend
from recurrent_db.errors import UserError

FORMAT = "recurrent_db: tokenizer.json with special ids"
"""Value of the key ``format`` of what `wrap` makes."""

# How the bytes of `wrap` begin, and no sentencepiece model does.
_WRAPPED = b'{"format": "recurrent_db: '


def wrap(tokenizer_json: dict[str, Any], eos_id: int, bos_id: int | None, pad_id: int | None) -> bytes:
    """The bytes that stand for a tokenizer in checkpoints and data folders. Where there is no ``bos`` or ``pad``, ``eos``
    stands in: nothing in the project feeds or predicts them."""
    ids = {
        "eos_id": eos_id,
        "bos_id": eos_id if bos_id is None else bos_id,
        "pad_id": eos_id if pad_id is None else pad_id,
    }
    return json.dumps({"format": FORMAT, **ids, "tokenizer": tokenizer_json}).encode()


def is_wrapped(model_bytes: bytes) -> bool:
    """Whether these bytes look like those of `wrap`; any other model file is sentencepiece's."""
    return model_bytes.startswith(_WRAPPED)


def unwrap(model_bytes: bytes) -> dict[str, Any]:
    """The inverse of `wrap`: its keys. Raises ValueError for other bytes."""
    values = json.loads(model_bytes)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError("not a wrapped tokenizer")
    return values


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others, in order, for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _types(part: Any) -> set[str]:
    """Types of a pre-tokenizer or decoder and of what it is a sequence of."""
    if not isinstance(part, dict):
        return set()
    inner = [*part.get("pretokenizers", []), *part.get("decoders", [])]
    return {str(part.get("type"))}.union(*map(_types, inner))


def load(model_bytes: bytes, name: str) -> Backend:
    """Build from the bytes that `wrap` makes; ``name`` is what error messages call it.

    Raises:
        UserError: the library is missing, or this is no such tokenizer, or one that cannot represent every text.
    """
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise UserError(f"{name} is a Hugging Face tokenizer: pip install 'recurrent_db[hf]' reads it") from None
    damaged = UserError(f"{name}: not a tokenizer of this project, or a damaged one")
    try:
        values = unwrap(model_bytes)
        spec, ids = values["tokenizer"], [values["eos_id"], values["bos_id"], values["pad_id"]]
        byte_level = "ByteLevel" in _types(spec["decoder"]) & _types(spec["pre_tokenizer"])
        text = json.dumps(spec)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if not byte_level:
        raise UserError(f"{name}: only byte-level Hugging Face tokenizers can be used, whose tokens stand for bytes")
    try:
        library = HFTokenizer.from_str(text)
    except Exception:  # the library raises nothing more precise
        raise damaged from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    vocabulary, added = library.get_vocab(with_added_tokens=True), library.get_added_tokens_decoder()
    size = max(vocabulary.values(), default=-1) + 1
    if not all(isinstance(i, int) and 0 <= i < size for i in ids):
        raise UserError(f"{name}: its special tokens {ids} are not among its {size} tokens")
    alphabet = _byte_of_character()
    if not all(character in vocabulary for character in alphabet):
        raise UserError(f"{name}: it lacks tokens of single bytes and cannot represent every text")
    token_bytes = [b""] * size
    for token, index in vocabulary.items():
        if index in added:
            token_bytes[index] = b"" if added[index].special else token.encode()
        elif all(character in alphabet for character in token):
            token_bytes[index] = bytes(alphabet[character] for character in token)

    def encode(texts: Sequence[str], threads: int) -> list[list[int]]:
        # `threads` is for the other library; this one takes its own number.
        return [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    return Backend(encode, token_bytes, *ids)
