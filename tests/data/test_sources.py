"""Reading documents, and the embedded corpus."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data import ReadOptions, ReadReport, corpus, read_documents, readers, sources, tables, unpacking
from recurrent_db.errors import UserError


def read(path: Path, **options: Any) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return [one.text for one in read_documents(str(path), ReadOptions(**options), report)], report


def test_embedded_corpus() -> None:
    files = corpus.stdlib_files()
    assert files == sorted(files)
    assert "argparse.py" in files
    assert "json/decoder.py" in files
    left_out = ("test/", "encodings/", "site-packages/", "pydoc_data/", "unittest/test/", "_sysconfigdata")
    assert not [name for name in files if any(f"/{part}" in f"/{name}" for part in left_out)]
    size = sum((corpus.stdlib_root() / name).stat().st_size for name in files)
    assert 5e6 < size < 16e6
    held_out = {name for name in files if corpus.stdlib_split(name) == "validation"}
    assert 0.02 < len(held_out) / len(files) < 0.09
    assert {one.id for one in corpus.stdlib_documents("validation")} == held_out


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
    assert [one for one in readers.pieces(blocks, "<|>") if one] == [one for one in text.split("<|>") if one]


def test_separator_and_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two\n<|endoftext|> \n<|endoftext|>", encoding="utf-8")
    assert read(path, document_separator="<|endoftext|>")[0] == ["one", "two\n"]
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(unpacking, "BLOCK_BYTES", 64)
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
    assert (report.null_texts, report.empty_documents) == (1, 0)
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
    monkeypatch.setattr(unpacking, "BLOCK_BYTES", 7)
    text = "\u65e5\u672c\u8a9e\U0001f600 e\u0301" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    texts, report = read(tmp_path / "a.txt")
    assert "".join(texts) == text
    assert report.replaced_bytes == 0


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

    monkeypatch.setattr(tables.socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(tables.urllib.request, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="hf:someone/something: cannot reach"):
        list(read_documents("hf:someone/something"))


def test_hub_needs_the_data_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'recurrent-db\[data\]'"):
        list(read_documents("hf:someone/something"))


def test_what_a_folder_leaves_out_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub" / "deep").mkdir(parents=True)
    kept = ("a.TXT", "b.text", "c.Markdown", "BOOK.TXT.GZ", "sub/e.tex", "sub/deep/f.rst")
    for name in (*kept, "README", "page.html", "rows.CSV", "x.tar.gz", ".hidden.txt", "sub/draft.txt"):
        raw = name.encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("hidden", encoding="utf-8")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "lines.jsonlines").write_text("plain text", encoding="utf-8")
    texts, report = read(folder, exclude=("draft.*", "nothing"))
    assert texts == ["BOOK.TXT.GZ", "a.TXT", "b.text", "c.Markdown", "sub/deep/f.rst", "sub/e.tex"]
    assert report.skipped == {
        "without a suffix": 1, ".html": 1, ".csv": 1, ".tar.gz": 1, "hidden": 2, "excluded": 1,
        "broken link(s) or special file(s)": 2, ".jsonlines not JSON": 1,
    }  # fmt: skip
    note = report.note()
    assert note is not None and note.startswith("skipped 10 file(s): 2 ")
    assert f"1 without a suffix (first: {folder / 'README'})" in note


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "z" / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "z" / "deep" / "one.txt").write_text("one", encoding="utf-8")
    (elsewhere / "two.txt").write_text("two", encoding="utf-8")
    (elsewhere / "back").symlink_to(folder)
    (folder / "z" / "deep" / "up").symlink_to(folder)
    (folder / "a").symlink_to(folder / "z")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    found = [one.id for one in read_documents(str(folder))]
    assert found == ["again/two.txt", "z/deep/one.txt"]
    assert read(folder)[1].skipped == {"link(s) to folders that are read already": 4}
    (tmp_path / "link").symlink_to(folder)
    assert [one.id for one in read_documents(str(tmp_path / "link"))] == found


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*.json", ["a.txt", "sub/b.txt"]),
        ("sub", ["a.txt", "c.json"]),
        ("./sub/", ["a.txt", "c.json"]),
        ("sub/*", ["a.txt", "c.json"]),
        ("**/a.txt", ["c.json", "sub/b.txt"]),
        ("[ab].txt", ["c.json"]),
        ("b", ["a.txt", "c.json", "sub/b.txt"]),
    ],
)
def test_patterns_of_excluded_files(tmp_path: Path, pattern: str, left: list[str]) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt", "c.json"):
        (tmp_path / name).write_text('{"text": "x"}', encoding="utf-8")
    found = read_documents(str(tmp_path), ReadOptions(exclude=(pattern,)))
    assert [one.id.partition("#")[0] for one in found] == left


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(sources.os, "scandir", refuse)  # os.walk would leave the folder out
    with pytest.raises(UserError, match="closed: Permission denied"):
        read(tmp_path)
