"""Sources, shards and the loader."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data import (
    Loader,
    ReadOptions,
    ReadReport,
    TokenData,
    corpus,
    document,
    load_tokenizer,
    open_data,
    permute,
    prepare,
    read_documents,
    shards,
    sources,
    validation_batches,
)
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def read(path: Path, **options: Any) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return [one.text for one in read_documents(str(path), ReadOptions(**options), report)], report


# ---------------------------------------------------------------------------------------------------------------
# The repository's layout and the embedded corpus


@pytest.mark.parametrize("folder", ["train", "eval", "tokenizers"])
def test_script_folders_are_no_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_embedded_corpus() -> None:
    files = corpus.stdlib_files()
    assert files == sorted(files)
    assert "argparse.py" in files
    assert "json/decoder.py" in files
    left_out = ("test/", "encodings/", "site-packages/", "pydoc_data/", "unittest/test/", "_sysconfigdata")
    assert not [name for name in files if any(f"/{part}" in f"/{name}" for part in left_out)]
    size = sum((corpus.stdlib_root() / name).stat().st_size for name in files)
    assert 5e6 < size < 16e6
    held_out = {name for name in files if corpus.split(name) == "validation"}
    assert 0.02 < len(held_out) / len(files) < 0.09
    assert {one.id for one in corpus.stdlib_documents("validation")} == held_out


# ---------------------------------------------------------------------------------------------------------------
# Sources


def test_text_files_are_read_exactly(tmp_path: Path) -> None:
    text = "\ttabs\r\nline\x0b\u2028\u0085 \u2581 end  "
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"packed\n"))
    (tmp_path / "c.bin").write_bytes(b"not read")
    (tmp_path / ".hidden.txt").write_bytes(b"not read")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert read(tmp_path)[0] == [text, "packed\n", "marked"]
    assert [one.id for one in read_documents(str(tmp_path))] == ["a.txt", "b.md.gz", "sub/bom.txt"]


@given(st.lists(st.text("ab|\n\u00e9", max_size=20), max_size=6), st.integers(1, 7))
@settings(deadline=None, max_examples=100)
def test_separator_does_not_depend_on_blocks(parts: list[str], block: int) -> None:
    text = "<|>".join(parts)
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    assert [one for one in sources._pieces(blocks, "<|>") if one] == [one for one in text.split("<|>") if one]


def test_separator_and_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two\n<|endoftext|> \n<|endoftext|>", encoding="utf-8")
    assert read(path, document_separator="<|endoftext|>")[0] == ["one", "two\n"]
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 64)
    text = "a line of text\n" * 50 + "x" * 250
    path.write_text(text, encoding="utf-8")
    texts, report = read(path)
    assert "".join(texts) == text
    assert max(map(len, texts)) <= 100
    assert report.cut_documents == 1


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n"}\n\n{"text": null, "id": 3}\n{"text": "caf\\u00e9"}', encoding="utf-8")
    texts, report = read(path)
    assert texts == ["one\n", "caf\u00e9"]
    assert report.empty_documents == 1
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column 'body' \(it has: text\)"):
        read(path, text_key="body")
    path.write_text('{"text": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match="holds int"):
        read(path)
    path.write_text('{"text": "one"}\n{"text": "tw', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a line of JSON"):
        read(path)
    path.write_text("[1, 2]\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected an object"):
        read(path)


def test_tables_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra [data] is not installed")
    from pyarrow import parquet, table

    parquet.write_table(table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "zero"}]), encoding="utf-8")
    assert read(tmp_path)[0] == ["zero", "one", "two"]
    with pytest.raises(UserError, match=r"b\.parquet: no column 'body' \(it has: text, n\)"):
        read(tmp_path / "b.parquet", text_key="body")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"c\.parquet"):
        read(tmp_path / "c.parquet")


def test_input_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 3 + b"plain text " * 10)
    (tmp_path / "nul.txt").write_bytes(b"text with a \x00 in it, but mostly text")
    (tmp_path / "utf16.txt").write_bytes("wide text".encode("utf-16"))
    texts, report = read(tmp_path)
    assert texts == ["caf\ufffd " * 3 + "plain text " * 10, "text with a \ufffd in it, but mostly text"]
    assert (report.replaced_bytes, report.replaced_files, report.binary_files, report.skipped_files) == (4, 2, 1, 1)
    note = report.note()
    assert note is not None
    assert "\n" not in note
    assert "utf16.txt" in note


def test_multibyte_characters_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 7)
    text = "\u65e5\u672c\u8a9e\U0001f600 e\u0301" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    texts, report = read(tmp_path / "a.txt")
    assert "".join(texts) == text
    assert report.replaced_bytes == 0


def test_damaged_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:30])
    (tmp_path / "b.txt.gz").write_bytes(b"plain")
    for name in ("a.txt.gz", "b.txt.gz"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_source_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.parse_source("code=stdlib") == ("code", "stdlib")
    assert sources.parse_source("hf:a/b:c") == ("default", "hf:a/b:c")
    assert sources.parse_source("dir/with=sign") == ("default", "dir/with=sign")
    monkeypatch.chdir(tmp_path)
    Path("x=y.txt").write_text("text", encoding="utf-8")
    assert sources.parse_source("x=y.txt") == ("default", "x=y.txt")


def test_hub_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra [data] is not installed")

    def unreachable(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(sources.socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(sources.urllib.request, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="hf:someone/something: cannot reach"):
        list(read_documents("hf:someone/something"))


def test_hub_needs_the_data_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install recurrent-db\[data\]"):
        list(read_documents("hf:someone/something"))


def test_holdout_by_hash_keeps_copies_together() -> None:
    many = [corpus.Document(str(i), f"text {i % 150}") for i in range(300)]
    halves = list(sources.split_documents("x", many, 0.2))
    assert [one for _, one in halves] == many
    sides: dict[str, set[str]] = {}
    for side, one in halves:
        sides.setdefault(one.text, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())
    assert 0.1 < sum(side == "validation" for side, _ in halves) / 300 < 0.3


def test_holdout_of_few_documents_is_the_end_of_each() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    halves = list(sources.split_documents("x", [corpus.Document("book", text)], 0.1))
    assert [side for side, _ in halves] == ["train", "validation"]
    assert "".join(one.text for _, one in halves) == text
    assert 0.09 < len(halves[1][1].text) / len(text) < 0.11
    assert halves[0][1].text.endswith("\n")


# ---------------------------------------------------------------------------------------------------------------
# Shards


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
    with pytest.raises(ValueError, match="step 2"):
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


# ---------------------------------------------------------------------------------------------------------------
# The permutation


@given(st.integers(1, 3000), st.integers(-(2**63), 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), np.arange(n))
    assert permute(n // 2, n, key) == image[n // 2]


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
@settings(deadline=None, max_examples=50)
def test_permute_stays_in_range_and_is_injective(n: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    image = permute(index, n, key)
    assert 0 <= image.min() <= image.max() < n
    assert len(np.unique(image)) == len(index)


def test_permute_mixes() -> None:
    """Each index goes to each place about equally often over keys, and neighbours do not stay neighbours."""
    n, keys = 10, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 81 + 6 * (
        2 * 81
    ) ** 0.5  # chi squared, 81 degrees of freedom
    image = permute(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(image)) == 1) < 0.01
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match="range"):
            permute(wrong, 10, 0)


# ---------------------------------------------------------------------------------------------------------------
# The loader

EOS = 2


def numbered(*sequences: int, T: int = 8) -> TokenData:
    """Sources of so many sequences; every token names its source and place, so that a sample can be recognised."""
    arrays = {}
    for number, count in enumerate(sequences):
        arrays[f"s{number}"] = (np.arange(count * T + 1) + 10 + 10_000 * number).astype("<u4")
    return TokenData.from_arrays(arrays, vocab_size=100_000, eos_id=EOS)


def test_targets_are_the_next_tokens(data_dir: Path) -> None:
    data = open_data(data_dir, "train")
    batch = Loader(data, 32, 16, seed=3).batch(2)
    assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.doc_ids_BT.shape == (16, 32)
    assert (batch.tokens_BT.dtype, batch.targets_BT.dtype) == (torch.int64, torch.int64)
    assert (batch.doc_ids_BT.dtype, batch.sample_index_B.dtype) == (torch.int32, torch.int64)
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert batch.sample_index_B.tolist() == list(range(32, 48))
    part = batch.slice(3, 5)
    assert len(part) == 2
    assert torch.equal(part.to("cpu").tokens_BT, batch.tokens_BT[3:5])


def test_document_numbers() -> None:
    ids = np.array([7, 7, EOS, 8, EOS, EOS, 9, 9, 9], dtype=np.uint16)
    batch = Loader(TokenData.from_arrays({"a": ids}, 10, EOS), 8, 1).batch(0)
    assert batch.tokens_BT.tolist() == [[7, 7, 2, 8, 2, 2, 9, 9]]
    assert batch.targets_BT.tolist() == [[7, 2, 8, 2, 2, 9, 9, 9]]
    assert batch.doc_ids_BT.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**32), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_every_sequence_once_per_epoch(sizes: list[int], seed: int, batch_size: int) -> None:
    T = 8
    loader, total = Loader(numbered(*sizes), T, batch_size, seed), sum(sizes)
    steps = -(-3 * total // batch_size)
    firsts = [int(one) for step in range(steps) for one in loader.batch(step).tokens_BT[:, 0]]
    expected = {10 + 10_000 * number + j * T for number, size in enumerate(sizes) for j in range(size)}
    for epoch in range(3):
        seen = firsts[epoch * total : (epoch + 1) * total]
        assert len(seen) == total
        assert set(seen) == expected
    assert loader.epochs(steps) == pytest.approx(steps * batch_size / total)


def test_epochs_differ_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Loader(numbered(50), 8, 50, seed).batch(epoch).tokens_BT[:, 0].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in itertools.product((0, 1), (0, 1, 2))}) == 6


@given(st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_samples_do_not_depend_on_processes_or_micro_batches(world: int, micro: int, step: int) -> None:
    loader = Loader(numbered(30, 11), 8, 8, seed=5, mixture={"s0": 1, "s1": 2})
    whole = loader.batch(step)
    parts = [part for rank in range(world) for part in loader.micro_batches(step, micro, rank, world)]
    assert max(len(part) for part in parts) <= micro
    for name in ("tokens_BT", "targets_BT", "doc_ids_BT", "sample_index_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(1, 2000))
@settings(deadline=None, max_examples=60)
def test_mixture_shares_hold_from_the_start(weights: list[float], drawn: int) -> None:
    names = [f"s{number}" for number in range(len(weights))]
    loader = Loader(numbered(*[20] * len(weights)), 8, drawn, mixture=dict(zip(names, weights, strict=True)))
    found = Counter((loader.batch(0).tokens_BT[:, 0] // 10_000).tolist())
    by_source = loader.epochs_by_source(1)
    for number, weight in enumerate(weights):
        assert abs(found[number] - drawn * weight / sum(weights)) < len(weights) + 1e-3
        assert by_source[names[number]] == found[number] / 20


def test_positions_far_into_a_run_do_not_overflow() -> None:
    loader = Loader(numbered(1000, 7), 8, 4, mixture={"s0": 0.7, "s1": 0.3})
    positions = np.arange(2**45, 2**45 + 1000)
    source, epoch, sequence = loader.locate(positions)
    assert 690 < (source == 0).sum() < 710
    assert epoch.min() > 0
    assert (sequence[source == 1] < 7).all()


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"other": 1.0}, "no source 'other'"),
        ({"s0": -1.0}, "weight must be"),
        ({"s0": float("nan")}, "weight must be"),
        ({"s0": 0.0}, "above 0"),
    ],
)
def test_bad_mixtures(mixture: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loader(numbered(4, 4), 8, 2, mixture=mixture)


def test_too_little_text_is_a_user_error() -> None:
    data = numbered(3, T=8)
    with pytest.raises(UserError, match="too few for one sequence"):
        Loader(data, 25, 2)
    with pytest.raises(UserError, match="too few for one sequence"):
        next(validation_batches(data, 25, 2))
    with pytest.raises(UserError, match="does not divide"):
        Loader(data, 8, 3).batch(0, rank=0, world=2)
    assert Loader(data, 24, 2).batch(0).tokens_BT[:, 0].tolist() == [10, 10]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 500), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=60)
def test_validation_covers_the_split_evenly(sequences: int, batch_size: int, max_tokens: int, world: int) -> None:
    data = numbered(sequences, 5)
    total = sequences + 5

    def indices(limit: int | None, rank: int = 0, world: int = 1) -> list[int]:
        batches = validation_batches(data, 8, batch_size, limit, rank, world)
        return [index for batch in batches for index in batch.sample_index_B.tolist()]

    assert indices(None) == list(range(total))
    some = indices(max_tokens)
    assert len(some) == min(total, max(1, max_tokens // 8))
    gaps = np.diff([*some, total])
    assert some[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert sorted(itertools.chain(*(indices(max_tokens, rank, world) for rank in range(world)))) == some
