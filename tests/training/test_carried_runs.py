"""Runs that carry states between steps: they learn, resume to the bit, go back, and do not depend on micro-batches."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MICRO, change_loss, micro_config, synthetic_data

from recurrent_db.config import load_config
from recurrent_db.data import Slots
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.training import trainer

CARRIED = ["--objective.name", "one_step", "--objective.one_step.state", "carried"]
FROM_THE_START = [*CARRIED, "--objective.one_step.next_token_share", "0"]
TIMES = {
    "seconds", "tokens_per_s", "mfu", "hfu", "peak_flops", "peak_memory_bytes", "optimizer_share",
    "memory/activations_bytes",
}  # fmt: skip


def train(data: Path, run: Path, *more: object, resume: str = "") -> Path:
    words = [*MICRO, "--data.path", str(data), "--run.dir", str(run), *map(str, more)]
    assert trainer.train(load_config(None, words), resume) == 0
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without times, and without what is measured where a run logs."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES and not key.startswith("state/")}
        for line in lines
    ]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(find_checkpoint(run))
    return {**checkpoint.weights(), **checkpoint.optimizer(), **checkpoint.slot_tensors(range(4))}


def assert_same_end(run: Path, other: Path) -> None:
    assert rows(run) == rows(other)
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def counters(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((find_checkpoint(run) / "state.json").read_text())["counters"]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path, dtype: str) -> None:
    """Cut before the iteration phase, at its first step, and in it."""
    options = [*CARRIED, "--objective.one_step.next_token_share", "0.5", "--budget.steps", 16, "--run.dtype", dtype,
               "--run.checkpoint_every", 1, "--run.keep", 16]  # fmt: skip
    whole = train(data, tmp_path / "whole", *options)
    assert (counters(whole)["visits"], counters(whole)["visits_start"]) == (3, 8)
    assert ["loss_visit_3" in row for row in rows(whole)] == [False] * 8 + [True] * 8
    for step in (5, 8, 11):
        run = Path(shutil.copytree(whole, tmp_path / f"cut-{step}"))
        for later in range(step + 1, 17):
            shutil.rmtree(run / f"checkpoints/step-{later:08d}")
        slots = run / f"checkpoints/step-{step:08d}/slots.safetensors"
        assert slots.exists() == (step > 8)
        assert_same_end(train(data, run, *options, resume="newest"), whole)


def test_the_states_are_those_that_the_checkpoint_says(data: Path, tmp_path: Path) -> None:
    found = tensors(train(data, tmp_path / "run", *FROM_THE_START, "--budget.steps", 6))
    positions = Slots(3, 0).positions(5, torch.arange(4).numpy(), 4)
    assert [found[f"held.{slot}"].tolist() for slot in range(4)] == [[0, int(p), v] for p, v in zip(
        positions, [3, 1, 2, 3], strict=True)]  # fmt: skip
    assert all(found[f"state.{slot}"].shape == (32, 32) for slot in range(4))


def test_micro_batches_change_nothing_but_rounding(data: Path, tmp_path: Path) -> None:
    ends = []
    for size in (4, 3, 1):
        run = train(data, tmp_path / str(size), *FROM_THE_START, "--budget.steps", 8, "--data.micro_batch_size", size)
        ends.append([(row["loss"], row["grad_norm"], row["loss_visit_1"], row["loss_visit_3"]) for row in rows(run)])
    for end in ends[1:]:
        for ours, theirs in zip(end, ends[0], strict=True):
            assert ours == tuple(one if one is None else pytest.approx(one, rel=1e-4) for one in theirs)


def test_a_return_to_a_checkpoint_restarts_the_states(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At steps 6 to 9 the loss is NaN with the first seed. The run goes back to step 4, and starts from zero there."""
    monkeypatch.setattr("recurrent_db.training.guard.MOST_SKIPPED", 4)
    change_loss(monkeypatch, lambda loss, rng: loss * math.nan if rng.seed == 0 and rng.step >= 6 else loss)
    options = [*FROM_THE_START, "--budget.steps", 12, "--run.checkpoint_every", 4, "--run.log_every", 2]
    whole = train(data, tmp_path / "whole", *options)
    assert [row["rollbacks"] for row in rows(whole)] == [0] * 4 + [1] * 8
    assert [row["loss_visit_2"] is None for row in rows(whole)[4:6]] == [True, False]
    assert rows(whole)[4]["loss_visit_1"] == pytest.approx(rows(whole)[4]["loss"])
    run = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(find_checkpoint(run))
    assert_same_end(train(data, run, *options, resume="newest"), whole)


def test_every_step_costs_one_pass(data: Path, tmp_path: Path) -> None:
    deep = [*FROM_THE_START, "--objective.one_step.prior_iterations", 3]
    runs = [train(data, tmp_path / "carried", *deep, "--budget.steps", 4),
            train(data, tmp_path / "flat", "--objective.name", "next_token", "--budget.steps", 4)]  # fmt: skip
    carried, flat = ([row["flops"] for row in rows(run)] for run in runs)
    assert carried == flat
    assert all(row["depth"] == 1 for row in rows(runs[0]))


def test_a_run_learns_every_iteration(tmp_path: Path) -> None:
    """A Markov chain. Held-out losses at each K fall, and evaluation starts from zero states as always."""
    data = synthetic_data(tmp_path / "data")
    run = train(data, tmp_path / "run", *FROM_THE_START, "--budget.steps", 150, "--optim.lr", "1e-2", "--eval.k", "1,2,3",
                "--eval.points", 3)  # fmt: skip
    for k in (1, 2, 3):
        nll = [row[f"eval/nll_k{k}"] for row in rows(run) if f"eval/nll_k{k}" in row]
        assert len(nll) == 3 and nll[-1] < nll[0] - 0.3, (k, nll)
    last = rows(run)[-1]
    assert last["loss_visit_3"] < math.log(micro_config().model.vocab_size or 300) - 1
    assert last["state_rms_visit_1"] > 0
