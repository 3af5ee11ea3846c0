"""Accuracy by K: credit and comparison against closed forms, and the command from checkpoint to plot."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script, make_checkpoint, synthetic_data, synthetic_tokenizer, write_benchmarks

from recurrent_db.data.ngram import unigram_log_p, unigram_nll
from recurrent_db.denoise.noise import GRIDS, Below, Density, LogNormal, LogUniform
from recurrent_db.evaluation.accuracy import Accuracy, Difference, credit

Script = Callable[..., subprocess.CompletedProcess[str]]


# -- counting ----------------------------------------------------------------------------------------------------------


def test_credit_is_shared_where_choices_tie() -> None:
    assert credit([-1.0, -2.0], 0) == 1
    assert credit([-1.0, -2.0], 1) == 0
    assert credit([-3.0, -1.0, -1.0 - 1e-12], 1) == credit([-3.0, -1.0 - 1e-12, -1.0], 1) == 0.5
    assert credit([-3.0, -1.0, -1.0], 0) == 0
    assert credit([-50.0] * 4, 0) == 0.25
    # The same tokens in another order: sums that rounding alone tells apart.
    log_p = unigram_log_p(np.array([5, 1, 3, 7]))
    assert credit([float(log_p[[0, 1, 2, 3]].sum()), float(log_p[[3, 1, 0, 2]].sum())], 0) == 0.5


def test_intervals_and_differences() -> None:
    rng = np.random.default_rng(0)
    credits = (rng.random(400) < 0.7).astype(float)
    accuracy = Accuracy.of(credits)
    p = credits.mean()
    assert accuracy.mean == p
    assert accuracy.stderr == pytest.approx(math.sqrt(p * (1 - p) / 399))
    low, high = accuracy.interval
    assert (high - low) / 2 == pytest.approx(1.96 * accuracy.stderr, rel=0.12)
    assert low < p < high
    # Paired: what both get right or wrong together does not blur the difference.
    other = credits.copy()
    wrong = np.flatnonzero(credits == 1)[:30]
    other[wrong] = 0
    difference = Difference.of(credits, other)
    assert difference.mean == pytest.approx(30 / 400)
    share = 30 / 400
    assert difference.z == pytest.approx(share / math.sqrt(share * (1 - share) / 399))
    assert Difference.of(other, credits).z == -difference.z
    assert Difference.of(credits, credits).z == 0
    assert Difference.of(np.ones(5), np.zeros(5)).z == math.inf
    # Of two independent tasks of the same size the group's error is smaller by sqrt(2).
    group = Accuracy.average([accuracy, accuracy])
    assert group.stderr == pytest.approx(accuracy.stderr / math.sqrt(2))
    low, high = group.interval
    assert (high - low) / 2 == pytest.approx(1.96 * group.stderr, rel=0.12)
    assert Difference.average([difference, difference]).z == pytest.approx(difference.z * math.sqrt(2))


def test_unigram() -> None:
    train, held_out = np.array([0, 0, 1, 2, 0]), np.array([1, 0, 2, 2])
    counts = np.bincount(train, minlength=4)
    np.testing.assert_allclose(np.exp(unigram_log_p(counts)), [4 / 9, 2 / 9, 2 / 9, 1 / 9])
    assert unigram_nll(train, held_out, 4) == pytest.approx(-unigram_log_p(counts)[[0, 2, 2]].mean())


@pytest.mark.parametrize(
    "law",
    [LogNormal(-0.4, 1.0, 0.02, 20.0), LogUniform(0.02, 20.0)],
)
def test_a_law_of_sigma_cut_off(law: Density) -> None:
    cut = Below(law, 1.5)
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = cut.quantile(u)
    assert sigma[0].item() == pytest.approx(0.02) and sigma[-1].item() == pytest.approx(1.5)
    torch.testing.assert_close(cut.cdf(sigma), u, atol=1e-9, rtol=0)
    # What lies below is as likely, among itself, as before.
    share = law.cdf(torch.tensor(1.5))
    torch.testing.assert_close(law.cdf(sigma), u * share, atol=1e-9, rtol=0)
    for name, grid in GRIDS.items():
        levels = grid(cut, 4)
        assert levels[0] == pytest.approx(1.5)
        assert levels[-1] == pytest.approx(cut.quantile(torch.tensor(0.25)).item() if name == "edges" else 0.02)
        assert levels == sorted(levels, reverse=True)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its data, and benchmark files."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'recurrent-db[eval]')")
    folder = tmp_path_factory.mktemp("sweep")
    synthetic_data(folder / "data")
    make_checkpoint(folder / "run", synthetic_tokenizer(), "denoise", 48, "--data.path", str(folder / "data"))
    write_benchmarks(folder / "files", 7)
    return folder


def rows_of(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    return {(row["task"], row["metric"], row["model"], row["k"]): row for row in rows}


def test_sweep(script_here: Script, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    words = (
        "eval/sweep.py", here / "run", "--k", "1,3", "--tasks", "arc_easy,blimp,lambada", "--data", here / "files",
        "--cache", tmp_path / "answers", "--seed", 3,
    )  # fmt: skip
    done = script_here(*words, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "a.json")
    tasks = [("blimp", "acc"), ("blimp_first", "acc"), ("blimp_second", "acc"), ("lambada", "acc")]
    models = [("chance", None), ("unigram", None), ("untrained", 1), ("run", 1), ("run", 3)]
    assert set(rows) == {(*t, *m) for t in [*tasks, ("arc_easy", "acc"), ("arc_easy", "acc_norm")] for m in models}
    assert rows["arc_easy", "acc", "chance", None]["accuracy"] == 0.25
    assert rows["blimp", "acc", "chance", None]["accuracy"] == 0.5
    for (task, _, model, k), row in rows.items():
        assert row["items"] == (14 if task == "blimp" else 7)
        if model != "chance":
            assert row["low"] <= row["accuracy"] <= row["high"]
        assert (row["z"] is not None or row["against"] is not None) == (model == "run")
        assert (row["flops_per_item"] or 0) > 0 or model in ("chance", "unigram")
        if k == 3:
            assert row["flops_per_item"] > 2 * rows[task, row["metric"], model, 1]["flops_per_item"]
    mean = (rows["blimp_first", "acc", "run", 3]["accuracy"] + rows["blimp_second", "acc", "run", 3]["accuracy"]) / 2
    assert rows["blimp", "acc", "run", 3]["accuracy"] == pytest.approx(mean)
    assert "K=3: above the better of the unigram and the untrained model, z > 3, on 0 of 2" in done.stdout
    assert "inference FLOPs per item" in (tmp_path / "a.svg").read_text()
    # Again, from the kept answers: the same table.
    monkeypatch.setattr("recurrent_db.evaluation.window_scorer.WindowScorer._run", None)
    again = script_here(*words, "--json", tmp_path / "b.json")
    assert again.returncode == 0, again.stderr
    same = ("accuracy", "stderr", "low", "high", "z", "flops_per_item")
    for name, row in rows_of(tmp_path / "b.json").items():
        assert {key: row[key] for key in same} == {key: rows[name][key] for key in same}


def test_sweep_agrees_with_the_harness(
    script_here: Script, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    tasks = ["--tasks", "arc_easy,blimp,lambada", "--data", here / "files"]
    done = script_here("eval/sweep.py", here / "run", "--k", 2, "--json", tmp_path / "a.json", "--fewshot", 1, *tasks)
    assert done.returncode == 0, done.stderr
    done = script_here(
        "eval/lm_eval_cli.py", "--model_args", f"checkpoint={here / 'run'},k=2", "--num_fewshot", 1, *tasks,
        "--output_path", tmp_path / "harness.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("harness_*.json")
    theirs = json.loads(path.read_text())["results"]
    ours = {name[:2]: row for name, row in rows_of(tmp_path / "a.json").items() if name[2] == "run"}
    assert len(ours) == 6
    for (task, metric), row in ours.items():
        assert row["accuracy"] == pytest.approx(theirs[task][f"{metric},none"])
        assert row["stderr"] == pytest.approx(theirs[task][f"{metric}_stderr,none"], rel=1e-3)


def test_without_the_training_data_there_is_no_unigram_row(
    script_here: Script, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    make_checkpoint(tmp_path / "lost", synthetic_tokenizer(), "next_token", 48, "--data.path", str(tmp_path / "gone"))
    done = script_here("eval/sweep.py", tmp_path / "lost", "--k", 1, "--tasks", "piqa", "--data", here / "files")
    assert done.returncode == 0, done.stderr
    assert "no unigram row" in done.stderr and "unigram" not in done.stdout.split("\n", 3)[3].split("above")[0]
    done = script_here(
        "eval/sweep.py",
        tmp_path / "lost",
        "--k",
        1,
        "--tasks",
        "piqa",
        "--data",
        here / "files",
        "--counts",
        here / "data",
    )
    assert done.returncode == 0, done.stderr
    assert "\nunigram" in done.stdout


def test_mistakes_are_one_line(
    script_here: Script, here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    good = {"--tasks": "arc_easy", "--data": here / "files", "--limit": 1, "--k": 1}
    (tmp_path / "hidden").mkdir()
    hidden = {"goal": "Cut", "sol1": "bread", "sol2": "water", "label": -1}
    (tmp_path / "hidden/piqa_validation.jsonl").write_text(json.dumps(hidden) + "\n")
    cases: list[tuple[dict[str, object], str]] = [
        (
            {"--tasks": "piqa", "--data": tmp_path / "hidden"},
            "piqa_validation.jsonl, line 1: label must be a whole number",
        ),
        ({"--k": "0"}, "--k must be 1 or more"),
        ({"--k": "1,x"}, "--k takes whole numbers"),
        ({"--untrained-k": 0}, "--untrained-k must be 1 or more"),
        ({"--limit": 0}, "--limit must be 1 or more"),
        ({"--tasks": "hellaswag"}, "not an offline task"),
        ({"--tasks": ","}, "--tasks takes names, separated by commas, got ','"),
        ({"--data": here / "nowhere"}, "no such folder"),
        ({"--tasks": "heldout_cloze"}, "manifest.json"),
        ({"--sigma": 99}, "at most its sigma_max = 20"),
        ({"--plot": tmp_path / "a.gif"}, "must end in .svg"),
        ({"--json": "/proc/none/a.json"}, "cannot write"),
        ({"--counts": here / "files"}, "manifest.json"),
        ({"--batch-size": "many"}, "batch_size must be"),
    ]
    for change, expected in cases:
        words = [str(word) for pair in {**good, **change}.items() for word in pair]
        done = script_here("eval/sweep.py", here / "run", *words)
        assert done.returncode == 2, (change, done.stdout)
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    done = script_here("eval/sweep.py", here / "run", *(w for pair in good.items() for w in pair), "--fewshot", 99)
    assert (done.returncode, "there are fewer examples than" in done.stderr.splitlines()[-1]) == (2, True)
    done = script_here("eval/sweep.py", here / "files", "--data", here / "files", "--tasks", "arc_easy")
    assert (done.returncode, "holds no checkpoint" in done.stderr) == (2, True)


def test_tables_name_what_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    tables: ModuleType = load_script("eval/sweep_tables.py")

    def row(task: str, model: str, k: int | None, right: int) -> Any:
        credits = np.array([1.0] * right + [0.0] * (100 - right))
        return tables.Row(task, "acc", model, k, 100, Accuracy.of(credits), None, None, credits)

    def table(task: str, unigram: int, untrained: int, ours: int) -> Any:
        rows = [
            row(task, "chance", None, 50),
            row(task, "unigram", None, unigram),
            row(task, "untrained", 1, untrained),
        ]
        return tables.compare(tables.Table(task, "acc", [*rows, row(task, "run", 1, ours)]))

    members = [table("a", 40, 60, 90), table("b", 55, 45, 56), table("c", 50, 50, 40)]
    ours = [member.rows[-1] for member in members]
    assert [r.against for r in ours] == ["untrained", "unigram", "unigram"]
    assert [r.above for r in ours] == [True, False, False]
    group = tables.group_table("all", members)
    assert group.rows[-1].accuracy.mean == pytest.approx(0.62)
    assert group.rows[-1].against == "untrained"
    assert "on 1 of 3" in tables.text(group)
