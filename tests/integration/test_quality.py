"""The research benchmarks: what they compare, going on where they were stopped, and tasks that are what they say."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MICRO, ROOT, load_script, micro_config, micro_model
from matplotlib.figure import Figure

from recurrent_db.config import load_config
from recurrent_db.data import load_tokenizer, open_data
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng

Script = Callable[..., "subprocess.CompletedProcess[str]"]

OPTIONS = " ".join(
    f"{key.removeprefix('--')}={value}"
    for key, value in itertools.pairwise(MICRO)
    if key.startswith("--model") or key in ("--data.sequence_length", "--data.batch_size")
)
"""`MICRO`'s shape as the benchmarks take it."""


@pytest.fixture
def jobs_start_at_once(monkeypatch: pytest.MonkeyPatch, quick_python: str) -> None:
    """The jobs of a comparison are processes that have torch imported."""
    monkeypatch.setattr("sys.executable", quick_python)


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def module(name: str) -> ModuleType:
    return load_script(f"benchmarks/{name}.py")


# ---------------------------------------------------------------------------------------------------------------------
# Slices


@dataclass(frozen=True)
class Piece:
    name: str
    takes: float = 1.0


def run_slice(slices: Any, a_slice: Any, pieces: list[Piece], *words: object) -> list[Piece]:
    done: list[Piece] = []
    left: list[Piece] = a_slice.run(
        lambda: [piece for piece in pieces if piece not in done],
        lambda piece, lock: a_slice.call(a_slice.work / "log", lock, *(words or ("-c", "pass"))),
        lambda piece: piece.takes,
        done.append,
    )
    assert left == [piece for piece in pieces if piece not in done]
    return done


def test_a_slice_starts_only_what_fits_or_would_never_fit(tmp_path: Path) -> None:
    slices = module("slices")
    short, long, endless = Piece("short", 1), Piece("long", 590), Piece("endless", 1e6)

    def started(**options: Any) -> set[Piece]:
        a_slice = slices.Slice(tmp_path, jobs=2, minutes=10, **options)
        a_slice.started -= 60  # one of ten minutes has gone by
        return set(run_slice(slices, a_slice, [long, short, endless]))

    assert started() == {short, endless}
    assert started(resumable=False) == {short}
    assert set(run_slice(slices, slices.Slice(tmp_path), [long, endless])) == {long, endless}


def test_a_slice_ends_in_time_and_leaves_what_it_stopped(tmp_path: Path) -> None:
    slices = module("slices")
    before = time.monotonic()
    a_slice = slices.Slice(tmp_path, minutes=1 / 60)
    assert run_slice(slices, a_slice, [Piece("a", 0.5), Piece("b", 0.5)], "-c", "import time; time.sleep(60)") == []
    assert 0.9 < time.monotonic() - before < 20


def test_jobs_of_another_process_are_left_to_it(tmp_path: Path) -> None:
    slices = module("slices")
    with (tmp_path / "mine.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_slice(slices, slices.Slice(tmp_path), [Piece("mine"), Piece("free")]) == [Piece("free")]
    # A command holds the lock for as long as it runs, whatever became of who started it.
    a_slice = slices.Slice(tmp_path)
    lock = a_slice._lock("mine")
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    os.close(lock)
    assert a_slice._lock("mine") is None
    child.kill()
    child.wait()
    assert a_slice._lock("mine") is not None


def test_a_command_that_fails_is_one_line(tmp_path: Path) -> None:
    slices = module("slices")
    with pytest.raises(UserError, match=r"^a: error: no luck \(status 2; full output: .*log\)$"):
        run_slice(slices, slices.Slice(tmp_path), [Piece("a")], "-c", "raise SystemExit(print('error: no luck') or 2)")


def test_runs_of_other_things_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    slices = module("slices")
    slices.Slice(tmp_path).claim({"corpus": {"a": "1"}, "options": ["x"]})
    slices.Slice(tmp_path).claim({"corpus": {"a": "1"}, "options": ["x"]})
    with pytest.raises(UserError, match="were made with another corpus: choose another --work"):
        slices.Slice(tmp_path).claim({"corpus": {"a": "2"}, "options": ["x"]})


# ---------------------------------------------------------------------------------------------------------------------
# Quality, end to end


def quality_words(data: Path, folder: Path, *more: object) -> list[object]:
    return [
        "benchmarks/quality/compare.py", "--data", data, "--work", folder / "work", "--results", folder / "results",
        "--device", "cpu", "--options", OPTIONS, "--rates", "1e-2", "--budget-flops", "1e9", "--k", "1,2",
        "--score-tokens", 512, "--jobs", 2, *more,
    ]  # fmt: skip


@pytest.mark.usefixtures("jobs_start_at_once")
def test_quality_end_to_end(data: Path, tmp_path: Path, script_here: Script) -> None:
    arms = ("--arms", "next_token,denoise")
    told = script_here(*quality_words(data, tmp_path, *arms, "--minutes", 0))
    assert (told.returncode, told.stdout) == (0, "No run is complete yet.\n"), told.stderr
    assert "Left: 2 runs known so far (next_token-seed0-lr0.01-flops1e+09, denoise-seed0" in told.stderr

    # One of them was killed on its way: it goes on from its checkpoint.
    quality = module("quality/compare")
    args = quality.Args(
        data, arms=("next_token", "denoise"), options=OPTIONS, rates=(1e-2,), budget_flops=(1e9,), k=(1, 2),
        score_tokens=512, work=tmp_path / "work", results=tmp_path / "results", device="cpu",
    )  # fmt: skip
    [flat, _] = quality.Quality(args).pending()
    words = quality.Quality(args).words(flat)
    assert script_here("train/pretrain.py", *words, "--budget.steps", 3).returncode == 0

    run = script_here(*quality_words(data, tmp_path, *arms, "--seeds", "0"))
    assert run.returncode == 0, run.stderr
    assert "resuming at step 3" in (tmp_path / "work" / f"{flat.name}.log").read_text()
    assert "| next_token | 0.01 | 1 |" in run.stdout
    merged = json.loads((tmp_path / "results/quality-tiny.json").read_text())
    assert {"arms", "budget_flops", "corpus"} <= merged.keys()
    assert (merged["budget_flops"], list(merged["arms"])) == (1e9, ["next_token", "denoise"])
    for arm in merged["arms"].values():
        [seed] = arm["seeds"]
        assert {"nll_by_k", "flops", "tokens", "steps", "learning_rate", "text"} <= seed.keys()
        assert 1 < seed["unigram_entropy"] < math.log(load_tokenizer(data).vocab_size)
        assert list(seed["nll_by_k"]) == ["1", "2"]
        assert 1e9 <= seed["flops"] < 1.2e9
        assert 0 < seed["text"]["distinct_2"] <= 1 and 0 < seed["text"]["held_out_distinct_2"] <= 1
    assert (
        merged["arms"]["denoise"]["seeds"][0]["nll_sigma_max"] == merged["arms"]["denoise"]["seeds"][0]["nll_by_k"]["1"]
    )
    assert len(list((tmp_path / "results/quality-tiny").iterdir())) == 2

    # Nothing is done twice, and another seed is one run more.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results/quality-tiny").iterdir()}
    again = script_here(*quality_words(data, tmp_path, "--arms", "next_token"))
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "| next_token | 0.01 | 2 |" in again.stdout and "| denoise | 0.01 | 1 |" in again.stdout

    picture = tmp_path / "pictures/quality.svg"
    drawn = script_here(*quality_words(data, tmp_path, *arms, "--minutes", 0, "--plot", picture))
    assert drawn.returncode == 0, drawn.stderr
    assert all(label in picture.read_text() for label in ("next_token", "denoise, bound", "training FLOPs"))
    plot, failed = module("quality/plot").plot, {"arm": "next_token", "failed": "not finite", "budget_flops": 1e9}
    assert not plot([failed], ["next_token"], [1e9], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()

    # Several budgets: where the runs of each end, too.
    done = [json.loads(path.read_text()) for path in (tmp_path / "results/quality-tiny").iterdir()]
    twice = [{**run, "budget_flops": 2e9, "flops": 2 * run["flops"]} for run in done if run["seed"] == 0]
    twice = [run for run in twice if run["arm"] == "next_token"]
    assert "complete runs" not in picture.read_text()
    assert plot([*done, *twice], ["next_token", "denoise"], [1e9, 2e9], picture)
    assert all(label in picture.read_text() for label in ("complete runs, at the best K", "after 1e+09 FLOPs"))
    flat = [run for run in [*done, *twice] if run["arm"] == "next_token"]
    axes = Figure().subplots()
    by_seed = [{run["seed"]: run for run in flat if run["budget_flops"] == budget} for budget in (1e9, 2e9)]
    expected = [(run["flops"], min(run["nll_by_k"].values())) for run in flat]
    assert sorted(module("quality/plot").ends(axes, by_seed, {})) == sorted(expected)
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 1]
    walk = {"flops": 1.0, "nll_by_k": {"1": 9.0}, "bound_by_k": {"1": 8.0, "8": 5.0}}
    assert module("quality/plot").ends(axes, [{0: walk}], {}) == [(1.0, 5.0)]
    # An arm without a run at the budget of the other panels is in that one; of budgets of as many arms the larger is theirs.
    walks = [run for run in done if run["arm"] == "denoise"]
    assert plot([*walks, *twice], ["denoise", "next_token"], [1e9, 2e9], picture)
    assert "after 2e+09 FLOPs" in picture.read_text()

    # A result that is not of this comparison is not mixed in.
    for words, message in (
        (["--plot", tmp_path / "x.gif"], "must end in .svg, .png or .pdf"),
        (["--options", OPTIONS + " optim.weight_decay=0.9"], "another optim.weight_decay (0.1, now 0.9)"),
        (["--k", "1,4", "--work", tmp_path / "elsewhere"], "was scored with"),
        (
            ["--options", OPTIONS + " optim.weight_decay=0.9", "--results", tmp_path / "elsewhere"],
            "made with another options: choose another --work",
        ),
        (["--arms", "nobody"], "unknown arm 'nobody'"),
        (["--rates", "high"], "--rates takes numbers"),
        (["--data-limited", 10**9], "the corpus has"),
    ):
        told = script_here(*quality_words(data, tmp_path), *words)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
        assert message in told.stderr


def test_every_arm_has_a_configuration() -> None:
    quality = module("quality/compare")
    for size in quality.SIZES.values():
        for words in quality.ARMS.values():
            config = load_config(ROOT / "train/configs" / size["config"], [*size["options"], *words])
            assert config.objective.name == words[1]


def test_a_result_made_with_another_option_is_another() -> None:
    runs = module("quality/runs")
    now = runs.identity(load_config(None, ["--objective.name", "one_step"]))
    other = runs.identity(load_config(None, ["--objective.name", "one_step", "--objective.one_step.skip_core", "1"]))
    assert runs.contradiction(now, now) is None
    assert runs.contradiction(other, now) == "objective.one_step.skip_core (1.0, now 2.0)"


@pytest.mark.parametrize(
    ("arm", "option", "other"),
    [
        ("one_step", "one_step.next_token_share", "denoise.atom"),
        ("denoise", "denoise.atom", "one_step.next_token_share"),
        ("denoise", "denoise.sigma_max", "unrolled.truncation"),
        ("unrolled", "unrolled.truncation", "one_step.next_token_share"),
    ],
)
def test_a_result_is_told_apart_by_what_its_objective_reads(arm: str, option: str, other: str) -> None:
    runs, values = module("quality/runs"), {"denoise.sigma_max": "9", "unrolled.truncation": "7"}

    def with_option(key: str) -> Any:
        words = ["--objective.name", arm, f"--objective.{key}", values.get(key, "0.3")]
        return runs.identity(load_config(None, words))

    now = runs.identity(load_config(None, ["--objective.name", arm]))
    assert f"objective.{option} (" in runs.contradiction(with_option(option), now)
    assert runs.contradiction(with_option(other), now) is None


def test_the_first_tokens_of_a_corpus(data: Path, tmp_path: Path) -> None:
    module("quality/runs").limit_corpus(data, tmp_path / "first", 1234)
    [whole], [first] = (
        open_data(folder, "train", verify=True).sources.values() for folder in (data, tmp_path / "first")
    )
    assert first.tokens == 1234
    assert first.read(0, 1233).tolist() == whole.read(0, 1233).tolist()
    assert load_tokenizer(tmp_path / "first").hash == load_tokenizer(data).hash


# ---------------------------------------------------------------------------------------------------------------------
# Quality, its plan


def fake_result(run: Any, nll: float, noise: float = 0.0) -> dict[str, Any]:
    by_sequence = [nll + (0.1 if i % 2 else -0.1) + noise * (-1) ** (i // 2) for i in range(8)]
    return {
        "arm": run.arm, "seed": run.seed, "learning_rate": run.rate, "budget_flops": run.budget, "limit": run.limit,
        "flops": run.budget, "tokens": 10, "steps": 1, "seconds": 1.0, "words": [], "evaluations": [], "best_k": 4,
        "nll_by_k": {"1": nll + 1, "4": nll}, "nll_best": nll, "bits_per_byte_by_k": {"1": 2.0, "4": 1.0},
        "unigram_entropy": 99.0,
        "nll_by_sequence": {"1": [nll + 1] * 8, "4": by_sequence},
        "text": {"distinct_2": 0.5, "repetition": 0.1, "held_out_distinct_2": 0.5},
    }  # fmt: skip


def play(quality: Any, nll: Callable[[Any], float], most: int = 300) -> list[Any]:
    """Let the plan run with made-up results; the runs in order."""
    order = []
    while (pending := quality.pending()) and len(order) < most:
        order.append(pending[0])
        quality.results[pending[0].name] = fake_result(pending[0], nll(pending[0]))
    return order


def planned(data: Path, tmp_path: Path, **options: Any) -> Any:
    quality = module("quality/compare")
    return quality.Quality(
        quality.Args(data, work=tmp_path / "work", results=tmp_path / "results", device="cpu", **options)
    )


def test_a_run_that_a_signal_ended_is_no_result(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer then saves and exits with status 0, short of its budget."""
    quality = planned(data, tmp_path, arms=("next_token",), rates=(1e-3,), seeds=(0,), budget_flops=(1e9,))
    monkeypatch.setattr(quality.slice, "call", lambda *_: None)
    [run] = quality.pending()
    with pytest.raises(Exception, match="was stopped early"):
        quality.do(run, 0)
    assert not list(quality.folder.iterdir())


def test_the_sweep_is_the_same_and_other_seeds_take_the_best_rate(data: Path, tmp_path: Path) -> None:
    quality = planned(
        data,
        tmp_path,
        arms=("next_token", "denoise"),
        rates=(1e-3, 2e-3, 4e-3),
        seeds=(0, 1, 2),
        budget_flops=(1e9, 2e9),
    )
    best = {"next_token": 2e-3, "denoise": 4e-3}
    order = play(quality, lambda run: 3 + abs(math.log(run.rate / best[run.arm])))
    assert [(run.arm, run.rate) for run in order[:2]] == [("next_token", 2e-3), ("denoise", 2e-3)]
    for budget, arm in itertools.product((1e9, 2e9), best):
        runs = [run for run in order if (run.budget, run.arm) == (budget, arm)]
        assert sorted(run.rate for run in runs if run.seed == 0) == [1e-3, 2e-3, 4e-3]
        assert [(run.seed, run.rate) for run in runs if run.seed] == [(1, best[arm]), (2, best[arm])]
    text = quality.merge()
    assert "| denoise | 0.004* | 3 |" in text and "| next_token | 0.002 | 3 |" in text
    merged = json.loads((tmp_path / "results/quality-tiny.json").read_text())
    assert merged["budget_flops"] == 2e9 and merged["other_budgets"][0]["budget_flops"] == 1e9
    assert (merged["sweep"]["runs"], merged["sweep"]["reported_runs"]) == (10, 6)
    assert merged["sweep"]["flops"] == 10 * 2e9


def test_data_limited_trains_until_the_flat_arm_stops_falling(data: Path, tmp_path: Path) -> None:
    quality = planned(
        data, tmp_path, arms=("next_token", "denoise"), rates=(1e-3, 2e-3), seeds=(0, 1), data_limited=4096
    )
    ladder = quality.ladder()
    assert ladder[1] == pytest.approx(2 * ladder[0], rel=0.01)
    curve = dict(zip(ladder, (3.0, 2.5, 2.3, 2.297, 2.4, 2.6, 2.7), strict=True))  # the fourth fell by too little
    order = play(quality, lambda run: curve[run.budget] + run.rate - (run.arm == "denoise") * 0.1)
    flat = [run.budget for run in order if run.arm == "next_token" and run.seed == 0]
    assert sorted(set(flat)) == ladder[:4] and len(flat) == 8
    others = [run.budget for run in order if run.arm == "denoise" and run.seed == 0]
    assert set(others) == {ladder[3]}  # the flat arm's best
    assert all(run.limit == 4096 and "-data4096" in run.name for run in order)
    assert [(run.arm, run.budget, run.rate) for run in order if run.seed == 1] == [
        ("next_token", ladder[3], 1e-3), ("denoise", ladder[3], 1e-3),
    ]  # fmt: skip
    assert "| denoise | 0.001* | 2 |" in quality.merge()
    swept = json.loads((tmp_path / "results/quality-tiny-data4096.json").read_text())["sweep"]
    assert (swept["runs"], swept["reported_runs"]) == (12, 4)
    assert swept["flops"] == pytest.approx(2 * sum(ladder[:4]) + 4 * ladder[3])
    risen = planned(data, tmp_path, arms=("next_token", "denoise"), rates=(1e-3,), seeds=(0,), data_limited=4096)
    curve[ladder[3]] = 2.35
    order = play(risen, lambda run: curve[run.budget] + (run.arm == "denoise") * 0.1)
    assert {run.budget for run in order if run.arm == "denoise"} == {ladder[2], ladder[3]}
    merged = json.loads((tmp_path / "results/quality-tiny-data4096.json").read_text())
    assert merged["limit"] == 4096 and set(merged["arms"]) == {"next_token", "denoise"}


def test_differences_are_taken_sequence_by_sequence() -> None:
    quality, tables = module("quality/compare"), module("quality/tables")
    results = [
        fake_result(quality.Run("next_token", 0, 1e-3, 1e9), 3.0),
        fake_result(quality.Run("denoise", 0, 1e-3, 1e9), 2.9, noise=0.01),
    ]
    gap, error = tables.difference(results, "denoise", "next_token", 1e9, 1e9)
    assert gap == pytest.approx(-0.1)
    # What sequences have in common (0.1 either way) is gone; 0.01 either way is left.
    assert error == pytest.approx(0.01 * math.sqrt(8 / 7) / math.sqrt(8))


def test_a_rate_that_diverged_is_not_taken() -> None:
    quality, tables = module("quality/compare"), module("quality/tables")
    runs = [quality.Run("next_token", 0, rate, 1e9) for rate in (1e-3, 2e-3)]
    dead = {**fake_result(runs[1], 0.0), "failed": "loss not finite"}
    assert tables.best_rate([fake_result(runs[0], 3.0), dead], "next_token", 1e9) == 1e-3
    assert tables.best_rate([dead], "next_token", 1e9) is None
    entry = tables.arm_entry([fake_result(runs[0], 3.0), dead], "next_token", 1e9)
    assert entry["sweep"] == {"0.001": 3.0, "0.002": None}
    alone = {**dead, "arm": "one_step"}  # an arm that came to nothing is not passed over in silence
    table = tables.table([fake_result(runs[0], 3.0), alone], ["next_token", "one_step"], 1e9)
    assert "No row for one_step: its loss was not finite at every rate that was tried (0.002)." in table
    assert "No row" not in tables.table([fake_result(runs[0], 3.0), dead], ["next_token", "one_step"], 1e9)


def test_runs_that_learned_only_frequencies_are_named() -> None:
    quality, tables = module("quality/compare"), module("quality/tables")
    results = [
        {**fake_result(quality.Run("next_token", seed, rate, 1e9), nll), "unigram_entropy": 6.4}
        for seed, rate, nll in ((0, 1e-3, 4.0), (0, 2e-3, 6.38), (1, 1e-3, 6.36))
    ]
    last = tables.table(results, ["next_token"], 1e9).splitlines()[-1]
    assert last.startswith("Collapsed") and "(6.400)" in last
    assert "next_token seed 1 at 0.001 (6.360)" in last and "next_token seed 0 at 0.002 (6.380)" in last
    assert "seed 0 at 0.001" not in last
    results.append({**fake_result(quality.Run("next_token", 1, 2e-3, 1e9), 9.5), "unigram_entropy": 6.4})
    *_, collapsed, worse = tables.table(results, ["next_token"], 1e9).splitlines()
    assert collapsed == last
    assert worse == "Worse than the entropy of the tokens' frequencies (6.400): next_token seed 1 at 0.002 (9.500)."
    results.pop()
    sound = [{**result, "unigram_entropy": 6.6} for result in results]
    assert "Collapsed" not in tables.table(sound, ["next_token"], 1e9)


def test_flops_to_reach_a_level() -> None:
    quality, tables = module("quality/compare"), module("quality/tables")
    budgets = [1e9, 1e10, 1e11]
    results = [
        fake_result(quality.Run("next_token", 0, 1e-3, budget), nll)
        for budget, nll in zip(budgets, (4, 3, 2), strict=True)
    ]
    for flops, nll in ((2e9, 3.9), (4e9, 3.6)):
        point = {
            "step": 1,
            "tokens": 1.0,
            "flops": flops,
            "seconds": 1.0,
            "nll": {"1": nll},
            "bits_per_byte": {"1": 1.0},
        }
        results[-1]["evaluations"].append({**point, "phase": "constant", "stretch": 1})
    found = tables.flops_to_reach(results, ["next_token"], budgets, 3.5)["next_token"]
    assert found["annealed"] == pytest.approx(10**9.5) and not found["at_most"]
    assert found["constant"] is None
    assert tables.flops_to_reach(results, ["next_token"], budgets, 3.75)["next_token"]["constant"] == pytest.approx(
        2e9 * math.sqrt(2)
    )
    # The end of the run was evaluated at 1.9 and scored at 2: what lies along it is read 0.1 higher.
    end = {"step": 2, "tokens": 2.0, "flops": 1e11, "seconds": 2.0, "nll": {"4": 1.9}, "bits_per_byte": {"4": 1.0}}
    results[-1]["evaluations"].append({**end, "phase": "end", "stretch": 1})
    assert tables.flops_to_reach(results, ["next_token"], budgets, 3.85)["next_token"]["constant"] == pytest.approx(
        2e9 * math.sqrt(2)
    )
    assert tables.flops_to_reach(results, ["next_token"], budgets, 4.5)["next_token"]["at_most"]
    assert tables.flops_to_reach(results, ["next_token"], budgets, 1.0)["next_token"]["annealed"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_continuations_are_those_of_the_generator() -> None:
    score = module("quality/score")
    model, _ = micro_model(micro_config("--objective.name", "next_token"))
    prompts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    ours = score.continue_prompts(model, prompts, k=2, new_tokens=6, temperature=0)

    def alone(index: int, temperature: float) -> list[int]:
        options = GenerationOptions(k=2, max_new_tokens=6, temperature=temperature)
        return [token for _, token in stream(model, [prompts[index].tolist()], options, requests=[index])]

    assert ours.tolist() == [alone(0, 0), alone(1, 0)]
    sampled = score.continue_prompts(model, prompts, k=2, new_tokens=6, temperature=1)
    assert sampled.tolist() == [alone(0, 1), alone(1, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks that need depth


def test_products_in_s5_are_compositions() -> None:
    tasks = module("reasoning/tasks")
    matrices = np.zeros((120, 5, 5), dtype=int)
    for number, permutation in enumerate(tasks.PERMUTATIONS):
        matrices[number, list(permutation), range(5)] = 1  # column x has its one in row p(x)
    every = np.einsum("aij,bjk->abik", matrices, matrices)
    assert (every == matrices[tasks.PRODUCT]).all()
    tokens, targets = tasks.TASKS["s5"].draw(Rng(0, 0), torch.arange(3), "train")
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        product = np.eye(5, dtype=int)
        for token, answer in zip(row, answers, strict=True):
            product = product @ matrices[token]
            assert (product == matrices[answer]).all()
    reached = {0}
    while len(new := reached | {int(tasks.PRODUCT[a, g]) for a in reached for g in tasks.GENERATORS}) > len(reached):
        reached = new
    assert len(reached) == 120
    generated, _ = tasks.TASKS["s5-generators"].draw(Rng(0, 0), torch.arange(3), "train")
    assert set(generated.flatten().tolist()) == set(tasks.GENERATORS)


def test_p_hop_answers_are_those_of_a_naive_chase() -> None:
    task = module("reasoning/tasks").PHop(length=40)
    tokens, targets = task.draw(Rng(0, 0), torch.arange(32), "train")
    seen = set()
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        hops = row[0] - task.none
        seen.add(hops)
        assert all(a != b for a, b in itertools.pairwise(row))
        for i in range(len(row)):
            place = i
            for _ in range(hops):
                earlier = [j for j in range(2, place + 1) if row[j - 1] == row[place]]
                place = max(earlier, default=0)
            assert answers[i] == (row[place] if place else task.none)
    assert seen == set(range(1, 9))
    groups = task.groups(tokens, targets)
    assert (sum(groups[str(hops)].int() for hops in range(1, 9)) == groups["all"].int()).all()
    assert not groups["all"][targets == task.none].any()


@pytest.mark.parametrize("name", ["s5", "s5-generators", "p-hop"])
def test_samples_are_a_function_of_seed_step_and_number(name: str) -> None:
    task = module("reasoning/tasks").TASKS[name]
    tokens, targets = task.draw(Rng(0, 3), torch.arange(5, 9), "train")
    alone = task.draw(Rng(0, 3), torch.tensor([7]), "train")
    assert torch.equal(tokens[2:3], alone[0]) and torch.equal(targets[2:3], alone[1])
    assert min(tokens.min(), targets.min()) >= 0
    assert max(tokens.max(), targets.max()) < task.vocab_size
    for rng, split in ((Rng(1, 3), "train"), (Rng(0, 4), "train"), (Rng(0, 3), "held-out")):
        assert not torch.equal(task.draw(rng, torch.arange(5, 9), split)[0], tokens)
    assert all(group.shape == targets.shape for group in task.groups(tokens, targets).values())


@pytest.mark.parametrize("arm", ["next_token", "unrolled-4-2", "denoise"])
def test_objectives_learn_the_targets_that_they_are_given(arm: str) -> None:
    """The first answer of a running product is the first token itself, not the token after it."""
    run, tasks = module("reasoning/run"), module("reasoning/tasks")
    task = tasks.RunningProduct(length=4, elements=range(16))
    task.ranges = {"1-1": (1, 1), "2-4": (2, 4)}
    options = "model.d_model=32 model.d_mlp=48 model.n_heads=2 model.d_condition=16"
    config = run.task_config(task, arm, options, 0, 1e-2, 4e9)
    objective, model = build_objective(config), build_model(config.model, 0)
    model.recurrence, model.document_mask = objective.recurrence, False
    before = run.accuracy(model, task, [1], 256, 1, torch.device("cpu"))
    spent = run.train(config, task, model, objective, 0, torch.device("cpu"))
    after = run.accuracy(model, task, [1, 4], 256, 2, torch.device("cpu"))
    assert 4e9 <= spent["flops"] < 4.4e9 and spent["tokens"] == 64 * spent["steps"]
    assert before["accuracy_by_k"]["1"]["1-1"] < 0.3
    assert after["accuracy_by_k"]["1"]["1-1"] > 0.95
    assert after["accuracy_by_position"]["1"][0] == pytest.approx(after["accuracy_by_k"]["1"]["1-1"], abs=1e-4)


@pytest.mark.usefixtures("jobs_start_at_once")
def test_reasoning_end_to_end(tmp_path: Path, script_here: Script) -> None:
    def call(*words: object) -> subprocess.CompletedProcess[str]:
        return script_here(
            "benchmarks/reasoning/compare.py", "--work", tmp_path / "work", "--results", tmp_path / "results",
            "--device", "cpu",
            "--options", "model.d_model=32 model.d_mlp=48 model.n_heads=2 model.d_condition=16", "--budget-flops", "3e8",
            "--rates", "1e-3", "--k", "1,2", "--samples", 64, "--jobs", 2, *words,
        )  # fmt: skip

    first = call("--tasks", "s5", "--arms", "next_token", "--seeds", "0")
    assert first.returncode == 0, first.stderr
    [path] = (tmp_path / "results/reasoning").iterdir()
    before = path.stat().st_mtime_ns
    second = call("--tasks", "s5,p-hop", "--arms", "next_token", "--seeds", "0")
    assert second.returncode == 0, second.stderr
    assert path.stat().st_mtime_ns == before
    merged = json.loads((tmp_path / "results/reasoning.json").read_text())["budgets"]["3e+08"]
    assert set(merged) == {"s5", "p-hop"}
    [seed] = merged["s5"]["arms"]["next_token"]["seeds"]
    assert set(seed["accuracy_by_k"]["2"]) == {"1-8", "9-16", "17-32", "9-32"}
    assert seed["learning_rate"] == 1e-3 and seed["flops"] >= 3e8
    assert "| next_token | 0.001 | 1 | 2 |" in second.stdout
    left = call("--tasks", "s5", "--arms", "next_token,denoise", "--minutes", 0)
    assert left.returncode == 0
    assert "Left: 2 runs" in left.stderr  # the other arm, and the first arm's second seed
    aged = json.loads(path.read_text())
    aged["identity"]["schedule"]["warmup"] = 0.5
    path.write_text(json.dumps(aged))
    for words, message in (
        ([], "another schedule.warmup (0.5, now "),
        (["--tasks", "chess"], "unknown task 'chess'"),
        (["--options", "optim.weight_decay=0.9"], "was made with"),
    ):
        told = call(*words)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
        assert message in told.stderr


def test_scoring_of_tasks_does_not_depend_on_the_batch() -> None:
    run, tasks = module("reasoning/run"), module("reasoning/tasks")
    task = tasks.RunningProduct(length=6)
    options = "model.d_model=32 model.d_mlp=48 model.n_heads=2 model.d_condition=16"
    config = run.task_config(task, "denoise", options, 0, 1e-2, 1e10)
    model = build_model(config.model, 0)
    model.recurrence, model.document_mask = build_objective(config).recurrence, False
    whole, parts = (run.accuracy(model, task, [1, 2], 64, 2, torch.device("cpu"), at_once=n) for n in (64, 24))
    assert whole["nll_by_k"] == pytest.approx(parts["nll_by_k"], rel=1e-4)
    assert whole["accuracy_by_position"]["1"] == pytest.approx(parts["accuracy_by_position"]["1"], abs=0.02)
    assert EVALUATION_STEP < 0  # held-out samples share no step with training
