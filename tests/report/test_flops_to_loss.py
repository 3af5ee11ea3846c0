"""FLOPs to reach a held-out NLL."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import fake_run

from recurrent_db.report.flops_to_loss import Reached, choose_levels, reached_at_constant_rate, reached_at_end
from recurrent_db.report.runs import Evaluation, read_run


def point(flops: float, nll: float, phase: str = "constant", stretch: int = 0) -> Evaluation:
    return Evaluation(1, 1.0, flops, 1.0, {1: nll + 1, 4: nll}, {}, phase, stretch)  # type: ignore[arg-type]


def test_flops_to_reach_is_interpolated_in_log_flops_at_the_constant_rate() -> None:
    points = [point(1e12, 5.0), point(1e14, 3.0), point(1e15, 3.5), point(1e16, 2.5)]
    halfway = reached_at_constant_rate(points, 4.0)  # halfway in NLL is halfway in log FLOPs: 1e13
    assert halfway is not None and halfway.flops == pytest.approx(1e13) and not halfway.at_most
    again = reached_at_constant_rate(points, 3.25)  # the first crossing, not the later one
    assert again is not None and again.flops == pytest.approx(1e12 * 100**0.875)
    later = reached_at_constant_rate(points, 2.75)  # 3/4 of the way from 1e15 to 1e16
    assert later is not None and later.flops == pytest.approx(10**15.75)
    assert reached_at_constant_rate(points, 2.4) is None
    assert reached_at_constant_rate(points, 6.0) == Reached(1e12, at_most=True)
    assert reached_at_constant_rate([], 6.0) is None


def test_flops_to_reach_never_mixes_annealed_and_constant() -> None:
    points = [point(1e12, 5.0), point(2e12, 3.2, "other", 1), point(1e13, 3.0, "end", 2)]
    assert reached_at_constant_rate(points, 4.0) is None
    assert reached_at_end(points, 4.0) == Reached(1e13, at_most=True)
    assert reached_at_end(points, 2.9) is None
    # A second stretch at the peak rate, after an annealed one, is not joined to the first.
    resumed = [point(1e12, 5.0, "constant", 3), point(1e13, 3.0, "constant", 9)]
    assert reached_at_constant_rate(resumed, 4.0) == Reached(1e13, at_most=True)


def test_levels_are_round_and_within_what_was_reached(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", steps=100), "run")
    levels = choose_levels([run])
    counted = [e.best_nll for e in run.evaluations if e.phase != "other"]
    assert 3 <= len(levels) <= 8 and levels == sorted(levels, reverse=True)
    assert min(counted) <= levels[-1] and levels[0] <= max(counted)
    assert all(round(level, 2) == level for level in levels)
    run.evaluations = [point(1e12, 3.017, "end")]
    assert choose_levels([run]) == [3.05]
    run.evaluations = []
    assert choose_levels([run]) == []
