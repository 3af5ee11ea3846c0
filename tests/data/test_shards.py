"""Token shards: what is written is read, and damage is found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recurrent_db.data import ReadOptions, document, load_tokenizer, open_data, prepare, shards
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture
def copy(data_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_dir, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def first_shard(manifest: dict[str, Any]) -> Any:
    return manifest["splits"]["train"]["default"]["shards"][0]


def test_shards_hold_the_documents(data_dir: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    data = {split: open_data(data_dir, split, tokenizer.hash, verify=True) for split in ("train", "validation")}
    found = {"train": "", "validation": ""}
    for split, one in data.items():
        source = one.sources["default"]
        for number in range(source.documents):
            ids = document(source, number)
            assert ids[-1] == tokenizer.eos_id
            assert tokenizer.eos_id not in ids[:-1]
            found[split] += tokenizer.decode(ids.tolist())
        assert len(found[split].encode()) == one.bytes
        assert int(tokenizer.byte_lengths()[source.read(0, source.tokens)].sum()) == one.bytes
        with pytest.raises(IndexError):
            document(source, source.documents)
    # Fewer than 64 documents: the end of each is held out.
    assert sum(one.bytes for one in data.values()) == sum(len(text.encode()) for text in texts)
    assert 0.03 < data["validation"].bytes / data["train"].bytes < 0.08
    assert load_tokenizer(data_dir).hash == tokenizer.hash


def test_many_shards_read_as_one(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    for size in (10**9, 1000):
        (tmp_path / f"{size}").mkdir()
        (tmp_path / f"{size}.txt").write_text("\x01".join(texts[:20]), encoding="utf-8")
        options = ReadOptions(document_separator="\x01")
        prepare([f"{tmp_path / str(size)}.txt"], tokenizer, tmp_path / f"d{size}", shard_tokens=size, options=options)
    one, many = (open_data(tmp_path / f"d{size}", "train").sources["default"] for size in (10**9, 1000))
    assert len(one.arrays) == 1
    assert len(many.arrays) > 5
    assert one.tokens == many.tokens
    for start, count in [(0, one.tokens), (990, 2000), (one.tokens - 5, 5), (17, 0)]:
        np.testing.assert_array_equal(one.read(start, count), many.read(start, count))
    with pytest.raises(IndexError):
        many.read(one.tokens - 5, 6)
    for number in range(one.documents):
        np.testing.assert_array_equal(document(one, number), document(many, number))


def test_an_array_in_a_file_slices_as_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, values = tmp_path / "ids", np.arange(1000, dtype=np.dtype("<u4")) ** 2
    path.write_bytes(b"head" + values.tobytes())
    array = shards.FileArray(path, values.dtype, len(values), 4)
    pieces = [slice(None), slice(3, 9), slice(-7, None), slice(990, 2000), slice(5, 5), slice(9, 3)]
    pread = os.pread
    for at_once in (1 << 30, 7):  # a read may give less than it was asked for
        monkeypatch.setattr(os, "pread", lambda file, size, at, most=at_once: pread(file, min(size, most), at))
        for piece in pieces:
            got = array[piece]
            np.testing.assert_array_equal(got, values[piece])
            assert got.dtype == values.dtype
            got[:] = 0  # a copy: the next round reads the file's
        monkeypatch.undo()
    with pytest.raises(ValueError, match="step 1, not 2"):
        array[::2]
    os.truncate(path, 4 + 4 * 500)
    np.testing.assert_array_equal(array[:500], values[:500])
    with pytest.raises(UserError, match="ids: truncated while in use: 2004 bytes of 4004 are left"):
        array[499:501]


def test_a_window_reads_nothing_else(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, pread, sizes = open_data(data_dir, "train").sources["default"], os.pread, []
    monkeypatch.setattr(os, "pread", lambda file, size, at: sizes.append(size) or pread(file, size, at))
    assert len(source.read(100, 10)) == 10
    assert sum(sizes) == 20
    assert len(document(source, 1)) == (sum(sizes) - 20 - 16) // 2  # its two offsets, and its tokens


def test_an_array_in_a_file_closes_it(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(bytes(8))
    arrays = [shards.FileArray(tmp_path / "ids", np.dtype("<u2"), 4) for _ in range(5)]
    descriptor = arrays[0]._descriptor
    os.fstat(descriptor)
    arrays.clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_dtype_follows_the_vocabulary() -> None:
    assert shards.token_dtype(65_536) == np.dtype("<u2")
    assert shards.token_dtype(65_537) == np.dtype("<u4")


def test_damaged_shards(copy: Path) -> None:
    shard = copy / "train-default-00000.bin"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:-2])
    with pytest.raises(UserError, match="truncated"):
        open_data(copy, "train")
    content[10] ^= 1
    shard.write_bytes(content)
    open_data(copy, "train")
    with pytest.raises(UserError, match="SHA-256"):
        open_data(copy, "train", verify=True)
    shard.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train-default-00000\.bin"):
        open_data(copy, "train")


def test_damaged_offsets(copy: Path) -> None:
    path = copy / "train-default-00000.offsets.npy"
    content = path.read_bytes()
    for damaged in (content[:20], b"", content[:-8], content[:-1] + b"\x01"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            open_data(copy, "train")


def test_pickled_offsets_are_never_loaded(copy: Path) -> None:
    np.save(copy / "train-default-00000.offsets.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        open_data(copy, "train")


def test_wrong_tokenizer(copy: Path) -> None:
    with pytest.raises(UserError, match="made with tokenizer"):
        open_data(copy, "train", expect_tokenizer_hash="0" * 16)
    edit(copy, lambda manifest: manifest["tokenizer"].update(hash="0" * 16))
    with pytest.raises(UserError, match="not the tokenizer that made"):
        load_tokenizer(copy)


def test_token_ids_outside_the_vocabulary(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(vocab_size=300))
    with pytest.raises(UserError, match="outside the vocabulary of 300"):
        open_data(copy, "train", verify=True)


def test_file_names_cannot_leave_the_directory(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    shutil.copy(copy / "train-default-00000.bin", outside)
    (copy / "link.bin").symlink_to(outside)
    for name in ("../outside.bin", str(outside), "link.bin", "sub/../../outside.bin", "a\x00b"):
        edit(copy, lambda manifest, name=name: first_shard(manifest).update(file=name))  # type: ignore[misc]
        with pytest.raises((UserError, ValueError), match=r"outside the data directory|null"):
            open_data(copy, "train")
    edit(copy, lambda manifest: manifest["tokenizer"].update(file="../t.model"))
    with pytest.raises(UserError, match="outside the data directory"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format="other"),
        lambda manifest: manifest.update(version=99),
        lambda manifest: manifest.update(dtype="float32"),
        lambda manifest: manifest.update(vocab_size="many"),
        lambda manifest: manifest.update(splits=[]),
        lambda manifest: manifest.pop("tokenizer"),
        lambda manifest: manifest["splits"].update(train=[]),
        lambda manifest: manifest["splits"]["train"].update(default=None),
        lambda manifest: first_shard(manifest).update(tokens=-1),
        lambda manifest: first_shard(manifest).pop("sha256"),
    ],
)
def test_invalid_manifests(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(copy, change)
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_data(copy, "train")


def test_missing_manifests_and_splits(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data directory"):
        open_data(tmp_path / "none", "train")
    with pytest.raises(UserError, match="prepare_data"):
        open_data(tmp_path, "train")
    with pytest.raises(UserError, match=r"no 'test' split \(it has: train, validation\)"):
        open_data(copy, "test")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        open_data(copy, "train")
