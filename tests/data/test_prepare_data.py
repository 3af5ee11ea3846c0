"""``train/prepare_data.py`` and `prepare`: text in, a data directory out, or one line that says why not."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from recurrent_db.data import ReadOptions, document, open_data, prepare, read_manifest
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError

Script = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def text(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number, one in enumerate(texts[:10]):
        (folder / f"{number}.txt").write_bytes(one.encode())
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents(folder: Path, split: str, tokenizer: Tokenizer, source: str = "default") -> list[str]:
    found = open_data(folder, split, verify=True).sources[source]
    return [tokenizer.decode(document(found, number).tolist()) for number in range(found.documents)]


def test_the_number_of_workers_changes_nothing(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare([str(text)], tokenizer, tmp_path / f"d{workers}", workers=workers)
    assert files_of(tmp_path / "d1") == files_of(tmp_path / "d3")


def test_named_sources_and_validation_source(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"body": "held out"}\n', encoding="utf-8")
    (tmp_path / "more.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n', encoding="utf-8")
    out = tmp_path / "data"
    held = [f"code={tmp_path / 'held.jsonl'}"]
    inputs = [f"code={text}", str(tmp_path / "more.jsonl")]
    done = prepare(inputs, tokenizer, out, val_sources=held, options=ReadOptions("body"))
    manifest = read_manifest(out)
    assert list(manifest["splits"]["train"]) == ["code", "default"]
    assert list(manifest["splits"]["validation"]) == ["code"]
    assert contents(out, "train", tokenizer) == ["one", "two"]
    assert contents(out, "validation", tokenizer, "code") == ["held out"]
    totals = [entry for split in manifest["splits"].values() for entry in split.values()]
    assert done.tokens == sum(entry["tokens"] for entry in totals)
    assert done.documents == sum(entry["documents"] for entry in totals) == 13
    assert done.text_bytes == sum(entry["bytes"] for entry in totals)
    assert (out / "tokenizer.model").read_bytes() == tokenizer.model_bytes


def test_limits_and_no_holdout(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    few = prepare([str(text)], tokenizer, tmp_path / "a", max_documents=3, holdout=0)
    assert few.documents == 3
    assert few.validation_tokens == 0
    with pytest.raises(UserError, match="no 'validation' split"):
        open_data(tmp_path / "a", "validation")
    small = prepare([str(text)], tokenizer, tmp_path / "b", max_bytes=2000)
    assert 1000 < small.text_bytes <= 2000
    assert small.validation_tokens > 0


def test_the_text_hash_sees_every_change(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def text_hash(name: str) -> Any:
        return prepare([str(text)], tokenizer, tmp_path / name).manifest["splits"]["train"]["default"]["text_sha256"]

    first = text_hash("a")
    assert text_hash("b") == first
    path = text / "0.txt"
    path.write_bytes(b"#" + path.read_bytes()[1:])
    assert text_hash("c") != first


def test_an_old_directory_is_replaced_only_by_a_complete_one(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare([str(text)], tokenizer, out)
    before = files_of(out)
    with pytest.raises(UserError, match="overwrite"):
        prepare([str(text)], tokenizer, out)
    (text / "9z.jsonl").write_text('{"broken', encoding="utf-8")
    with pytest.raises(UserError, match="not a line of JSON"):
        prepare([str(text)], tokenizer, out, overwrite=True)
    assert files_of(out) == before
    (text / "9z.jsonl").unlink()
    (text / "0.txt").write_text("shorter now", encoding="utf-8")
    prepare([str(text)], tokenizer, out, overwrite=True)
    assert files_of(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text"]  # nothing half-made is left


def test_only_data_directories_are_replaced(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a data directory"):
        prepare([str(text)], tokenizer, text, overwrite=True)
    assert (text / "0.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "no source"),
        ({"holdout": 1.0}, "holdout"),
        ({"workers": 0}, "workers"),
        ({"max_documents": 0}, "max_documents"),
        ({"shard_tokens": 0}, "shard"),
        ({"sources": ["../x=stdlib"]}, "no such file"),
        ({"val_sources": ["missing.txt"]}, r"missing\.txt"),
    ],
)
def test_python_callers_mistakes(text: Path, tokenizer: Tokenizer, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(**{"sources": [str(text)], "tokenizer": tokenizer, "out": tmp_path / "data", **options})
    assert not (tmp_path / "data").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


# ---------------------------------------------------------------------------------------------------------------
# The command


def test_command_line(script: Script, text: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (text / "latin.txt").write_bytes(b"caf\xe9 and more plain text\n" * 20)
    (text / "picture.txt").write_bytes(bytes(range(256)) * 20)
    out = tmp_path / "new" / "data"
    done = script("train/prepare_data.py", "--source", text, "--tokenizer", tokenizer_path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    for word in ("documents", "tokens", "bytes per token", "MB/s"):
        assert word in done.stdout
    assert done.stderr.count("\n") == 1  # no progress bar, one note
    assert done.stderr.startswith("note: replaced 20 undecodable bytes")
    assert "skipped 1 file(s)" in done.stderr
    assert json.loads((out / "manifest.json").read_text())["reading"]["replaced_bytes"] == 20
    assert open_data(out, "train", verify=True).tokens > 1000


def test_a_mistake_in_a_process_of_its_own(script: Script, tokenizer_path: Path, tmp_path: Path) -> None:
    arguments = ("--source", tmp_path / "none.txt", "--tokenizer", tokenizer_path, "--out", tmp_path / "data")
    done = script("train/prepare_data.py", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: {tmp_path / 'none.txt'}: no such file or folder; other sources are stdlib and hf:NAME\n"
    )


def test_a_source_option_given_twice_is_not_lost(script_here: Script, text: Path, tmp_path: Path) -> None:
    arguments = ("--source", "stdlib", "--source", text, "--tokenizer", "t.model", "--out", tmp_path / "data")
    done = script_here("train/prepare_data.py", *arguments)
    assert done.returncode == 2
    assert "twice" in done.stderr


def test_help_names_units_and_defaults(script_here: Script) -> None:
    done = script_here("train/prepare_data.py", "--help")
    assert done.returncode == 0
    for word in ("--source", "--max-mib", "MiB", "64000000", "--holdout", "0.05"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--source": "no/such/file.txt"}, ["no/such/file.txt", "no such file"]),
        ({"--source": ""}, ["source", "empty"]),
        ({"--source": "{tmp}/empty.txt"}, ["empty.txt", "no text"]),
        ({"--source": "{tmp}/noise.txt"}, ["noise.txt", "no text", "skipped 1 file"]),
        ({"--source": "{tmp}/bare"}, ["bare", "no file of a known kind"]),
        ({"--source": "{tmp}/a.jsonl"}, ["a.jsonl:1", "--text-key"]),
        ({"--out": "{tmp}/empty.txt/data"}, ["empty.txt/data", "cannot create"]),
        ({"--out": "{tmp}/bare"}, ["bare", "--overwrite"]),
        ({"--tokenizer": "{tmp}/none.model"}, ["none.model", "No such file"]),
        ({"--tokenizer": "{tmp}/a.jsonl"}, ["a.jsonl", "not a sentencepiece model"]),
        ({"--max-mib": "0"}, ["--max-mib"]),
        ({"--holdout": "1"}, ["--holdout"]),
        ({"--part": "1/" + "9" * 5000}, ["--part"]),
        ({"--workers": "1e18"}, ["--workers"]),
        ({"--shard-tokens": "0"}, ["--shard-tokens"]),
        ({"--sauce": "x"}, ["--sauce"]),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, dict) else value[0],
)
def test_mistakes_end_in_one_line(
    script_here: Script, text: Path, tokenizer_path: Path, tmp_path: Path, change: dict[str, str], words: list[str]
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "noise.txt").write_bytes(bytes(range(128, 256)) * 50)
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    (tmp_path / "bare").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = {"--source": str(text), "--tokenizer": str(tokenizer_path), "--out": str(tmp_path / "data")}
    arguments.update({key: value.replace("{tmp}", str(tmp_path)) for key, value in change.items()})
    done = script_here("train/prepare_data.py", *[word for pair in arguments.items() for word in pair])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_part_from_the_command_line(text: Path, tokenizer_path: Path, tmp_path: Path, script_here: Script) -> None:
    base = ["train/prepare_data.py", "--source", text, "--tokenizer", tokenizer_path, "--workers", 1]
    documents = []
    for part in ("1/2", "2/2", "1/1"):
        out = tmp_path / part[0] / part[2]
        assert script_here(*base, "--out", out, "--part", part).returncode == 0
        manifest = read_manifest(out)
        assert manifest["reading"].get("part") == (None if part == "1/1" else [int(part[0]), 2])
        documents.append(manifest["splits"]["train"]["default"]["documents"])
    assert documents[0] + documents[1] == documents[2] and min(documents) > 0
    for part, message in (
        ("3/2", "parts are numbered from 1"),
        ("0/2", "parts are numbered"),
        ("half", "must be written I/N"),
    ):
        told = script_here(*base, "--out", tmp_path / "no", "--part", part)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
        assert message in told.stderr


def test_what_is_left_out_is_said(script_here: Script, tokenizer_path: Path, tmp_path: Path) -> None:
    """Both scripts count null texts, and prepare_data prints the share that it held out."""
    rows = [{"text": None}, {"text": "line of text\n" * 500}, {"text": " "}, {"text": None}]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "text" / "page.html").write_text("markup", encoding="utf-8")
    (tmp_path / "text" / "package.json").write_text('{"name": "a",\n "version": 1}\n', encoding="utf-8")
    (tmp_path / "text" / "old.txt").write_text("an excluded text", encoding="utf-8")
    common = ("--exclude", "old.*", "archive")
    base = ["--source", tmp_path / "text", "--tokenizer", tokenizer_path, "--workers", 1, "--holdout", 0.1]
    done = script_here("train/prepare_data.py", *base, "--out", tmp_path / "data", *common)
    assert done.returncode == 0, done.stderr
    assert re.search(r"held out, (9\.|10\b|10\.)\S* percent", done.stdout)
    trained = script_here(
        "tokenizers/train_tokenizer.py", "--input", tmp_path / "text", "--vocab-size", 300, "--model-type", "char",
        "--out", tmp_path / "t.model", *common,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    for told in (done.stderr, trained.stderr):
        assert told.count("\n") == 1
        for words in ("skipped 3 file(s)", "1 .html", "1 .json without the key 'text'", "1 excluded"):
            assert words in told
        assert "left out 2 null text(s); left out 1 empty document(s)" in told


def test_marks_of_patterns_in_every_path(script_here: Script, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "a*[b]?::c"
    (folder / "text[1]").mkdir(parents=True)
    (folder / "text[1]" / "x*.txt").write_text("line of text\n" * 50, encoding="utf-8")
    (folder / "text1").mkdir()  # what the name would match as a pattern
    (folder / "text1" / "x1.txt").write_text("another", encoding="utf-8")
    tokenizer.save(folder / "t?.model")
    done = script_here(
        "train/prepare_data.py", "--source", folder / "text[1]", "--tokenizer", folder / "t?.model",
        "--out", folder / "data[*]", "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = [contents(folder / "data[*]", split, tokenizer) for split in ("train", "validation")]
    assert "".join(itertools.chain(*parts)) == "line of text\n" * 50
