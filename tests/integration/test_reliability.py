"""Nothing is lost and nothing lies: kills, damaged files, numbers that blow up, long runs, equal bits."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import re
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MICRO, ROOT, change_loss
from safetensors.torch import load_file
from torch import Tensor

from recurrent_db.config import Config, load_config
from recurrent_db.data import open_data
from recurrent_db.data.shards import TokenData
from recurrent_db.errors import UserError
from recurrent_db.files import is_altered, locked, sealed
from recurrent_db.rng import Rng
from recurrent_db.store.folder import find_checkpoint, list_checkpoints
from recurrent_db.store.train_state import TrainState
from recurrent_db.training import trainer
from recurrent_db.training.guard import LossGuard, data_seed, unigram_entropy

TIMES = {"peak_flops", "seconds", "tokens_per_s", "mfu", "hfu", "peak_memory_bytes", "optimizer_share",
         "memory/activations_bytes"}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of benchmarks/reliability/ by name."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(ROOT))
        return importlib.import_module(f"benchmarks.reliability.{name}")

    return load


def configured(data: Path, run: Path, *more: object) -> Config:
    words = [*MICRO, "--data.path", data, "--run.dir", run, "--eval.points", 0, "--run.peak_flops", "1e10", *more]
    return load_config(None, [str(word) for word in words])


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {p.name: load_file(p) for p in sorted(find_checkpoint(run, fall_back=False).glob("*.safetensors"))}


def assert_equal(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, entries in first.items():
        assert entries.keys() == second[name].keys()
        assert all(torch.equal(value, second[name][key]) for key, value in entries.items()), name
    assert rows(a) == rows(b)


# ---------------------------------------------------------------------------------------------------------------------
# Kills, faults, long runs: the benchmarks


def test_five_moments_of_kill_9(benchmark: Any, tmp_path: Path) -> None:
    script = benchmark("resume")
    result = script.run(script.Args(moments=5, seed=1, workers=2), tmp_path)
    assert result["failures"] == []
    assert (result["tried"], result["survived"]) == (5, 5)


@pytest.mark.long
def test_a_hundred_moments_of_kill_9(benchmark: Any, tmp_path: Path) -> None:
    script = benchmark("resume")
    result = script.run(script.Args(moments=100, seed=2, workers=2), tmp_path)
    assert result["failures"] == []
    assert (result["tried"], result["survived"]) == (100, 100)


def test_the_torture_sees_a_difference(benchmark: Any) -> None:
    script = benchmark("resume")
    assert script._difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None
    assert script._difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b differs"
    assert script._difference({"a": 1}, {}) == "a differs"


def test_every_fault_is_detected(benchmark: Any, tmp_path: Path) -> None:
    script = benchmark("faults")
    result = script.run(script.Args(seed=1), tmp_path)
    assert result["failures"] == []
    assert result["injected"] == result["detected"] > 40


def test_a_short_run_keeps_its_memory_and_files(benchmark: Any, data: Path, tmp_path: Path) -> None:
    script = benchmark("endurance")
    result = script.measure(script.Args(data, steps=800, evaluations=4), tmp_path / "run", tmp_path)
    assert result["memory_ratio"] < 1.05
    assert result["turns"] > 0
    assert result["speed_ratio"] > 0
    assert result["open_files_end"] <= result["open_files_start"] + 1  # a file that is just being written


def test_the_page_holds_a_table_that_the_benchmarks_rewrite(benchmark: Any, tmp_path: Path) -> None:
    script = benchmark("reliability")
    found = script.read_rows()
    assert len(found) >= 10
    for line in found.values():
        assert re.fullmatch(
            r"\| [^|]+ \| [^|]*\d[^|]* \| `python benchmarks/[^|`]+` \| \d{4}-\d\d-\d\d, [^|]+ \|", line
        )
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    name = next(iter(found))
    script.write_rows({name: ("1 / 2 done", "python benchmarks/x.py"), "new": ("3", "python y")}, page)
    after = script.read_rows(page)
    assert list(after) == [*found, "new"]
    assert "1 / 2 done" in after[name]
    assert page.read_text().split(script.BEGIN)[0] == script.PAGE.read_text().split(script.BEGIN)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The lock, the seal


def _hold(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        signal.pause()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    assert holder.pid is not None
    with pytest.raises(UserError, match=f"in use by process {holder.pid} "), locked(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path):
        pass


def test_a_seal_sees_every_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(sealed({"format": 1, "step": 12, "files": {}}))
    assert not is_altered(path)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            seen = is_altered(path)
        except (ValueError, AttributeError, IndexError, TypeError):  # as `fault` has it: not readable
            seen = True
        assert seen, (bit, bytes(raw))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def blow_up(monkeypatch: pytest.MonkeyPatch, seed: int, stop: int = 0) -> None:
    """The loss is NaN from step 6 on, with the noise of ``seed`` alone; at step ``stop`` with other noise the process
    dies."""

    def change(loss: Tensor, rng: Rng) -> Tensor:
        if rng.seed != seed and rng.step == stop:
            raise KeyboardInterrupt
        return loss * math.nan if rng.seed == seed and rng.step >= 6 else loss

    change_loss(monkeypatch, change)


OPTIONS = ["--run.checkpoint_every", 4, "--run.log_every", 2, "--optim.ema_decay", 0.5]


@pytest.mark.parametrize("stop", [5, 7, 9, 13])
def test_a_run_goes_back_with_another_order_and_resumes_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: int
) -> None:
    monkeypatch.setattr("recurrent_db.training.guard.MOST_SKIPPED", 4)
    for name, at in (("whole", 0), ("cut", stop)):
        with monkeypatch.context() as patch:
            blow_up(patch, 0, at)
            config = configured(data, tmp_path / name, *OPTIONS, "--budget.steps", 16)
            if at:
                with pytest.raises(KeyboardInterrupt):
                    trainer.train(config)
                capsys.readouterr()
                patch.undo()
                blow_up(patch, 0)
            assert trainer.train(config, "newest" if at else "") == 0
    if stop < 8:
        assert "returning to step 4" in capsys.readouterr().err
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    written = rows(tmp_path / "whole")
    assert [row["step"] for row in written] == list(range(1, 17))
    assert [row["rollbacks"] for row in written] == [0] * 4 + [1] * 12
    assert written[-1]["skipped"] == 4
    counters = json.loads((find_checkpoint(tmp_path / "whole") / "state.json").read_text())["counters"]
    found = json.loads((tmp_path / "whole/diagnosis.jsonl").read_text().splitlines()[0])
    assert (found["step"], found["back_to"]) == (10, 4)
    assert found["not_finite"][0] == "loss"
    assert len(found["state_rms"]) == 2
    # Another order, and the undisturbed run's up to the return.
    trainer.train(configured(data, tmp_path / "plain", *OPTIONS, "--budget.steps", 16))
    plain, spent = ([row[key] for row in rows(tmp_path / "plain")] for key in ("loss", "flops"))
    assert counters["flops_abandoned"] == pytest.approx(spent[9] - spent[3])
    assert [row["loss"] for row in written[:4]] == plain[:4]
    assert [row["loss"] for row in written[4:]] != plain[4:]


def test_each_return_has_a_seed_of_its_own(data: Path, tmp_path: Path) -> None:
    config = configured(data, tmp_path / "run", "--budget.steps", 1)
    seeds = [data_seed(config, n) for n in range(4)]
    assert seeds[0] == config.seed
    assert len(set(seeds)) == 4


def judge(spike: float, losses: list[float]) -> tuple[list[bool], TrainState]:
    config = load_config(None, ["--guard.spike", str(spike)])
    watch, state = LossGuard(config, TrainState(), torch.device("cpu"), 5.0), TrainState()
    skips = [bool(watch.judge(torch.tensor(loss), torch.tensor(1.0))) for loss in losses]
    watch.settle(state)
    return skips, state


def test_spikes_are_skipped_when_asked_and_do_not_move_the_mean() -> None:
    losses = (3 + 0.1 * np.random.default_rng(0).standard_normal(200)).tolist()
    losses[20] = losses[100] = 9.0
    losses[150] = math.nan
    skips, state = judge(8.0, losses)
    assert [i for i, skip in enumerate(skips) if skip] == [100, 150]  # not before it knows what is usual
    assert (state.skipped, state.spikes, state.skipped_in_a_row, state.loss_count) == (2, 1, 0, 198)
    mean = variance = 0.0  # the same in plain arithmetic
    for n, loss in enumerate(one for i, one in enumerate(losses) if i not in (100, 150)):
        keep = min(n / (n + 1), 0.98)
        change = loss - mean
        mean, variance = mean + (1 - keep) * change, keep * (variance + (1 - keep) * change**2)
    assert (state.loss_mean, state.loss_variance) == pytest.approx((mean, variance), rel=1e-4)
    assert [i for i, skip in enumerate(judge(0.0, losses)[0]) if skip] == [150]


def warned(losses: list[float], floor: float, growth: float | None = 1.0) -> list[str]:
    config = load_config(None, [])
    watch, state, said = LossGuard(config, TrainState(), torch.device("cpu"), floor), TrainState(), []
    for step, loss in enumerate(losses, 1):
        watch.judge(torch.tensor(loss), torch.tensor(1.0))
        state.step = step
        if step % 10 == 0:
            watch.settle(state)
            said += watch.warnings(state, step / len(losses), growth)
    return said


def test_a_collapse_without_a_single_bad_number_is_warned_of() -> None:
    noise = 0.2 * np.random.default_rng(0).standard_normal(600)
    fall = 3 + 4 * np.exp(-np.arange(600) / 100) + noise
    assert warned(fall.tolist(), 6.4) == []
    collapse = np.where(np.arange(600) < 300, fall, 6.4 + noise)
    (line, *more) = warned(collapse.tolist(), 6.4)
    assert "the loss has risen from 3." in line
    assert "optim.lr" in line
    assert all("frequencies" in other for other in more)
    (line,) = warned((6.4 + np.exp(-np.arange(600) / 30) + noise).tolist(), 6.4)
    assert "not below the entropy of the target frequencies (6.40 nats)" in line
    (line,) = warned(fall.tolist(), 6.4, growth=12.0)
    assert "the state grows by a factor of 12" in line
    assert len(warned(fall.tolist(), 6.4, growth=math.nan)) == 1


def test_the_unigrams_entropy(data: Path) -> None:
    training = open_data(data, "train")
    ids = training.sources["default"].read(0, training.tokens)
    p = np.unique(ids, return_counts=True)[1] / len(ids)
    assert unigram_entropy(training) == pytest.approx(-(p * np.log(p)).sum())


def test_the_unigrams_entropy_follows_the_mixture() -> None:
    data = TokenData.from_arrays({"one": np.zeros(90, dtype=int), "two": np.ones(10, dtype=int)}, 2, 1)
    assert unigram_entropy(data) == pytest.approx(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)))
    assert unigram_entropy(data, {"one": 3.0, "two": 3.0}) == pytest.approx(np.log(2))
    assert unigram_entropy(data, {"one": 1.0}) == pytest.approx(0)


def test_a_rate_far_too_high_is_warned_of(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--objective.name", "next_token", "--budget.steps", 300, "--schedule.name", "constant"]
    trainer.train(configured(data, tmp_path / "good", *options, "--optim.lr", "1e-2"))
    assert "warning" not in capsys.readouterr().err
    trainer.train(configured(data, tmp_path / "bad", *options, "--optim.lr", "3"))
    assert re.search(r"warning: .*an optim\.lr below 3", capsys.readouterr().err)


def test_the_states_norms_are_logged(data: Path, tmp_path: Path) -> None:
    trainer.train(configured(data, tmp_path / "run", "--budget.steps", 4, "--run.log_every", 2))
    logged = [row.get("state/growth") for row in rows(tmp_path / "run")]
    assert [one is not None for one in logged] == [False, True, False, True]
    last = rows(tmp_path / "run")[-1]
    assert last["state/growth"] == pytest.approx(last["state/rms_last"] / last["state/rms_first"])


# ---------------------------------------------------------------------------------------------------------------------
# Equal bits


@pytest.mark.parametrize(
    "options",
    [["next_token"], ["unrolled"], ["one_step"], ["denoise_paper"],
     ["denoise"],
     ["denoise", "--objective.denoise.conditioning", "two-stream"], ["unrolled", "--optim.name", "muon"]],
    ids=lambda options: options[0] + options[-1].replace(options[0], ""),
)  # fmt: skip
def test_the_same_seed_gives_the_same_bits(data: Path, tmp_path: Path, options: list[str]) -> None:
    more = ["--budget.steps", 8, "--optim.ema_decay", 0.9, "--data.micro_batch_size", 2, "--objective.name", *options]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        trainer.train(configured(data, tmp_path / name, *more, "--seed", seed))
    assert_equal(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")
    assert len(list_checkpoints(tmp_path / "a")) == 1
