"""Byte-level BPE tokenizers of the Hugging Face library ``tokenizers``, as a back end of `tokenizer.Tokenizer`.

A ``tokenizer.json`` does not say which token separates documents. A checkpoint therefore stores one JSON object with the
file and the ids of the special tokens (`wrap`). Encoding adds no special tokens, and text that looks like a special token
is encoded as ordinary text. The file is data: nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from recurrent_db.data.tokenizer_backend import Backend
from recurrent_db.errors import UserError

FORMAT = "recurrent_db: tokenizer.json with special ids"
"""Value of the key ``format`` in the JSON object of `wrap`."""

# First bytes of a wrapped tokenizer. No sentencepiece model begins with them.
_WRAPPED = b'{"format": "recurrent_db: '


def wrap(tokenizer_json: dict[str, Any], eos_id: int, bos_id: int | None, pad_id: int | None) -> bytes:
    """The bytes of a tokenizer as checkpoints and data directories store it.

    A missing ``bos_id`` or ``pad_id`` is set to ``eos_id``: the project never uses these two tokens. The post-processor is
    left out, because it adds special tokens to a text.
    """
    ids = {
        "eos_id": eos_id,
        "bos_id": eos_id if bos_id is None else bos_id,
        "pad_id": eos_id if pad_id is None else pad_id,
    }
    return json.dumps({"format": FORMAT, **ids, "tokenizer": {**tokenizer_json, "post_processor": None}}).encode()


def is_wrapped(model_bytes: bytes) -> bool:
    """Whether ``model_bytes`` was made by `wrap`. Any other model file is taken for a sentencepiece model."""
    return model_bytes.startswith(_WRAPPED)


def unwrap(model_bytes: bytes) -> dict[str, Any]:
    """The JSON object of `wrap`. Raises ValueError for other bytes."""
    values = json.loads(model_bytes)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError("not a wrapped tokenizer")
    return values


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet, character to byte: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _types(part: Any) -> set[str]:
    """Types of a pre-tokenizer or decoder and of everything nested in it."""
    if not isinstance(part, dict):
        return set()
    inner = [*part.get("pretokenizers", []), *part.get("decoders", [])]
    return {str(part.get("type"))}.union(*map(_types, inner))


def load(model_bytes: bytes, name: str) -> Backend:
    """Build a back end from the bytes of `wrap`. ``name`` is the tokenizer's name in error messages.

    Raises:
        UserError: the library is missing, or the tokenizer is damaged, not byte-level, or cannot represent every text.
    """
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise UserError(f"{name} is a Hugging Face tokenizer, which needs pip install 'recurrent-db[hf]'") from None
    damaged = UserError(f"{name}: not a tokenizer of this project, or damaged")
    try:
        values = unwrap(model_bytes)
        spec, ids = values["tokenizer"], [values["eos_id"], values["bos_id"], values["pad_id"]]
        byte_level = "ByteLevel" in _types(spec["decoder"]) & _types(spec["pre_tokenizer"])
        text = json.dumps(spec)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if not byte_level:
        raise UserError(f"{name}: not byte-level; only byte-level Hugging Face tokenizers can be used")
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
        raise UserError(f"{name}: special token ids {ids} are outside its vocabulary of {size}")
    alphabet = _byte_of_character()
    if not all(character in vocabulary for character in alphabet):
        raise UserError(f"{name}: some bytes have no token, so it cannot represent every text")
    token_bytes = [b""] * size
    for token, index in vocabulary.items():
        if index in added:
            token_bytes[index] = b"" if added[index].special else token.encode()
        elif all(character in alphabet for character in token):
            token_bytes[index] = bytes(alphabet[character] for character in token)

    def encode(texts: Sequence[str], threads: int) -> list[list[int]]:
        # The library chooses its own number of threads.
        return [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    return Backend(encode, token_bytes, *ids)
