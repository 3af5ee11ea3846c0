"""The file of answers: what was kept is found again, however the file ends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from recurrent_db.errors import UserError
from recurrent_db.evaluation.answer_cache import HEADER, AnswerCache


def test_a_file_of_answers_cut_anywhere_is_read(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    answers = AnswerCache(whole, {"k": 1})
    answers.add({"a": [-1.5, True], "b": "naïve \n"})
    answers.add({"c": [-math.inf, False]})
    assert AnswerCache(whole, {"k": 1}).answers == {"a": [-1.5, True], "b": "naïve \n", "c": [-math.inf, False]}
    assert AnswerCache(whole, {"k": 2}).answers == {}
    content, seen = whole.read_bytes(), set()
    for length in range(len(json.dumps(HEADER)) + 1, len(content)):
        cut.write_bytes(content[:length])
        part = AnswerCache(cut, {"k": 1})
        seen.add(len(part.answers))
        part.add({"d": 0})
        assert AnswerCache(cut, {"k": 1}).answers == {**part.answers, "d": 0}
    assert seen == {0, 1, 2, 3}  # a line that lacks its end alone is whole
    cut.write_bytes(b"")
    assert AnswerCache(cut, {"k": 1}).answers == {}
    for other in (
        b"important\n",
        b'{"format": "recurrent_db.evaluation.answer_cache", "version": 99}\n',
        b"\xff\xfe\n",
    ):
        cut.write_bytes(other)
        with pytest.raises(UserError, match="is not an answer cache"):
            AnswerCache(cut, {"k": 1})
        assert cut.read_bytes() == other
    with pytest.raises(UserError, match="cannot store answers"):
        AnswerCache(tmp_path, {"k": 1})
    with pytest.raises(UserError, match="cannot store answers"):
        AnswerCache(whole / "below", {"k": 1})
