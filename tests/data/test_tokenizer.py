"""The tokenizer loses nothing, and says how many bytes each token stands for."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data.tokenizer import HOSTILE_TEXTS, MIN_VOCAB, Tokenizer, check_lossless, train
from recurrent_db.errors import UserError

Script = Callable[..., "CompletedProcess[str]"]


def size_of(tokenizer: Tokenizer, ids: list[int]) -> int:
    return int(tokenizer.byte_lengths()[np.array(ids, dtype=np.int64)].sum())


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text)[:30])
def test_hostile_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert size_of(tokenizer, ids) == len(text.encode())


TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\u2581\x00<>s/_aeiou0123456789")),
    max_size=300,
)


@given(TEXT)
@settings(deadline=None, max_examples=300)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert size_of(tokenizer, ids) == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.lists(TEXT, max_size=8), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_batches_and_threads_change_nothing(tokenizer: Tokenizer, texts: list[str], threads: int) -> None:
    assert tokenizer.encode_batch(texts, threads) == [tokenizer.encode(text) for text in texts]


def test_long_texts_are_cut_without_loss(tokenizer: Tokenizer) -> None:
    for text in ("x \u2581y" * 100_000, "line of text\n" * 30_000, "\U0001f600" * 140_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert size_of(tokenizer, ids) == len(text.encode())


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_special_tokens_stand_for_no_text(tokenizer: Tokenizer) -> None:
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(specials)) == 3
    assert not tokenizer.byte_lengths()[specials].any()
    ids = tokenizer.encode("</s>")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == "</s>"


def test_broken_bytes_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    euro = tokenizer.encode("\u2581")  # three byte pieces, whatever the vocabulary
    assert len(euro) == 3
    assert tokenizer.decode(euro[:2]) == "\ufffd"
    assert tokenizer.decode_bytes(euro[:2]) == b"\xe2\x96"


@pytest.mark.parametrize("ids", [[-1], [512], [3, 10_000]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(IndexError, match="vocabulary of 512"):
        tokenizer.decode(ids)


def test_indentation_is_cheap(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" " * 8)) <= 2


def test_saved_and_loaded_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy.model")
    again = Tokenizer(tmp_path / "copy.model")
    assert (again.model_bytes, again.hash, again.vocab_size) == (tokenizer.model_bytes, tokenizer.hash, 512)
    assert len(again.hash) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["copy.model"]


def test_bad_model_files_are_user_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(UserError, match="directory"):
        Tokenizer(tmp_path)
    whole = tokenizer.model_bytes
    for content in (b"", b"not a model", b"\x00" * 100, whole[: len(whole) // 2], whole[: len(whole) // 3], whole[7:]):
        with pytest.raises(UserError):
            Tokenizer.from_bytes(content)


def foreign_model(**options: Any) -> bytes:
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog " * 5] * 20
    options = {"vocab_size": 300, "minloglevel": 3, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **options)
    return model.getvalue()


def test_a_model_with_its_own_normalisation_loses_nothing_either() -> None:
    """sentencepiece's defaults: NFKC, a dummy prefix, white space collapsed."""
    check_lossless(Tokenizer.from_bytes(foreign_model(model_type="bpe", byte_fallback=True)))


def test_a_model_without_byte_fallback_is_refused() -> None:
    with pytest.raises(UserError, match="byte fallback"):
        Tokenizer.from_bytes(foreign_model(model_type="bpe", vocab_size=60))


# ---------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("size", [MIN_VOCAB, 300, 1000])
def test_training_gives_the_size_asked_for_and_repeats_exactly(texts: list[str], size: int) -> None:
    model = train(texts, size, max_bytes=100_000)
    assert Tokenizer.from_bytes(model).vocab_size == size
    assert train(texts, size, max_bytes=100_000) == model
    assert train(texts, size, max_bytes=100_000, seed=1) != model


def test_unigram(texts: list[str]) -> None:
    check_lossless(Tokenizer.from_bytes(train(texts, 400, model_type="unigram", max_bytes=30_000)))


def test_unusual_training_text() -> None:
    many = "".join(map(chr, range(0x4E00, 0x5E00))) * 3
    for text in (many, "nospacesatall" * 500, "\u2581\x00 a b\tc\r\n" * 200, "one endless line " * 20_000):
        check_lossless(Tokenizer.from_bytes(train([text], MIN_VOCAB)), [*HOSTILE_TEXTS, text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ["short"], "vocab_size": 5000}, r"at most \d+ tokens, not 5000"),
        ({"texts": ["some text"], "vocab_size": 100}, "too small"),
        ({"texts": ["some text"], "vocab_size": 1 << 31}, "too large"),
        ({"texts": ["some text"], "vocab_size": 1 << 62, "model_type": "char"}, "too large"),
        ({"texts": [], "vocab_size": 300}, "no text"),
        ({"texts": ["", " \n"], "vocab_size": 300}, "no text"),
        ({"texts": ["a b"], "vocab_size": 300, "model_type": "word"}, "bpe, unigram or char"),
    ],
)
def test_training_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(**options)  # type: ignore[arg-type]


def test_command_line(script: Script, script_here: Script, tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts[:8]), encoding="utf-8")
    out = tmp_path / "new" / "t.model"
    arguments = ("tokenizers/train_tokenizer.py", "--input", tmp_path / "a.txt", "--vocab-size", 320, "--out", out)
    done = script(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert Tokenizer(out).vocab_size == 320
    first = out.read_bytes()

    again = script_here(*arguments)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "--overwrite" in again.stderr

    missing = script_here(*arguments[:2], tmp_path / "none.txt", *arguments[3:], "--overwrite", "True")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "none.txt" in missing.stderr
    assert out.read_bytes() == first

    elsewhere = script_here(*arguments[:-1], tmp_path / "a.txt" / "t.model")
    assert elsewhere.returncode == 2
    assert elsewhere.stderr.count("\n") == 1
    assert "not a folder" in elsewhere.stderr


def test_char_covers_every_character_with_room() -> None:
    """Rare characters too, those outside the sample, and U+2585, at which sentencepiece drops a text."""
    odd = "\t\r\n\x01\x7f\x85\u00a0\u0301\u2028\u2047\u2585\ufeff\ufffd\uffff\ue000\U0001f600\U0010ffff"
    rare = "".join(map(chr, range(0x4E00, 0x5200)))
    text = "plain text\n" * 3000 + rare + odd
    characters = set(text)
    for size, most in ((3000, 1 << 20), (260 + len(characters), 1 << 20), (3000, 2000)):
        tokenizer = Tokenizer.from_bytes(train([text], size, "char", max_bytes=most))
        assert tokenizer.vocab_size == 260 + len(characters)
        assert all(len(ids) == 1 for ids in tokenizer.encode_batch(sorted(characters)))
    small = Tokenizer.from_bytes(train([text], 300, "char"))
    assert small.vocab_size == 300
    assert all(len(small.encode(character)) == 1 for character in "plain text\n")


def test_a_reserved_character_drops_no_text() -> None:
    assert train(["\u2585 some words of a text " * 200], 300) == train(["  some words of a text " * 200], 300)
