"""The judge: which documents it knows, what it refuses, and its readings against a naive implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from helpers import MICRO, ROOT

from recurrent_db import UserError
from recurrent_db.data import document, load_tokenizer, open_data, prepare
from recurrent_db.data.tokenizer import Tokenizer, train
from recurrent_db.evaluation.judge import MARKED_BYTES, RECORD, Judge, check_apart, mark, marks, record

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> Path:
    """Two parts of the corpus, other documents each: part1 for models, part2 for their judge; some are held out of both."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("text", "held"):
        (folder / name).mkdir()
    for number, text in enumerate(texts):
        (folder / ("text" if number % 4 else "held") / f"{number:03d}.py").write_bytes(text.encode())
    text, held = [str(folder / "text")], [str(folder / "held")]
    for part in (1, 2):
        prepare(text, tokenizer, folder / f"part{part}", val_sources=held, part=(part, 2), workers=1)
    prepare(text, tokenizer, folder / "whole", val_sources=held, workers=1)
    return folder


@pytest.fixture(scope="module")
def judge_run(parts: Path, script: Run) -> Path:
    """A judge after two steps, made by the command."""
    result = script(
        "eval/train_judge.py", ROOT / "train/configs/tiny.toml", *MICRO, "--data.path", parts / "part2", "--run.dir",
        parts / "judge", "--budget.steps", "2", "--eval.points", "0", "--apart-from", parts / "part1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return parts / "judge"


def test_parts_share_no_document_and_are_all(parts: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    found = [set(marks(open_data(parts / f"part{part}", "train"), tokenizer)) for part in (1, 2)]
    assert min(map(len, found)) > 3
    assert not found[0] & found[1]
    assert found[0] | found[1] == set(marks(open_data(parts / "whole", "train"), tokenizer))
    held = {mark(tokenizer.encode(text), tokenizer) for text in texts[::4]}
    assert set(marks(open_data(parts / "part1", "validation"), tokenizer)) == held
    with pytest.raises(UserError, match="parts are numbered"):
        prepare(["stdlib"], tokenizer, parts / "none", part=(3, 2))


def test_a_mark_is_the_texts_whatever_its_tokens(texts: list[str], tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_bytes(train(texts, 400))
    assert other.hash != tokenizer.hash
    text = max(texts, key=len)
    ids = tokenizer.encode(text)
    assert len(text.encode()) > 2 * MARKED_BYTES
    assert mark(ids, tokenizer) == mark([*other.encode(text), other.eos_id], other)
    assert mark(ids, tokenizer) == mark(tokenizer.encode(text[:-1]), tokenizer)  # of a long text, its beginning
    assert mark(tokenizer.encode("a" + text), tokenizer) != mark(ids, tokenizer)


def test_marks_of_some_documents(parts: Path, tokenizer: Tokenizer) -> None:
    data = open_data(parts / "part1", "train")
    every = marks(data, tokenizer)
    assert len(every) == data.documents
    assert every[2] == mark(document(data.sources["default"], 2), tokenizer)
    assert marks(data, tokenizer, 3) == [every[i * len(every) // 3] for i in range(3)]
    assert marks(data, tokenizer, 10**6) == every


def test_shared_documents_are_found(parts: Path) -> None:
    kept = record(parts / "part2")
    assert check_apart(kept, parts / "part1", "train") == 0
    assert check_apart(kept, parts / "part1", "validation") == 0
    with pytest.raises(UserError, match="trained on the same text as"):
        check_apart(kept, parts / "part2", "train")
    # The whole corpus holds part 2, so the text is another and its documents are there.
    documents = [open_data(parts / name, "train").documents for name in ("part1", "part2", "whole")]
    assert documents[0] + documents[1] == documents[2]
    assert check_apart(kept, parts / "whole", "train") == pytest.approx(documents[1] / documents[2])


# ---------------------------------------------------------------------------------------------------------------


def test_a_judge_is_a_run_that_knows_its_documents(judge_run: Path, parts: Path) -> None:
    kept = json.loads((judge_run / RECORD).read_text())
    assert kept == record(parts / "part2")
    judge = Judge.load(judge_run, "cpu")
    assert judge.kept == kept
    assert judge.config.objective.name == "next_token"
    assert judge.saw([kept["documents"][0], "none"]) == [kept["documents"][0]]


def test_train_judge_refuses(parts: Path, script_here: Run) -> None:
    base = ["eval/train_judge.py", *MICRO, "--run.dir", parts / "no", "--budget.steps", "1"]
    for words, message in (
        (["--data.path", parts / "part1", "--apart-from", parts / "part1"], "trained on the same text as"),
        (["--data.path", parts / "part2", "--objective.name", "unrolled"], "objective of a judge is always next_token"),
        (["--data.path", parts / "part2", "--apart-from"], "--apart-from needs"),
        (["--data.path", parts / "part2", "--apart-from=" + str(parts)], "manifest.json"),
        (["--data.path", parts / "nowhere"], "no such data directory"),
        ([], "data.path is not set"),
    ):
        told = script_here(*base, *words)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
        assert message in told.stderr
    assert not (parts / "no").exists()


def test_held_out_documents_are_kept_apart_too(
    parts: Path, tokenizer: Tokenizer, tmp_path: Path, script_here: Run
) -> None:
    """A judge trained on the documents that others hold out is refused."""
    held = open_data(parts / "part1", "validation")
    (tmp_path / "held.jsonl").write_text(
        "".join(
            json.dumps({"text": tokenizer.decode(document(held.sources["default"], number))}) + "\n"
            for number in range(held.documents)
        )
    )
    prepare([str(tmp_path / "held.jsonl")], tokenizer, tmp_path / "data", val_sources=[str(tmp_path / "held.jsonl")])
    told = script_here("eval/train_judge.py", *MICRO, "--run.dir", tmp_path / "no", "--budget.steps", "1", "--data.path",
                       tmp_path / "data", "--apart-from", parts / "part1")  # fmt: skip
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "100.0% of the validation documents" in told.stderr


def test_loading_refuses(judge_run: Path, parts: Path, script_here: Run) -> None:
    words = [*MICRO, "--data.path", parts / "part1", "--budget.steps", "1", "--eval.points", "0"]
    for name, objective in (("flat", "next_token"), ("looped", "unrolled")):
        done = script_here("train/pretrain.py", *words, "--objective.name", objective, "--run.dir", parts / name)
        assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="a judge is a flat model"):
        Judge.load(parts / "looped", "cpu")
    # A flat run without a record: what it was trained on is read from its data directory, while that is there.
    assert Judge.load(parts / "flat", "cpu").kept == record(parts / "part1")
    (parts / "part1").rename(parts / "moved")
    try:
        with pytest.raises(UserError, match="training documents are unknown"):
            Judge.load(parts / "flat", "cpu")
    finally:
        (parts / "moved").rename(parts / "part1")
    for broken in ("{", "[]", '{"documents": 3, "text_sha256": {}}'):
        (parts / "flat" / RECORD).write_text(broken)
        with pytest.raises(UserError, match="is damaged"):
            Judge.load(parts / "flat", "cpu")


# ---------------------------------------------------------------------------------------------------------------


def test_readings_against_one_text_at_a_time(judge_run: Path) -> None:
    """Scores, bytes and features against plain forward passes in float64; a long prompt is cut at its front."""
    judge = Judge.load(judge_run, "cpu")
    tokenizer, window = judge.tokenizer, judge.model.config.max_seq_len
    prompts = ["def f(x):\n", "", "x = 1\n" * 40, "é", "import os"]
    texts = ["    return x\n", "import sys\n", "y = 2\n", "", "\ufffd\n"]
    found = judge.read(prompts, texts, batch_size=3)
    alone = judge.read(prompts, texts, batch_size=1)
    model = judge.model.double()
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = tokenizer.encode(text)
        before = (tokenizer.encode(prompt) or [tokenizer.eos_id])[-(window - len(ids)) :]
        tokens = torch.tensor([before + ids])
        with torch.no_grad():
            e_BTD = model.encode(tokens)
            hidden = model.decode(model.iterate(torch.zeros_like(e_BTD), e_BTD))
            log_p = model.logits(hidden).log_softmax(-1)[0]
        nats = -sum(log_p[len(before) + j - 1, token].item() for j, token in enumerate(ids))
        assert found.nats[i] == pytest.approx(nats, abs=1e-4)
        np.testing.assert_allclose(found.features[i], hidden[0, -1].numpy(), rtol=1e-4, atol=1e-4)
        mean = hidden[0, len(before) :].mean(0) if ids else hidden[0, -1]
        np.testing.assert_allclose(found.mean_features[i], mean.numpy(), rtol=1e-4, atol=1e-4)
        assert (found.tokens[i], found.bytes[i], found.ids[i]) == (len(ids), len(text.encode()), ids)
    np.testing.assert_allclose(found.nats, alone.nats, atol=1e-4)
    assert found.nats[0] > 1
    long = judge.read(["a = 1"], ["x = 1\n" * 40])
    assert (long.tokens[0], long.bytes[0]) == (31, len(tokenizer.decode_bytes(tokenizer.encode("x = 1\n" * 40)[:31])))


def test_the_tokenizer_of_a_data_directory_marks_its_documents(parts: Path) -> None:
    assert len(record(parts / "part1")["documents"]) == open_data(parts / "part1", "train").documents
    assert load_tokenizer(parts / "part1").hash == load_tokenizer(parts / "part2").hash
