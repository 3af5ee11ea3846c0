"""Files of every format: damaged, empty, compressed, and with names that look like patterns."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from recurrent_db.data import ReadOptions, ReadReport, read_documents
from recurrent_db.errors import UserError

TEXT = "".join(f"line {n * n} of the text\n" for n in range(300))


def read(path: Path, **options: Any) -> list[str]:
    return [one.text for one in read_documents(str(path), ReadOptions(**options), ReadReport())]


def packed(suffix: str, raw: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(raw)
    zstandard = pytest.importorskip("zstandard", reason="the extra [data] is not installed")
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


def parquet_bytes(columns: dict[str, Any]) -> bytes:
    pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    from pyarrow import parquet, table

    sink = io.BytesIO()
    parquet.write_table(table(columns), sink, write_page_checksum=True)
    return sink.getvalue()


def arrow_bytes(columns: dict[str, Any], kind: str = "stream", rows: int = 2) -> bytes:
    pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    from pyarrow import ipc, table

    data, sink = table(columns), io.BytesIO()
    with (ipc.new_stream if kind == "stream" else ipc.new_file)(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=rows)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix.upper()}"
    whole = packed(suffix, TEXT.encode())
    for raw in (whole, whole * 2, whole + bytes(512), whole + packed(suffix, b"") + whole):
        path.write_bytes(raw)
        assert "".join(read(path)) in (TEXT, TEXT * 2)
    rng = random.Random(0)
    broken = [whole[:end] for end in range(0, len(whole), 7)]
    broken += [whole + whole[:-1], whole + b"garbage", b"plain text", whole + whole[1:]]
    for _ in range(40):
        at = rng.randrange(len(whole))
        broken.append(whole[:at] + bytes([whole[at] ^ (1 + rng.randrange(255))]) + whole[at + 1 :])
    for raw in broken:
        path.write_bytes(raw)
        try:
            assert "".join(read(path)) == TEXT  # gzip ignores some bits of its header
        except UserError as error:
            assert f"a.txt{suffix.upper()}: damaged or incomplete" in str(error)
        else:
            assert len(raw) == len(whole)


@pytest.mark.parametrize("make", [parquet_bytes, arrow_bytes, lambda columns: arrow_bytes(columns, "file")])
def test_damaged_tables(tmp_path: Path, make: Any) -> None:
    path = tmp_path / ("a.parquet" if make is parquet_bytes else "a.arrow")
    texts = [f"text {n}" for n in range(9)]
    whole = make({"text": texts, "n": list(range(9))})
    path.write_bytes(whole)
    assert read(path) == texts
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=path.name):
            read(path)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="compress themselves"):
        read(path.with_name(path.name + ".gz"))


def test_columns_of_tables(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    words = arrow.array(["a", None, "a"]).dictionary_encode()
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"n": [1, 2, 3], "text.x": words}))
    report = ReadReport()
    found = list(read_documents(str(tmp_path / "a.parquet"), ReadOptions("text.x"), report))
    assert [(one.id, one.text) for one in found] == [("a.parquet#0", "a"), ("a.parquet#2", "a")]
    assert (report.null_texts, report.empty_documents) == (1, 0)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(it has: n, text\.x\).*--text-key"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int"):
        read(tmp_path / "a.parquet", text_key="n")


def test_empty_shards(tmp_path: Path) -> None:
    """A shard without rows is read as nothing, whatever its columns."""
    empty = {
        "a.parquet": parquet_bytes({"text": []}), "b.parquet": parquet_bytes({"other": []}),
        "c.arrow": arrow_bytes({"text": []}), "d.arrow": arrow_bytes({"other": []}, "file"),
        "e.jsonl": b"", "f.jsonl": b"\n \n", "g.json": b"", "h.json": b"[]", "i.json": b" \n[\n]\n", "j.txt": b"",
        "k.jsonl.gz": gzip.compress(b""), "l.txt.gz": gzip.compress(b""), "m.json": b"\xef\xbb\xbf",
    }  # fmt: skip
    for name, raw in empty.items():
        (tmp_path / name).write_bytes(raw)
        assert read(tmp_path / name) == []
    assert read(tmp_path) == []
    (tmp_path / "z.parquet").write_bytes(parquet_bytes({"text": ["one"]}))
    assert read(tmp_path) == ["one"]


@pytest.mark.parametrize("folder", ["plain", "a*", "b[1]", "c?", "x::y", "file:", "{a,b}", "%20 #", "~"])
def test_names_that_look_like_patterns(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    names = ["a*.parquet", "ab.parquet", "a[b].arrow", "x::y.json", "q?.jsonl", "[z].txt", "gzip::n.parquet"]
    for name in names:
        raw = {".parquet": parquet_bytes, ".arrow": arrow_bytes}.get(Path(name).suffix, lambda row: b"")(
            {"text": [name]}
        )
        (tmp_path / folder / name).write_bytes(raw or json.dumps({"text": name}).encode())
    expected = [json.dumps({"text": name}) if name.endswith("txt") else name for name in sorted(names)]
    assert read(tmp_path / folder) == expected
    assert [read(tmp_path / folder / name) for name in sorted(names)] == [[one] for one in expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n  "text": "one",\n  "n": 1\n}\n', ["one"]),
        ('{\n "text": "one"\n}\n{\n "text": "two"\n}', ["one", "two"]),
        ('\ufeff[\n {"text": "one"},\n {"text": null},\n {"text": "two"}\n]', ["one", "two"]),
        ('{"text": "one"}{"text": "two"}', ["one", "two"]),
        ('[{"text": "one"}]\n[{"text": "two"}]\n', ["one", "two"]),
        ('\n\n{"text": "one"}\r\n{"text": "two"}\r\n', ["one", "two"]),
    ],
)
def test_shapes_of_json(tmp_path: Path, content: str, expected: list[str]) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8", newline="")
    assert read(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "x", "version": "1"}\n',
        '{\n "name": "x",\n "keywords": ["text"]\n}\n',
        '{\n // a comment\n "strict": true\n}\n',
        '["one", "two"]',
        "3",
        "nonsense",
    ],
)
def test_other_json_in_a_folder(tmp_path: Path, content: str) -> None:
    """A .json file that is no table of texts ends nothing in a folder, and is refused by name."""
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    (tmp_path / "package.json").write_text(content, encoding="utf-8")
    report = ReadReport()
    assert [one.text for one in read_documents(str(tmp_path), report=report)] == ["a text"]
    assert report.skipped_files == 1
    assert report.first_skipped.popitem()[1].endswith("package.json")
    with pytest.raises(UserError, match=r"package\.json.*(--text-key|expected an object|not JSON)"):
        read(tmp_path / "package.json")


@pytest.mark.parametrize(
    "content", ['[{"text": "one"}, {"te', '{"text": "one"}\n{"te', '{\n "text": "one"\n', '{"text": 3}']
)
def test_broken_tables_in_a_folder_are_errors(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json"):
        read(tmp_path)


def test_a_saved_data_set(tmp_path: Path) -> None:
    """`datasets.save_to_disk` leaves shards of an earlier data set beside its own. state.json names those that count."""
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}', encoding="utf-8")
    state = {"_data_files": [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)], "_split": "train"}
    (tmp_path / "train" / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (tmp_path / "train" / "dataset_info.json").write_text('{\n "features": {"text": {}}\n}', encoding="utf-8")
    for name in ("data-00000-of-00002", "data-00001-of-00002", "data-00000-of-00001", "cache-12"):
        (tmp_path / "train" / f"{name}.arrow").write_bytes(arrow_bytes({"text": [name]}))
    assert read(tmp_path / "train") == read(tmp_path) == ["data-00000-of-00002", "data-00001-of-00002"]
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: missing"):
        read(tmp_path)


def test_a_saved_data_set_without_rows(tmp_path: Path) -> None:
    """`datasets.save_to_disk` writes no shard for an empty split."""
    (tmp_path / "state.json").write_text('{"_data_files": []}', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    assert read(tmp_path) == []
    (tmp_path / "state.json").unlink()
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="no file of a known kind"):
        read(tmp_path)


def test_a_data_set_that_the_library_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [data] is not installed")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    rows = datasets.Dataset.from_dict({"text": ["one", None, "two"]})
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert read(tmp_path / "saved") == ["one", "two"]


def test_an_empty_shard_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra [data] is not installed")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    Path("someone").mkdir()
    rows = arrow.array(["one", None, "two"])
    Path("someone/a.parquet").write_bytes(parquet_bytes({"text": rows[:0]}))
    Path("someone/b.parquet").write_bytes(parquet_bytes({"text": rows}))
    assert [one.text for one in read_documents("hf:someone")] == ["one", "two"]
    Path("some[1]").mkdir()
    with pytest.raises(UserError, match="without hf:"):
        read(Path("hf:some[1]"))
