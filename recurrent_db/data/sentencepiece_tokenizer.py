"""sentencepiece models, made lossless, as a back end of `tokenizer.Tokenizer`.

- The model's own normalisation (Unicode folding, dummy prefix, whitespace collapse) is switched off.
- sentencepiece writes a space as U+2581, so a literal U+2581 would be decoded as a space. Texts are therefore cut at each
  U+2581, and the ids of its three byte pieces are inserted there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import sentencepiece

from recurrent_db.data.tokenizer_backend import Backend
from recurrent_db.errors import UserError

SPACE_MARK = "\u2581"
"""The character that sentencepiece writes for a space."""

# Long texts are cut at a line end before encoding. This bounds the memory and time of a call, and lets one document use
# several threads. The cut depends only on the text, so the tokens do not depend on the number of threads.
_SEGMENT_CHARACTERS = 1 << 17

# ModelProto.normalizer_spec (field 3) = {precompiled_charsmap: "", add_dummy_prefix: false, remove_extra_whitespaces:
# false}. Protocol buffers merge a repeated message field, so these bytes after a model override its own choices.
_IDENTITY_NORMALIZER = b"\x1a\x06\x12\x00\x18\x00\x20\x00"

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _segments(text: str) -> Iterator[str | None]:
    """Cut ``text`` into segments that are encoded separately. None stands for one literal U+2581."""
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


def with_tokens(model_bytes: bytes, tokens: Sequence[tuple[str, bool]]) -> bytes:
    """A model with more tokens after its own: name, and whether the token is special. No text is encoded to a special token,
    and it stands for no bytes. Any other token is found wherever its name is in a text."""

    def field(number: int, content: bytes) -> bytes:
        size, head = len(content), bytearray([number << 3 | 2])
        while size > 127:
            head.append(size & 127 | 128)
            size >>= 7
        return bytes([*head, size]) + content

    # ModelProto.pieces (field 1) = {piece (field 1), type (field 3): CONTROL = 3 or USER_DEFINED = 4}. Protocol buffers join
    # the parts of a repeated field.
    control, user_defined = b"\x18\x03", b"\x18\x04"
    return model_bytes + b"".join(
        field(1, field(1, name.encode()) + (control if special else user_defined)) for name, special in tokens
    )


def load(model_bytes: bytes, name: str) -> Backend:
    """Build a back end from the bytes of a sentencepiece model file. ``name`` is its name in error messages.

    Raises:
        UserError: this is not a sentencepiece model, it is damaged, has no end-of-sequence token, or cannot represent
            every text.
    """
    sentencepiece.set_min_log_level(3)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes + _IDENTITY_NORMALIZER)
        size = model.get_piece_size()
    except (RuntimeError, ValueError):
        size = 0
    if not size:
        raise UserError(f"{name}: not a sentencepiece model, or damaged")
    eos_id = model.eos_id()
    if eos_id < 0:
        raise UserError(f"{name}: no end-of-sequence token, which must separate documents")

    token_bytes: list[bytes] = []
    byte_ids: dict[int, int] = {}
    try:
        spelled = [model.id_to_piece(i) for i in range(size)]
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a sentencepiece model, or damaged (a piece is not UTF-8)") from None
    for i in range(size):
        if model.is_byte(i):
            match = _BYTE_PIECE.fullmatch(spelled[i])
            if match is None:
                raise UserError(f"{name}: not a sentencepiece model, or damaged (byte piece {i})")
            byte_ids[int(match[1], 16)] = i
            token_bytes.append(bytes.fromhex(match[1]))
        elif model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            token_bytes.append(b"")
        else:
            token_bytes.append(spelled[i].replace(SPACE_MARK, " ").encode())
    if len(byte_ids) != 256:
        raise UserError(f"{name}: trained without byte fallback, so it cannot represent every text")
    if model.piece_to_id(SPACE_MARK) == model.unk_id():
        raise UserError(f"{name}: no piece for a space, so it cannot represent every text")
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

    # A missing bos or pad id is set to eos_id: the project never uses these two tokens.
    bos_id, pad_id = (i if i >= 0 else eos_id for i in (model.bos_id(), model.pad_id()))
    return Backend(encode, token_bytes, eos_id, bos_id, pad_id)
