"""The tokenizer of a recurrent_db model for Hugging Face transformers: a lossless sentencepiece model with byte fallback.

Encoding and decoding restores any text byte for byte, and gives the same ids as in training. The model's own normalisation
is switched off, and a literal U+2581 (sentencepiece's mark for a space) is encoded as bytes.

As everywhere in transformers, the special tokens are found in a text: the end-of-text token, the padding token, and tokens
that were added later. ``tokenizer(text, split_special_tokens=True)`` encodes them as ordinary text, as in training. Other
text that looks like a special token, such as ``<unk>``, is always ordinary text. This file needs only sentencepiece and
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_MARK = "\u2581"
MARK_PIECES = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]

# Long texts are cut at a line break before encoding. The tokens depend on the place of the cut, so keep this constant.
SEGMENT_CHARACTERS = 1 << 17

# ModelProto.normalizer_spec (field 3) = {precompiled_charsmap: "", add_dummy_prefix: false, remove_extra_whitespaces:
# false}. Protocol buffers merge a repeated message field, so these bytes after a model override its own choices.
IDENTITY_NORMALIZER = b"\x1a\x06\x12\x00\x18\x00\x20\x00"


def segments(text: str) -> Iterator[str | None]:
    """Cut a text into parts that are encoded separately. None stands for a literal U+2581."""
    for n, part in enumerate(text.split(SPACE_MARK)):
        if n:
            yield None
        start = 0
        while len(part) - start > SEGMENT_CHARACTERS:
            end = part.rfind("\n", start, start + SEGMENT_CHARACTERS) + 1 or start + SEGMENT_CHARACTERS
            yield part[start:end]
            start = end
        if start < len(part):
            yield part[start:]


class RecurrentDBTokenizer(PreTrainedTokenizer):
    """A sentencepiece tokenizer. ``vocab_file`` is a sentencepiece model with byte fallback."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file, self.model_bytes = vocab_file, Path(vocab_file).read_bytes()
        sentencepiece.set_min_log_level(3)
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes + IDENTITY_NORMALIZER)
        eos, pad = self.sp.eos_id(), self.sp.pad_id()
        # In training every text begins after an end-of-text token.
        for name, index in (("bos", eos), ("eos", eos), ("pad", pad if pad >= 0 else eos)):
            kwargs.setdefault(f"{name}_token", self.sp.id_to_piece(index))
        for name, value in (("padding_side", "left"), ("clean_up_tokenization_spaces", False)):
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)
        # Special tokens that were added to the model itself. Those of every model stay ordinary text, except the above.
        known = (self.sp.bos_id(), eos, pad)
        own = [i for i in range(self.vocab_size) if self.sp.is_control(i) and i not in known]
        self.add_tokens([self.sp.id_to_piece(i) for i in own], special_tokens=True)

    @property
    def vocab_size(self) -> int:
        return int(self.sp.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)} | dict(self.get_added_vocab())

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces: list[str] = []
        for part in segments(re.sub("[\ud800-\udfff]", "\ufffd", text)):
            pieces += MARK_PIECES if part is None else self.sp.encode(part, out_type=str)
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.sp.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.sp.id_to_piece(index))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add no special tokens."""
        return token_ids_0 + (token_ids_1 or [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join the tokens' bytes. Special tokens appear as written; invalid UTF-8 becomes U+FFFD."""
        joined = b""
        for token in tokens:
            index = self.sp.piece_to_id(token)
            if self.sp.is_byte(index):
                joined += bytes([int(token[3:5], 16)])
            else:
                joined += token.replace(SPACE_MARK, " ").encode()
        return joined.decode("utf-8", errors="replace")

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:  # also those that the model has and this class does not name
            ids = [i for i in ids if i >= self.vocab_size or not (self.sp.is_control(i) or self.sp.is_unknown(i))]
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        path.write_bytes(self.model_bytes)
        return (str(path),)
