"""Prompts, continuations and eval/generation.py, end to end on runs of a few steps."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from helpers import MICRO, OBJECTIVES, micro_config, micro_model

from recurrent_db import UserError
from recurrent_db.commands.train import arguments
from recurrent_db.data import TokenData, open_data, prepare
from recurrent_db.data.tokenizer import Tokenizer, train
from recurrent_db.evaluation.continuations import (
    choose_prompts,
    continue_prompts,
    frequencies,
    independent_texts,
    parse_decoding,
    with_walk,
)
from recurrent_db.evaluation.judge import RECORD, marks, record
from recurrent_db.evaluation.text_metrics import DISTINCT_MARGIN, has_mauve
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.training import trainer

Run = Callable[..., "CompletedProcess[str]"]
EOS = 2


def counted(lengths: list[int], name: int = 0) -> np.ndarray:
    """Documents of so many tokens and a separator; token values say where they stand."""
    parts = [[*range(1000 * (name * 10 + d) + 10, 1000 * (name * 10 + d) + 10 + n), EOS] for d, n in enumerate(lengths)]
    return np.concatenate([np.array(part) for part in parts])


def test_prompts_are_windows_of_documents() -> None:
    """Every window of 3 + 4 tokens with a token after its prompt is drawn once; real text ends with its document."""
    data = TokenData.from_arrays({"a": counted([14, 3, 4]), "b": counted([0, 10, 11], 1)}, 1 << 15, EOS)
    prompts = choose_prompts(data, 6, 3, 4)
    found = {(p.source, p.number, p.ids[0] % 1000 - 10): (p.ids, p.real_ids) for p in prompts}
    assert set(found) == {("a", 0, 0), ("a", 0, 7), ("a", 2, 0), ("b", 1, 0), ("b", 2, 0), ("b", 2, 7)}
    assert found["a", 0, 7] == ([17, 18, 19], [20, 21, 22, 23])
    assert found["a", 2, 0] == ([2010, 2011, 2012], [2013])
    with pytest.raises(UserError, match="has 6 windows of 3 \\+ 4 tokens, but 7 are needed"):
        choose_prompts(data, 7, 3, 4)


def test_prompts_are_drawn_evenly_and_by_seed() -> None:
    data = TokenData.from_arrays({"a": counted([60] * 9)}, 1 << 15, EOS)
    drawn = Counter((p.number, p.ids[0]) for seed in range(200) for p in choose_prompts(data, 10, 5, 5, seed))
    assert len(drawn) == 54
    assert min(drawn.values()) > 15 and max(drawn.values()) < 65  # 37 expected
    assert choose_prompts(data, 10, 5, 5, 3) == choose_prompts(data, 10, 5, 5, 3)
    assert choose_prompts(data, 10, 5, 5, 3) == choose_prompts(data, 20, 5, 5, 3)[:10]


def test_decodings() -> None:
    for word, temperature, top_p in (("greedy", 0.0, 1.0), ("p=0.95", 1.0, 0.95), ("t=0.7:p=.9", 0.7, 0.9)):
        assert parse_decoding(word) == GenerationOptions(temperature=temperature, top_p=top_p)
    for word in ("", "top", "t=", "t=0", "p=1.1", "p=0", "t=1.2.3", "t=-1", "greedy:p=.9"):
        with pytest.raises(UserError):
            parse_decoding(word)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_continuations(name: str, tokenizer: Tokenizer) -> None:
    """One text for each prompt and draw, the same for the same seed; greedy without noise needs one draw."""
    config = micro_config("--objective.name", name)
    model = micro_model(config, tokenizer.vocab_size, spread=0.1)[0].float().eval()
    prompts = [tokenizer.encode(text) for text in ("def f", "import os")]
    options = GenerationOptions(k=2, max_new_tokens=6)
    sampled = continue_prompts(model, tokenizer, prompts, options, 3)
    assert [len(texts) for texts in sampled] == [2, 2, 2]
    assert all(len(ids) <= 6 and tokenizer.eos_id not in ids for texts in sampled for ids in texts)
    assert len({tuple(texts[0]) for texts in sampled}) == 3
    assert sampled == continue_prompts(model, tokenizer, prompts, options, 3)
    greedy = continue_prompts(model, tokenizer, prompts, options.changed(temperature=0), 3)
    assert len(greedy) == (3 if model.recurrence.stochastic else 1)


def test_another_walk_leaves_the_models_own_as_it_is() -> None:
    model, _ = micro_model(micro_config("--objective.name", "denoise"))
    own = model.recurrence
    other = with_walk(own, {"bridge": "hard", "sampler": "heun"})
    assert isinstance(own, DenoiseWalk) and isinstance(other, DenoiseWalk)
    assert (other.config.bridge, other.config.sampler, own.config.bridge) == ("hard", "heun", "soft")
    flat, _ = micro_model(micro_config("--objective.name", "next_token"))
    assert with_walk(flat.recurrence, {}) is flat.recurrence


def test_independent_texts() -> None:
    data = TokenData.from_arrays({"a": np.array([5, 5, 5, 6, EOS]), "b": np.array([6, 5, EOS])}, 8, EOS)
    shares = frequencies(data)
    assert shares.tolist() == [0, 0, 2 / 8, 0, 0, 4 / 8, 2 / 8, 0]
    texts = independent_texts(shares, EOS, 4000, 3)
    whole = [text for text in texts if len(text) == 3]
    assert len(whole) / 4000 == pytest.approx(0.75**3, abs=0.03)
    assert sum(text.count(5) for text in whole) / (3 * len(whole)) == pytest.approx(2 / 3, abs=0.03)
    assert all(set(text) <= {5, 6} for text in texts)


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> Path:
    """Data in two parts with common held-out documents, a run of two objectives, a judge."""
    folder = tmp_path_factory.mktemp("quality")
    for name in ("text", "held"):
        (folder / name).mkdir()
    for number, text in enumerate(texts):
        (folder / ("text" if number % 3 else "held") / f"{number:03d}.py").write_bytes(text.encode())
    text, held = [str(folder / "text")], [str(folder / "held")]
    for name, part in (("data", 1), ("judge-data", 2)):
        prepare(text, tokenizer, folder / name, val_sources=held, part=(part, 2), workers=1)
    for name, data in (("denoise", "data"), ("next_token", "data"), ("judge", "judge-data")):
        objective = "next_token" if name == "judge" else name
        steps = 120 if name == "judge" else 20
        words = [*MICRO, "--objective.name", objective, "--data.path", folder / data, "--run.dir", folder / name,
                 "--budget.steps", steps, "--optim.lr", "1e-2", "--eval.points", "0"]  # fmt: skip
        trainer.train(*arguments([str(word) for word in words]))
    return folder


SMALL = [
    "--prompts",
    "12",
    "--prompt-tokens",
    "8",
    "--tokens",
    "12",
    "--each",
    "2",
    "--resamples",
    "20",
    "--device",
    "cpu",
]


def run_generation(script_here: Run, folder: Path, *words: object, name: str = "denoise") -> dict[str, Any]:
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    result = script_here("eval/generation.py", folder / name, "--judge", folder / "judge", "--data", folder / "data",
                         *SMALL, "--json", out, *words)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning") == 0
    lines = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(out.read_text())
    assert str(folder / "judge/checkpoints/step-00000120") in lines[0]
    assert found["judge"] == str(folder / "judge/checkpoints/step-00000120")
    assert len(lines) == 3 + len(found["rows"])
    return found


def test_generation_of_a_denoiser(folder: Path, script_here: Run) -> None:
    found = run_generation(script_here, folder, "--k", "1,2", "--bridge", "soft,hard", "--decodings", "p=0.9,greedy")
    rows = found["rows"]
    assert [(row["name"], row["k"], row["bridge"], row["decoding"]) for row in rows] == [
        ("real", None, None, None),
        ("model", 1, None, "p=0.9"),
        ("model", 1, None, "greedy"),
        *(("model", 2, bridge, decoding) for bridge in ("soft", "hard") for decoding in ("p=0.9", "greedy")),
        ("untrained", 1, None, "t=1"),
        ("unigram", None, None, None),
        ("uniform", None, None, None),
    ]
    named = {row["name"]: row for row in rows}
    assert [row["texts"] for row in rows] == [12, *[24] * 9]
    for row in rows:
        for name in ("generative_ppl", "bits_per_byte", "distinct_2", "repetition"):
            low, high = row["intervals"][name]
            assert low <= row[name] <= high
        assert (row["mauve"] is not None) == has_mauve()
        near = abs(row["distinct_2"] - rows[0]["distinct_2"]) <= DISTINCT_MARGIN
        assert row["ranked"] == (near and row["name"] != "real") == (row["rank"] is not None)
    assert named["real"]["judge_tokens_per_text"] <= 12
    assert named["real"]["bits_per_byte"] < named["unigram"]["bits_per_byte"] < named["uniform"]["bits_per_byte"]
    assert len({row["sample"] for row in rows}) > 6
    assert rows[3]["flops_per_token"] > rows[1]["flops_per_token"] > 0
    assert found["shared_documents"] == {"run": 0.0, "prompts": 0.0}


def test_generation_is_repeatable_and_follows_the_seed(folder: Path, script_here: Run) -> None:
    words = ["--k", "1", "--decodings", "t=1", "--resamples", "0"]
    first, again = (run_generation(script_here, folder, *words, name="next_token")["rows"] for _ in range(2))
    other = run_generation(script_here, folder, *words, "--seed", "1", name="next_token")["rows"]
    assert first == again
    assert first[0] != other[0] and first[1]["sample"] != other[1]["sample"]
    assert all(row["intervals"] == {} for row in first)


def test_greedy_without_noise_has_one_text_a_prompt(folder: Path, script_here: Run) -> None:
    found = run_generation(script_here, folder, "--k", "1", "--decodings", "greedy", name="next_token")
    assert [row["texts"] for row in found["rows"]] == [12, 12, 24, 24, 24]


def test_prompts_of_another_tokenizer(folder: Path, script_here: Run, texts: list[str]) -> None:
    """A run is judged on data prepared with another tokenizer: as many of its own tokens as make texts of that length."""
    other = Tokenizer.from_bytes(train(texts, 300))
    prepare([str(folder / "held")], other, folder / "other", val_sources=[str(folder / "held")], workers=1)
    words = ["--data", folder / "other", "--k", "1", "--decodings", "t=1", "--tokens", "24", "--prompt-tokens", "16"]
    result = script_here("eval/generation.py", folder / "next_token", "--judge", folder / "judge", *SMALL[:2], *words,
                         "--each", "1", "--json", folder / "other.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "other.json").read_text())
    real, made = found["rows"][:2]
    assert found["tokens"] == round(real["judge_tokens_per_text"]) < 24
    assert made["judge_tokens_per_text"] == pytest.approx(real["judge_tokens_per_text"], rel=0.25)


def test_without_mauve_there_is_one_line(folder: Path, script_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)
    assert not has_mauve()
    words = ["--judge", folder / "judge", "--data", folder / "data", *SMALL, "--k", "1", "--decodings", "greedy"]
    result = script_here("eval/generation.py", folder / "next_token", *words)
    assert result.returncode == 0
    assert result.stderr.splitlines() == ["note: MAUVE is left out: install it with pip install 'recurrent-db[mauve]'"]


def test_a_judge_that_knows_the_documents_is_refused(folder: Path, script_here: Run) -> None:
    """A judge of the run's own data; one that read the prompts; both allowed on request, and said."""
    common = [
        "eval/generation.py",
        folder / "denoise",
        "--data",
        folder / "data",
        "--k",
        "1",
        "--decodings",
        "greedy",
        *SMALL,
    ]
    words = [*common, "--judge", folder / "next_token"]
    told = script_here(*words)
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "trained on the same text as" in told.stderr
    allowed = script_here(*words, "--allow-shared", "--json", folder / "shared.json")
    assert allowed.returncode == 0
    assert "warning: the judge was trained on the same text as" in allowed.stderr
    assert json.loads((folder / "shared.json").read_text())["shared_documents"]["run"] == 1.0

    # The judge has no record of its own: it was made by train/pretrain.py.
    tokenizer, read = Tokenizer(folder / "data/tokenizer.model"), record(folder / "judge-data")
    read["documents"] += marks(open_data(folder / "data", "validation"), tokenizer)
    (folder / "judge" / RECORD).write_text(json.dumps(read))
    try:
        told = script_here(*common, "--judge", folder / "judge")
    finally:
        (folder / "judge" / RECORD).unlink()
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "100.0% of the documents that the prompts come from" in told.stderr


def test_data_that_are_gone_cannot_be_checked(folder: Path, script_here: Run) -> None:
    words = ["--judge", folder / "judge", "--data", folder / "moved", *SMALL, "--k", "1", "--decodings", "greedy"]
    (folder / "data").rename(folder / "moved")
    try:
        result = script_here("eval/generation.py", folder / "next_token", *words)
    finally:
        (folder / "moved").rename(folder / "data")
    assert result.returncode == 0, result.stderr
    assert "warning: cannot check whether the judge knows the run's training documents" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "--k must be 1 or more"),
        (["--decodings", "beam"], "a decoding is greedy"),
        (["--bridge", "rope"], "--bridge takes some of soft, hard, sample, state, separated by commas, got 'rope'"),
        (["--prompts", "3"], "--prompts must be 4 or more"),
        (["--prompts", "100000"], "windows of 8 + 12 tokens"),
        (["--tokens", "25"], "the judge's context has 32"),
        (["--resamples", "-1"], "must be 0 or more"),
        (["--judge", "nowhere"], "no run directory or checkpoint nowhere"),
        (["--judge", "denoise"], "a judge is a flat model"),
    ],
)
def test_mistakes(folder: Path, script_here: Run, words: list[str], message: str) -> None:
    words = [str(folder / word) if word == "denoise" else word for word in words]
    told = script_here("eval/generation.py", folder / "denoise", "--judge", folder / "judge", "--data",
                       folder / "data", *SMALL, *words)  # fmt: skip
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
    assert message in told.stderr
    flat = script_here("eval/generation.py", folder / "next_token", "--judge", folder / "judge", "--data", folder / "data",
                       "--bridge", "hard")  # fmt: skip
    assert "is not a denoiser" in flat.stderr
