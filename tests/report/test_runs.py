"""What a report reads from a run directory."""

from __future__ import annotations

import json
from pathlib import Path

from fake_runs import fake_config, fake_run, save

from recurrent_db.config import load_config
from recurrent_db.report.runs import evaluations, merge_baselines, read_run, run_names


def test_an_end_before_the_rate_has_come_down_is_no_annealed_end(tmp_path: Path) -> None:
    """A run of 40 steps that was resumed at step 20 with a budget of 20 is complete, and halfway through its decay."""
    config = load_config(None, ["--budget.steps", "20", "--schedule.name", "cosine", "--schedule.warmup", "0"])
    spent = {"tokens": 1.0, "flops": 1.0, "seconds": 1.0}
    halfway = [
        {**spent, "step": n, "lr": config.optim.lr * (0.5 + (20 - n) / 40), "eval/nll_k1": 3.0} for n in (19, 20)
    ]
    assert [e.phase for e in evaluations(config, halfway)] == ["other", "other"]
    annealed = [{**row, "lr": 0.01 * config.optim.lr} for row in halfway]
    assert [e.phase for e in evaluations(config, annealed)] == ["other", "end"]


def test_scores_of_a_core_that_has_not_begun_are_of_no_phase() -> None:
    config = load_config(None, ["--budget.steps", "100", "--schedule.warmup", "0"])
    spent = {"tokens": 1.0, "flops": 1.0, "seconds": 1.0, "lr": config.optim.lr, "eval/nll_k1": 3.0}
    along = [{**spent, "step": n, "depth": float(n > 40)} for n in (20, 40, 60, 80)]
    found = evaluations(config, along)
    assert [e.phase for e in found] == ["other", "other", "constant", "constant"]
    assert found[2].stretch == found[3].stretch


def test_phases_come_from_the_schedule_and_the_rate(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "wsd", steps=100), "wsd")
    assert [e.phase for e in run.evaluations] == ["constant", "constant", "constant", "other", "end"]
    assert len({e.stretch for e in run.evaluations[:3]}) == 1
    cut = read_run(fake_run(tmp_path / "cut", steps=100, share=0.9), "cut")
    assert [e.phase for e in cut.evaluations] == ["constant", "constant", "constant", "other"] and not cut.complete

    rows = [{"step": s, "tokens": s, "flops": s, "seconds": s, "lr": 3e-3, "eval/nll_k1": 3.0} for s in (1, 50, 100)]
    rows[-1]["lr"] = 1e-5
    config = fake_config(steps=100)
    config.schedule.name, config.schedule.warmup = "cosine", 0.0
    assert [e.phase for e in evaluations(config, rows)] == ["other", "other", "end"]
    config.schedule.name, rows[-1]["lr"] = "constant", 3e-3
    assert [e.phase for e in evaluations(config, rows)] == ["constant"] * 3


def test_lm_eval_results_of_the_harness_are_read(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=20)
    results = {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.01}}
    for arguments, k in (("checkpoint=x,k=16", "16"), ({"k": 4}, "4"), ("checkpoint=x", "")):
        save(run, "lm_eval", {"results": results, "config": {"model_args": arguments}})
        assert read_run(run, "run").lm_eval == {k: results}
    save(run, "lm_eval", {"by_k": {"2": results}})
    assert read_run(run, "run").lm_eval == {"2": results}


def test_names_and_baselines(tmp_path: Path) -> None:
    assert run_names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert run_names([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert run_names([Path("a/x"), Path("a/x")]) == ["x (1)", "x (2)"]
    (tmp_path / "baselines.json").write_text(json.dumps({"unigram": 6.0, "bigram": 4.0}))
    assert merge_baselines([tmp_path / "run"], {"bigram": 3.5}) == {"bigram": 3.5, "unigram": 6.0}
