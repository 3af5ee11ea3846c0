"""The trainer: it learns, stops at its budget, survives kill -9, and answers mistakes in one line."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from helpers import MICRO, OBJECTIVES, HostReads, change_loss, synthetic_data
from safetensors.torch import load_file

import recurrent_db
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.huggingface.export import export
from recurrent_db.model import attention, build_model
from recurrent_db.objectives.one_step import OneStep
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.store.checkpoint import Checkpoint, load_checkpoint
from recurrent_db.store.folder import find_checkpoint, list_checkpoints
from recurrent_db.training import trainer

Run = Callable[..., subprocess.CompletedProcess[str]]
CUMULATIVE = {
    "tokens", "flops", "flops_forward", "flops_backward", "flops_backward_weight", "flops_recomputed", "flops_causal",
    "flops_update",
}  # fmt: skip
TIMES = {
    "peak_flops",
    "seconds",
    "tokens_per_s",
    "mfu",
    "hfu",
    "peak_memory_bytes",
    "optimizer_share",
    "memory/activations_bytes",
}
"""Columns that differ between equal runs. Activations are measured at a process's first step of each depth, and are fewer
where that step's sequences hold one document each."""


def words(data: Path, run: Path, *more: object) -> list[str]:
    return [*MICRO, "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def train(data: Path, run: Path, *more: object, resume: str = "", overwrite: bool = False) -> int:
    return trainer.train(load_config(None, words(data, run, *more)), resume, overwrite)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, Any]]:
    """All but times, and what is measured where a run logs (``state/*``)."""
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("state/")} for row in rows(run)]


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, optimizer state, averages and metrics of two runs are equal bit for bit."""
    first, second = find_checkpoint(a), find_checkpoint(b)
    assert first.name == second.name
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        assert (first / name).exists() == (second / name).exists()
        if not (first / name).exists():
            continue
        tensors, others = load_file(first / name), load_file(second / name)
        assert tensors.keys() == others.keys()
        for key in tensors:
            assert torch.equal(tensors[key], others[key]), f"{name}: {key}"
    assert without_times(a) == without_times(b)
    assert all(row[key] > 0 for row in without_times(b) for key in CUMULATIVE)


# ---------------------------------------------------------------------------------------------------------------------
# A run and what it leaves


def test_a_run_leaves_what_the_contract_names(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, "--objective.name", "denoise", "--budget.steps", 12, "--run.checkpoint_every", 4) == 0
    written = rows(run)
    assert [row["step"] for row in written] == list(range(1, 13))
    keys = "step tokens loss lr grad_norm tokens_per_s mfu hfu peak_memory_bytes seconds skipped"
    assert {*keys.split(), *CUMULATIVE} <= written[0].keys()
    assert written[-1]["flops"] == written[-1]["flops_forward"] + written[-1]["flops_backward"]
    assert written[-1]["eval/nll_k1"] > 0
    assert json.loads((run / "config.json").read_text())["objective"]["name"] == "denoise"
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "packages", "device", "git_commit", "command"} <= environment.keys()
    assert [p.name for p in list_checkpoints(run)] == ["step-00000008", "step-00000012"]  # the last two are kept
    model, tokenizer = recurrent_db.load(run, device="cpu")
    assert model.config.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("budget", "limit"), [("flops", 3e8), ("tokens", 2000), ("steps", 7)])
def test_a_run_ends_within_one_step_of_its_budget(
    data: Path, tmp_path: Path, objective: str, budget: str, limit: float
) -> None:
    train(data, tmp_path / "run", "--objective.name", objective, f"--budget.{budget}", limit, "--eval.points", 0)
    key = {"steps": "step"}.get(budget, budget)
    spent = [row[key] for row in rows(tmp_path / "run")]
    assert spent[-1] >= limit
    assert len(spent) == 1 or spent[-2] < limit


def test_the_seconds_budget_ends_a_run(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", "--budget.seconds", 0.3, "--eval.points", 0)
    assert rows(tmp_path / "run")[-1]["seconds"] >= 0.3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_held_out_loss_falls_on_real_text(data_dir: Path, tmp_path: Path, objective: str) -> None:
    run = tmp_path / "run"
    train(data_dir, run, "--objective.name", objective, "--budget.steps", 150, "--optim.lr", "1e-2", "--eval.points", 3,
          "--eval.k", 2 if objective == "unrolled" else 1)  # fmt: skip
    key = f"eval/nll_k{2 if objective == 'unrolled' else 1}"
    nll = [row[key] for row in rows(run) if key in row]
    assert len(nll) == 3
    assert nll[-1] < nll[0] - 0.1
    assert nll[-1] < math.log(512) - 0.7


def test_micro_batches_give_the_same_run(data: Path, tmp_path: Path) -> None:
    for objective in OBJECTIVES:
        ends = []
        for size in (4, 3, 1):
            run = tmp_path / f"{objective}-{size}"
            train(data, run, "--objective.name", objective, "--budget.steps", 4, "--data.micro_batch_size", size)
            ends.append([(row["loss"], row["grad_norm"]) for row in rows(run)])
        for other in ends[1:]:
            assert other == [pytest.approx(pair, rel=1e-4) for pair in ends[0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_in_bfloat16_follows_the_one_in_float32(data: Path, tmp_path: Path, objective: str) -> None:
    """Half precision is for the products: weights and their average stay float32, and losses differ by rounding alone."""
    options = ["--objective.name", objective, "--budget.steps", 12, "--optim.lr", "1e-2", "--optim.ema_decay", 0.9]
    for dtype in ("float32", "bfloat16"):
        train(data, tmp_path / dtype, *options, "--run.dtype", dtype)
    exact, rounded = ([row["loss"] for row in rows(tmp_path / dtype)] for dtype in ("float32", "bfloat16"))
    assert exact != rounded == pytest.approx(exact, rel=0.03)
    for name in ("model", "optimizer", "ema"):
        tensors = load_file(find_checkpoint(tmp_path / "bfloat16") / f"{name}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_training_starts_from_another_runs_weights(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "flat", "--objective.name", "next_token", "--budget.steps", 30, "--optim.lr", "1e-2")
    train(
        data,
        tmp_path / "tuned",
        "--objective.name",
        "denoise",
        "--budget.steps",
        1,
        "--init.from",
        tmp_path / "flat",
    )
    train(data, tmp_path / "fresh", "--objective.name", "denoise", "--budget.steps", 1)
    tuned, fresh = rows(tmp_path / "tuned")[0]["loss"], rows(tmp_path / "fresh")[0]["loss"]
    assert tuned < fresh - 0.5


def test_muon_learns_says_its_share_and_resumes_bit_for_bit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optim.name", "muon", "--objective.name", "next_token", "--optim.lr", "1e-2", "--budget.steps", 40,
               "--run.checkpoint_every", 20, "--run.log_every", 4, "--optim.ema_decay", 0.9]  # fmt: skip
    train(data, tmp_path / "whole", *options)
    share = re.search(r"update (\d+\.\d)% of the time; ", capsys.readouterr().err)
    assert share is not None
    shares = [row.get("optimizer_share") for row in rows(tmp_path / "whole")]
    assert [one is not None for one in shares] == [step % 4 == 0 for step in range(1, 41)]
    logged = [one for one in shares if one is not None]
    assert 0 < min(logged) <= float(share[1]) / 100 + 1e-3
    assert float(share[1]) / 100 - 1e-3 <= max(logged) < 1
    losses = [row["loss"] for row in rows(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(list_checkpoints(tmp_path / "cut")[-1])
    train(data, tmp_path / "cut", *options, resume="newest")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    state = load_file(find_checkpoint(tmp_path / "cut") / "optimizer.safetensors")
    assert "momentum_buffer/core.blocks.0.attn.qkv.weight" in state
    assert "exp_avg/embedding.weight" in state
    with pytest.raises(UserError, match=r"optim\.name was muon and is now adamw"):
        train(data, tmp_path / "cut", *options, "--optim.name", "adamw", resume="newest")


def test_adamws_share_is_logged_and_not_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(data, tmp_path / "run", "--budget.steps", 3)
    assert 0 < rows(tmp_path / "run")[-1]["optimizer_share"] < 1
    assert "of the time" not in capsys.readouterr().err


def test_the_average_of_the_weights_is_what_is_scored_and_loaded(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, "--objective.name", "next_token", "--budget.steps", 6, "--optim.ema_decay", 0.9)
    averaged, raw = (recurrent_db.load(run, "cpu", averaged=flag)[0] for flag in (True, False))
    assert not torch.equal(averaged.embedding.weight, raw.embedding.weight)
    shadow = load_file(find_checkpoint(run) / "ema.safetensors")
    assert torch.equal(averaged.embedding.weight, shadow["embedding.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


def start(data: Path, run: Path, *more: object) -> Any:
    """The trainer in a process of its own, a `multiprocessing.Process`."""
    return many.start(run.with_name("logs"), many.train, words(data, run, *more)).processes[0]


LONG_ENOUGH = ["--budget.steps", 120, "--run.checkpoint_every", 10, "--run.log_every", 3, "--optim.ema_decay", 0.9]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kill_9_then_resume_equals_an_uninterrupted_run(data: Path, tmp_path: Path, objective: str) -> None:
    options = ["--objective.name", objective, *LONG_ENOUGH]
    train(data, tmp_path / "whole", *options)
    run, moments = tmp_path / "killed", random.Random(objective)
    process, kills = start(data, run, *options), 0
    while kills < 2:
        before = list_checkpoints(run)[-1:] if run.exists() else []
        deadline = time.monotonic() + 300
        while process.exitcode is None and list_checkpoints(run)[-1:] == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        process = start(data, run, *options, "--resume")
    process.join(120)
    assert process.exitcode == 0
    assert kills >= 1
    assert_same_end(tmp_path / "whole", run)


def test_where_the_core_begins_to_run_averages_begin_anew(data: Path, tmp_path: Path) -> None:
    """The weights' average, and the loss that the next ones are held against."""
    recipe = ["--objective.name", "one_step", "--objective.one_step.next_token_share", 1, "--budget.steps", 150]
    watched = ["--optim.ema_decay", 0.99, "--guard.spike", 3, "--run.checkpoint_every", 60, "--run.keep", 3]
    train(data, tmp_path / "run", *recipe, *watched)
    written = rows(tmp_path / "run")
    assert [row["depth"] for row in written] == [0.0] * 60 + [1.0] * 90
    assert written[60]["flops"] - written[59]["flops"] > 1.2 * (written[59]["flops"] - written[58]["flops"])
    at, _, end = (Checkpoint(path) for path in list_checkpoints(tmp_path / "run"))
    assert [c.training()[2] for c in (at, end)] == [0, 90]  # updates of the average
    average = at.weights(averaged=True)
    assert all(torch.equal(value, average[name]) for name, value in at.weights(averaged=False).items())
    assert [c.training()[0].loss_count for c in (at, end)] == [0, 90 - (written[-1]["spikes"] - written[59]["spikes"])]
    # A run that goes back to there takes no moments along.
    model = build_model(at.config().model, 0)
    optimizer = build_optimizer(model, at.config().optim)
    load_checkpoint(end, model, optimizer, None)
    assert optimizer.state.keys() == set(model.parameters())
    load_checkpoint(at, model, optimizer, None)
    assert optimizer.state.keys() == set(model.parameters()) - set(model.core.blocks.parameters())


def test_a_run_whose_core_has_not_begun_says_so_and_starts_no_other(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--objective.name", "one_step", "--run.checkpoint_every", 2, "--run.keep", 9]
    train(data, tmp_path / "run", *options, "--budget.steps", 8)
    early = list_checkpoints(tmp_path / "run")[0]
    assert Checkpoint(early).training()[1] == {"core_runs": False}
    capsys.readouterr()
    recurrent_db.load(early)
    told = f"warning: {early} was saved in the skip-core phase: its core is untrained\n"
    assert capsys.readouterr().err == told
    export(early, tmp_path / "exported")
    assert capsys.readouterr().err == told
    recurrent_db.load(tmp_path / "run")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="was saved in the skip-core phase"):
        train(data, tmp_path / "next", *options, "--budget.steps", 8, "--init.from", early)

    # Continued with a budget of which more is spent than the core stays out for, its blocks start before the next step.
    for path in list_checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(path)
    grown, grow = [], OneStep.grow

    def watched(objective: OneStep, model: Any, progress: float) -> Any:
        result = grow(objective, model, progress)
        grown.append((progress, len(result) > 0))
        return result

    monkeypatch.setattr(OneStep, "grow", watched)
    train(data, tmp_path / "run", *options, "--budget.steps", 4, resume="newest")
    assert grown[0] == (0.5, True) and not any(did for _, did in grown[1:])
    assert [row["depth"] for row in rows(tmp_path / "run")][:3] == [0, 0, 1]


def test_sigterm_saves_and_ends_well(data: Path, tmp_path: Path) -> None:
    options = ["--objective.name", "next_token", "--run.checkpoint_every", 10_000, "--optim.ema_decay", 0.9,
               "--budget.steps", 150]  # fmt: skip
    process = start(data, tmp_path / "run", *options, "--run.log_every", 1)
    while not (tmp_path / "run/metrics.jsonl").exists() or not rows(tmp_path / "run"):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 0
    assert len(list_checkpoints(tmp_path / "run")) == 1
    assert len(rows(tmp_path / "run")) < 150
    train(data, tmp_path / "run", *options, resume="newest")
    train(data, tmp_path / "whole", *options)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_resume_without_a_checkpoint_starts_afresh(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", "--budget.steps", 2, resume="newest")
    assert len(rows(tmp_path / "run")) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that blow up


def broken_objective(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int]) -> None:
    """Make the loss of some steps NaN."""
    change_loss(monkeypatch, lambda loss, rng: loss * math.nan if rng.step in bad_steps else loss)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_objective(monkeypatch, {3, 4})
    config = load_config(None, words(data, tmp_path / "run", "--objective.name", "next_token", "--budget.steps", 8))
    assert trainer.train(config) == 0
    written = rows(tmp_path / "run")
    assert [row["skipped"] for row in written] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert written[3]["loss"] is None
    assert [row["flops"] for row in written] == pytest.approx([written[0]["flops"] * n for n in range(1, 9)])
    assert all(row["memory/optimizer_bytes"] > 0 for row in written)
    assert all(
        torch.isfinite(t).all() for t in load_file(find_checkpoint(tmp_path / "run") / "model.safetensors").values()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_skipped_steps_change_nothing_but_the_counters(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Weights, moments and average after [good, bad, good] are those of the two good steps: the flag is read on the
    device, where it must reach all of them."""
    options = ["--objective.name", "next_token", "--optim.ema_decay", 0.9, "--schedule.name", "constant",
               "--schedule.warmup", 0, "--optim.name", optimizer]  # fmt: skip
    saved = []
    for name, steps in (("good", 1), ("bad", 3)):
        broken_objective(monkeypatch, {1, 2} if name == "bad" else set())
        config = load_config(None, words(data, tmp_path / name, *options, "--budget.steps", steps))
        trainer.train(config)
        checkpoint = find_checkpoint(tmp_path / name)
        saved.append({f: load_file(checkpoint / f"{f}.safetensors") for f in ("model", "optimizer", "ema")})
    assert saved[0].keys() == saved[1].keys()
    for kind, tensors in saved[0].items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, saved[1][kind][key]), (kind, key)


@pytest.mark.parametrize("options", [["next_token"], ["unrolled"], ["denoise"],
    ["denoise", "--objective.denoise.conditioning", "two-stream"], ["denoise", "--optim.ema_decay", "0.9"],
    ["next_token", "--optim.name", "muon"]],
    ids=lambda o: o[-1])  # fmt: skip
def test_a_step_makes_the_host_wait_for_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Between log intervals no step reads a device value; the counts of a run of 4 steps and one of 12 are the same."""
    counts = []
    for steps in (4, 12):
        # Asked on a CPU alone, of ids that are there.
        monkeypatch.setattr(attention, "one_document_each", lambda docs_BS: False)
        read = {"tolist": 0, "cpu": 0, "numpy": 0}
        for name in read:
            original = getattr(torch.Tensor, name)

            def counting(
                tensor: torch.Tensor, *args: Any, name: str = name, original: Any = original, read: Any = read
            ) -> Any:
                read[name] += tensor.is_floating_point()  # whole numbers are sample indices and documents, on the CPU
                return original(tensor, *args)

            monkeypatch.setattr(torch.Tensor, name, counting)
        more = ["--objective.name", *options, "--budget.steps", steps, "--eval.points", 0, "--run.log_every", 100]
        with HostReads() as reads:
            train(data, tmp_path / f"run-{steps}", *more, "--run.checkpoint_every", 100)
        monkeypatch.undo()
        logged = len(rows(tmp_path / f"run-{steps}")[0]) * steps  # reading a row for the log comes after the last step
        counts.append((reads.count, read["cpu"], read["numpy"], read["tolist"] < logged))
    assert counts[0] == counts[1]
    assert counts[0][3]


def test_the_count_of_host_reads_sees_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HostReads() as reads:
        bool(torch.ones(()) > 0)
        torch.ones(3).nonzero()
    assert reads.count == 2


def test_a_run_of_bad_steps_stops_with_a_diagnosis(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_objective(monkeypatch, set(range(5, 100)))
    monkeypatch.setattr("recurrent_db.training.guard.MOST_SKIPPED", 4)
    options = ["--budget.steps", 50, "--run.checkpoint_every", 5, "--run.log_every", 3]
    config = load_config(None, words(data, tmp_path / "run", *options))
    with pytest.raises(UserError, match="stopped at step 9: loss or gradient not finite 4 steps in a row"):
        trainer.train(config)
    assert len(rows(tmp_path / "run")) == 9
    find_checkpoint(tmp_path / "run", fall_back=False)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: one line, status 2, nothing lost


def complain(script_here: Run, *arguments: object) -> str:
    result = script_here("train/pretrain.py", *arguments)
    assert result.returncode == 2, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["--model.n_heads", "3"], "not divisible"),
        (["--optim.name", "moun"], "optim.name"),
        (["--objective.unrolled.mean_depth", "0"], "above 0"),
        (["--objective.denoise.sigma_min", "9", "--objective.denoise.sigma_max", "3"], "must be below sigma_max"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--data.val_path", "nowhere"], "nowhere"),
        (["--run.dir", "/dev/null/run"], "/dev/null/run"),
        (["--run.device", "cuda:7"], "CUDA devices"),
        (["--run.device", "abacus"], "device 'abacus' is not supported: use cpu, cuda, cuda:N or auto"),
        (["--run.device", "mps"], "device 'mps' has no float64, so it is not supported"),
        (["--model.vocab_size", "7"], "below the tokenizer's"),
        (["--data.sequence_length", "32", "--data.mixture", "poems", "1"], "poems"),
        (["--init.from", "nowhere"], "no run directory"),
        (["--resume", "--overwrite"], "cannot be combined"),
        (["nofile.toml"], "no config file"),
    ],
)
def test_mistakes(script_here: Run, data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    first = options if options[0].endswith(".toml") else []
    assert message in complain(script_here, *first, *words(data, tmp_path / "run", "--budget.steps", 2),
                               *([] if first else options))  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key", "value"), [("", "seed", 1 << 64), ("run", "keep", 1.5), ("optim", "lr", math.nan)]
)
def test_a_configuration_that_cannot_be_read_again_is_not_trained(
    data: Path, tmp_path: Path, section: str, key: str, value: object
) -> None:
    config = load_config(None, words(data, tmp_path / "run", "--budget.steps", 1))
    setattr(getattr(config, section) if section else config, key, value)
    with pytest.raises(UserError, match=f"{key} must"):
        trainer.train(config)
    assert not (tmp_path / "run").exists()


def test_no_step_has_rate_0(data: Path, tmp_path: Path) -> None:
    """The budget ends early in the fourth step."""
    train(data, tmp_path / "run", "--budget.steps", 3.2)
    rates = [row["lr"] for row in rows(tmp_path / "run")]
    assert len(rates) == 4
    assert min(rates) > 0


def test_missing_settings_are_named(script_here: Run, data: Path, tmp_path: Path) -> None:
    assert "no budget is set" in complain(script_here, *words(data, tmp_path / "run"))
    assert "data.path is not set" in complain(script_here, "--run.dir", tmp_path / "run", "--budget.steps", 1)
    assert "run.dir is not set" in complain(script_here, "--data.path", data, "--budget.steps", 1)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_unless_told(script_here: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, "--budget.steps", 2)
    before = (run / "metrics.jsonl").read_bytes()
    assert "--resume or replace it with --overwrite" in complain(script_here, *words(data, run, "--budget.steps", 3))
    assert (run / "metrics.jsonl").read_bytes() == before
    train(data, run, "--budget.steps", 3, overwrite=True)
    assert len(rows(run)) == 3


def test_overwrite_touches_run_directories_only(script_here: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    message = complain(script_here, *words(data, tmp_path / "thesis", "--budget.steps", 2), "--overwrite")
    assert "not a run directory" in message
    assert (tmp_path / "thesis/chapter.txt").exists()


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(script_here: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, "--budget.steps", 2)
    before = sorted(path.name for path in run.rglob("*"))
    for bad in (["--init.from", "nowhere"], ["--data.path", "nowhere"], ["--model.vocab_size", 7]):
        complain(script_here, *words(data, run, "--budget.steps", 3, *bad), "--overwrite")
        assert sorted(path.name for path in run.rglob("*")) == before
    # Its own weights may be where the new run starts.
    train(data, run, "--budget.steps", 3, "--init.from", run, overwrite=True)
    assert len(rows(run)) == 3


def test_a_validation_split_too_short_is_found_before_training(script_here: Run, tmp_path: Path) -> None:
    data = synthetic_data(tmp_path / "data", tokens=160)  # 20 tokens held out, sequences of 32
    assert "too few" in complain(script_here, *words(data, tmp_path / "run", "--budget.steps", 2))
    assert not (tmp_path / "run").exists()


def test_several_processes_without_their_launcher_are_refused(
    script_here: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "started by torchrun" in complain(script_here, *words(data, tmp_path / "run", "--budget.steps", 2))


def test_a_name_too_long_is_one_line(script_here: Run, data: Path, tmp_path: Path) -> None:
    assert "too long" in complain(script_here, *words(data, tmp_path / ("x" * 300), "--budget.steps", 2))


def test_resume_refuses_another_model(script_here: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, "--budget.steps", 2)
    for option, value, message in (
        ("--model.d_mlp", 64, "model.d_mlp was 48 and is now 64"),
        ("--objective.name", "next_token", "objective.name was one_step and is now next_token"),
        ("--seed", 5, "seed was 0 and is now 5"),
    ):
        told = complain(script_here, *words(data, run, "--budget.steps", 4, option, value), "--resume")
        assert message in told
    train(data, run, "--budget.steps", 4, resume="newest")


def test_resume_refuses_another_tokenizer(script_here: Run, data: Path, data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, "--budget.steps", 2, "--model.vocab_size", 600)
    told = complain(script_here, *words(data_dir, run, "--budget.steps", 4, "--model.vocab_size", 600), "--resume")
    assert "different tokenizers" in told


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(
    script_here: Run, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run"
    options = ["--budget.steps", 6, "--run.checkpoint_every", 3]
    train(data, run, *options)
    newest = list_checkpoints(run)[-1]
    target = newest / "model.safetensors"
    content = bytearray(target.read_bytes())
    if damage == "truncate":
        target.write_bytes(content[:-100])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    elif damage == "remove":
        target.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    told = complain(script_here, *words(data, run, *options), "--resume")
    assert "is damaged" in told
    assert "--resume last-good" in told
    assert find_checkpoint(run).name == "step-00000003"  # other commands take the one before, and say so
    assert "is damaged" in capfd.readouterr().err
    train(data, tmp_path / "whole", *options)
    train(data, run, *options, resume="last-good")
    assert_same_end(tmp_path / "whole", run)  # and the damaged one was replaced
    assert find_checkpoint(run, fall_back=False).name == "step-00000006"


def test_a_damaged_shard_is_named(script_here: Run, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    shard = next(broken.glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert shard.name in complain(script_here, *words(broken, tmp_path / "run", "--budget.steps", 2))
    shard.write_bytes(content[:-10])
    assert shard.name in complain(script_here, *words(broken, tmp_path / "run", "--budget.steps", 2))


def test_a_full_disk_keeps_what_was_complete(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recurrent_db.store import checkpoint

    run, original, calls = tmp_path / "run", checkpoint.save_file, []

    def save_file(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*No space left on device"):
        train(data, run, "--budget.steps", 9, "--run.checkpoint_every", 3)
    monkeypatch.undo()
    assert [p.name for p in list_checkpoints(run)] == ["step-00000003"]
    assert not list((run / "checkpoints").glob(".writing-*"))
    train(data, run, "--budget.steps", 9, "--run.checkpoint_every", 3, resume="newest")
    assert rows(run)[-1]["step"] == 9


def test_help_names_every_section(script_here: Run) -> None:
    result = script_here("train/pretrain.py", "--help")
    assert result.returncode == 0
    for key in (
        "--seed",
        "--model.d-model",
        "--objective.name",
        "--data.path",
        "--budget.flops",
        "--run.dir",
        "--resume",
    ):
        assert key in result.stdout
