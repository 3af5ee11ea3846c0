"""What the report says about cost and state: its numbers are those of the metrics and of the evaluations."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import OBJECTIVES, fake_run, save
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recurrent_db.accounting.flops import Cost, cost_per_token, step_cost, total
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import build_objective
from recurrent_db.report.comparison import Comparison
from recurrent_db.report.cost import HOLDERS, energy, memory_by_holder, training_cost
from recurrent_db.report.figure import Panel, drawing, scientific
from recurrent_db.report.html import joules, memory
from recurrent_db.report.line_plots import LinePlots
from recurrent_db.report.runs import read_run
from recurrent_db.report.sections import flops_and_memory
from recurrent_db.report.sections.inference import state_by_iteration
from recurrent_db.report.sections.summary import summary
from recurrent_db.report.stacked_bars import HOLDER_HATCHES, flop_split, memory_split, worth_drawing
from recurrent_db.rng import Rng


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flop_split_adds_up_to_what_the_run_logged(three_runs: list[Path], objective: str) -> None:
    run = read_run(next(path for path in three_runs if path.name == objective), objective)
    cost, tokens = training_cost(run), run.last("tokens")
    assert tokens
    for kind in ("forward", "backward", "backward_weight", "recomputed", "causal"):
        logged = run.last(f"flops_{kind}")
        assert logged and sum(getattr(c, kind) for c in cost.values()) == pytest.approx(logged / tokens, rel=1e-9)


def test_what_the_recipes_steps_cost_is_what_their_rows_say(tmp_path: Path) -> None:
    """A run that went on with another budget ran other steps than its configuration would draw now."""
    run = read_run(fake_run(tmp_path / "run", "one_step"), "run")
    for row, depth in zip(run.rows, itertools.cycle((0.0, 1.0, 3.0)), strict=False):
        row["depth"] = depth
    run.rows = run.rows[: len(run.rows) // 3 * 3]
    each = (Passes(core_grad=0, injections_grad=1), Passes(core_grad=1), Passes(core_no_grad=2, core_grad=1))
    expected = sum(step_cost(run.config, passes).total for passes in each) / 3
    assert total(training_cost(run)).total == pytest.approx(expected)


def cells(section: str, name: str) -> list[str]:
    """The cells of a run's first row in a section, without markup."""
    rows = [row for row in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL) if f"<span>{name}</span>" in row]
    return [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", rows[0], re.DOTALL)]


def section(page: str, key: str) -> str:
    return next(part for part in page.split("<section ") if part.startswith(f'id="{key}"'))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flop_counts_are_those_of_the_metrics(page: str, three_runs: list[Path], objective: str) -> None:
    run = read_run(next(path for path in three_runs if path.name == objective), objective)
    last = run.rows[-1]
    law, whole, progress = build_objective(run.config), Cost(), 0.0
    for row in run.rows:
        whole += step_cost(run.config, law.passes(Rng(run.config.seed, row["step"] - 1), progress))
        progress = run.progress_at(row) or 0.0

    def each(column: str) -> str:
        return scientific(last[column] / last["tokens"])

    model, attention, causal, recomputed, update, logged = cells(section(page, "flops"), objective)
    assert model == logged == each("flops")
    assert attention == f"{whole.attention / whole.total:.1%}" != "0.0%"
    assert causal == each("flops_causal") != model
    assert recomputed.split("  ")[0].split(" +")[0] == each("flops_recomputed")
    assert recomputed.endswith(f"+ {last['flops_recomputed'] / last['flops']:.1%}")
    assert update == each("flops_update")


class Drawn(LinePlots):
    """Keeps what was drawn last."""

    figure: Figure

    def finish(self, figure: Figure, key: str, title: str, handles: list[Any] | None = None) -> Panel:
        self.figure = figure
        return super().finish(figure, key, title, handles)

    def widths(self, row: int, hatch: str | None) -> float:
        """Total width of a row's outlined pieces with one hatch."""
        bars = [p for p in self.figure.axes[0].patches if isinstance(p, Rectangle) and not p.get_fill()]
        return sum(p.get_width() for p in bars if round(p.get_y() + 0.31) == row and p.get_hatch() == hatch)


def test_recomputation_is_drawn_where_it_is_worth_it(tmp_path: Path) -> None:
    runs = [
        read_run(fake_run(tmp_path / name, "unrolled", steps=10), name) for name in ("plain", "checkpointed", "short")
    ]
    runs[1].config.run.activation_checkpointing = True
    runs[2].config.data.sequence_length = 16  # attention, and with it its scores, is nearly nothing
    costs = [training_cost(run) for run in runs]
    assert [worth_drawing(cost) for cost in costs] == [True, True, False]
    plots = Drawn(runs)
    with drawing():
        flop_split(plots, list(zip(runs, costs, strict=True)))
        for row, cost in enumerate(costs):
            whole = [total(cost).forward, total(cost).backward, total(cost).recomputed]
            assert [plots.widths(row, hatch) for hatch in (None, "////", "....")] == pytest.approx(whole)
        flop_split(plots, [(runs[2], costs[2])])
        assert plots.widths(0, "....") == 0
    for run, shown in ((runs[1], True), (runs[2], False)):
        html = flops_and_memory.flops(Comparison([run], {}))
        assert ("dotted: recomputed" in html, "below 1%" in html) == (shown, not shown)
    # Checkpointing runs the core and its adapter forward once more for each backpropagated iteration.
    model, length = runs[0].config.model, runs[0].config.data.sequence_length
    parts = cost_per_token(model, length, Passes(core_no_grad=1, core_grad=0))
    once = parts["core"].forward + parts["adapter"].forward
    grads = [build_objective(runs[0].config).passes(Rng(0, step), step / 10).core_grad for step in range(10)]
    assert total(costs[1]).recomputed - total(costs[0]).recomputed == pytest.approx(once * np.mean(grads))


def test_memory_bars_are_the_most_of_the_metrics(page: str, three_runs: list[Path]) -> None:
    runs = [read_run(path, path.name) for path in three_runs]
    splits = [memory_by_holder(run) for run in runs]
    for run, split in zip(runs, splits, strict=True):
        assert split == {holder: max(row[f"memory/{holder}_bytes"] for row in run.rows) for holder in HOLDERS}
        shown = [memory(value) if value else "–" for value in split.values()]
        peak = max(row["peak_memory_bytes"] for row in run.rows)
        assert cells(section(page, "memory"), run.name) == [*shown, memory(sum(split.values())), memory(peak)]
    assert splits[1]["activations"] > runs[1].rows[-1]["memory/activations_bytes"]  # not those of the last step
    plots = Drawn(runs)
    for peak, beyond in ((5e7, False), (4e9, True)):
        with drawing():
            memory_split(plots, [(run, split, peak) for run, split in zip(runs, splits, strict=True)])
        axes = plots.figure.axes[0]
        assert axes.get_xlabel() == "memory (MiB)"
        for row, split in enumerate(splits):
            for holder, hatch in HOLDER_HATCHES.items():
                assert plots.widths(row, hatch or None) == pytest.approx(split[holder] / 2**20)
        markers = [line for line in axes.lines if len(line.get_xdata())]
        assert len(markers) == 3 and {line.get_marker() for line in markers} == {">" if beyond else "D"}
        if not beyond:
            assert all(line.get_xdata()[0] == pytest.approx(peak / 2**20) for line in markers)
        assert [t.get_text() for t in axes.texts if "i" in t.get_text()[-3:]][-1] == memory(peak)
    with drawing():
        memory_split(plots, [(runs[0], dict.fromkeys(HOLDERS, 2.0**30), None)])
    assert plots.figure.axes[0].get_xlabel() == "memory (GiB)" and plots.widths(0, "xxxx") == 1


def test_energy_is_in_the_summary_when_it_was_logged(page: str, tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "gpu", steps=25, energy_per_token=0.0125), "gpu")
    used = energy(run)
    assert used is not None and used.per_token == pytest.approx(0.0125)  # by the reading of step 20, not of step 25
    assert used.joules == run.rows[19]["energy_joules"]
    html = summary(Comparison([run], {"unigram": 5.0}))
    assert cells(html, "gpu")[-1].split() == [*joules(used.joules).split(), "12.5", "mJ"]
    assert "Energy" in html and "Energy" not in section(page, "summary")
    assert [joules(v) for v in (3.6e6, 7.2e5, 5000, 2.5, 0.0013)] == ["1 kWh", "0.2 kWh", "5 kJ", "2.5 J", "1.3 mJ"]
    assert html.count("<td>") == 2 * 11  # the baseline's row has as many cells


def test_columns_of_every_run_are_not_the_objectives_own(page: str, three_runs: list[Path]) -> None:
    own = {path.name: read_run(path, path.name).own_columns() for path in three_runs}
    assert own == {"denoise": ["loss_sigma_max"], "unrolled": ["depth", "state_rms"], "next_token": []}
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", section(page, "throughput"))
    assert titles[:4] == [
        "Throughput", "Utilisation by the model (MFU)", "Utilisation with recomputation (HFU)", "Peak memory",
    ]  # fmt: skip


def test_state_norm_is_drawn_as_measured(page: str, three_runs: list[Path]) -> None:
    runs = {path.name: read_run(path, path.name) for path in three_runs}
    for names, scale, units in (
        (["unrolled"], "linear", "state's units"),
        (["denoise"], "linear", "target's units"),
        (["next_token"], "log", "state's units"),  # 1.4^32 spans more than a factor of 30
        (["denoise", "unrolled"], "linear", "own units"),
    ):
        plots = Drawn([runs[name] for name in names])
        with drawing():
            assert plots.state_by_iteration() is not None
        axes = plots.figure.axes[0]
        assert axes.get_yscale() == scale and axes.get_ylabel() == f"RMS per component ({units})"
        for name, line in zip(names, axes.lines, strict=True):
            written = json.loads((runs[name].path / "eval/depth_curve.json").read_text())["state_rms_by_iteration"]
            assert dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True)) == pytest.approx(
                {int(k): v for k, v in written.items()}
            )
    assert "For a denoiser (denoise) it is the size of the estimate" in section(page, "state")


def test_state_norm_damaged_or_missing(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=5)
    for table, expected in (
        ([0.5, 0.75], []),
        ({"2": 1, "1": None, "x": 3, "3": -1, "10": 4.0}, [(2, 1.0), (10, 4.0)]),
        ("nothing", []),
        (None, []),
    ):
        save(run, "depth_curve", {"by_k": {}, "state_rms_by_iteration": table, "state_is": "estimate"})
        assert read_run(run, "run").state_rms == expected
    loaded = [read_run(run, "run")]
    assert "Left out" in state_by_iteration(Comparison(loaded, {}))
