"""What is read from and written to a console: lines, characters, colours, the history's file."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from recurrent_db import UserError, cli
from recurrent_db.repl import console
from recurrent_db.repl.console import (
    PlainLines,
    Utf8Writer,
    decode_line,
    side_by_side,
    state_file,
)


def test_lines_that_are_not_utf8() -> None:
    assert decode_line("añ😀") == "añ😀"
    for raw, place in ((b"ab\xff", "byte 3 is 0xff"), (b"\xe2\x82", "byte 1 is 0xe2")):
        with pytest.raises(UserError, match=place):
            decode_line(raw.decode("utf-8", errors="surrogateescape"))
    with pytest.raises(UserError, match="half of a character"):
        decode_line("\ud83d")


def test_writer_of_every_cut(capsys: pytest.CaptureFixture[str]) -> None:
    raw = "é€😀".encode()
    for cut in range(len(raw) + 1):
        writer = Utf8Writer()
        writer.add(raw[:cut])
        assert "\ufffd" not in capsys.readouterr().out
        writer.add(raw[cut:])
        writer.end()
        assert capsys.readouterr().out.endswith("\n")


def test_columns_hold_wide_and_narrow_characters() -> None:
    made = side_by_side(["left", "right"], ["日本語日本語", "e\u0301\tx\nlast"], 13).splitlines()
    assert [line.rstrip() for line in made] == [
        "left  | right", "----- | -----", "日本  | e\u0301   x", "語日  | last", "本語  |",
    ]  # fmt: skip
    assert console.visible_controls("\x1b[2J\x07\x7f\x9b\n\t") == "␛[2J␇␡\ufffd\n\t"


def test_state_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = state_file("history")
    assert path == tmp_path / "state/recurrent_db/history"
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_file("history") == tmp_path / ".local/state/recurrent_db/history"


def test_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        console.open_lines([])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--k", "-1"], "k must be 1 or more"),
        (["--sampler", "fast"], "the sampler must be sequential"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1 or more"),
        (["--top-q", "1"], "--top-p"),
        ([], "nowhere"),
    ],
)
def test_mistakes_of_the_command(options: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        cli.run(["repl", "nowhere", *options])


def test_a_piped_file_may_begin_with_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffone\n\ufefftwo\n".encode())))
    reader = PlainLines()
    assert [reader.read(), reader.read()] == ["one", "\ufefftwo"]


def test_plain_lines_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", '"""', "two", '  """', '"""', "three"])

    def told(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        monkeypatch.setattr("builtins.input", told)
        reader = PlainLines()
        assert [reader.read(), reader.read(), reader.read()] == ["one", "two", "three"]
        with pytest.raises(EOFError):
            reader.read()
