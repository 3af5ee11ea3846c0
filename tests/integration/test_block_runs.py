"""Runs of one block: alone, at once, stopped, continued and replaced; what is joined of them, and the benchmark."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from block_runs import launch_watched, options, train, weights
from helpers import ROOT, blocks_config

import recurrent_db
from recurrent_db.commands import repl
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import token_log_probabilities
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sequential import SequentialDecoder
from recurrent_db.huggingface.export import export
from recurrent_db.model import build_model
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives.denoise_blocks import noise_partition
from recurrent_db.repl.session import Session
from recurrent_db.repl.trace import table, trace
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.join_blocks import join


def test_processes_at_once_share_nothing_and_equal_one_after_another(
    quick_python: str, data: Path, frozen_runs: list[Path], tmp_path: Path
) -> None:
    trainers = launch_watched(quick_python, tmp_path, 2, options(data, 2, "--blocks.shared", "frozen"))
    for number, alone in enumerate(frozen_runs, 1):
        theirs = weights(tmp_path / "runs" / f"block-{number}")
        ours = weights(alone)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(("/runs/block-1/" in log) != ("/runs/block-2/" in log) for log in trainers)
    # The joined model holds each block's own bits, and scores and generates.
    joined = weights(tmp_path / "runs/joined")
    assert joined.keys() == weights(frozen_runs[0]).keys() | weights(frozen_runs[1]).keys()
    for alone in frozen_runs:
        assert all(torch.equal(value, joined[name]) for name, value in weights(alone).items())
    account = json.loads((tmp_path / "runs/joined/blocks.json").read_text())["blocks"]
    assert {number: block["alone"] for number, block in account.items()} == {"1": True, "2": True}
    assert all(block["flops"] > 0 and block["memory"]["parameters_bytes"] > 0 for block in account.values())


def test_blocks_of_an_owner_read_it_alone_and_equal_one_after_another(
    quick_python: str, data: Path, tmp_path: Path
) -> None:
    trainers = launch_watched(
        quick_python, tmp_path / "at once", 3, options(data, 3, "--blocks.shared", "owned", "--model.n_core", 3)
    )
    seen = sorted(sorted(set(re.findall(r"/runs/(block-\d)/", log))) for log in trainers)
    assert seen == [["block-1"], ["block-1", "block-2"], ["block-1", "block-3"]]
    for log in trainers:  # of the owner the others take its weights, which were complete before they began
        if re.search(r"/runs/block-[23]/", log):
            assert re.search(r"/runs/block-1/checkpoints/step-00000006/", log)
            assert not re.search(r"/runs/block-1/metrics.jsonl", log)
    owned = ["--blocks.shared", "owned", "--model.n_core", 3]
    for number in (1, 2, 3):  # in turn, in this process
        given = ["--init.from", tmp_path / "1"] if number > 1 else []
        assert train(data, tmp_path / str(number), 3, *owned, "--blocks.only", number, *given) == 0
        ours, theirs = weights(tmp_path / str(number)), weights(tmp_path / f"at once/runs/block-{number}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the launcher's processes in /proc")
def test_a_stopped_owner_stops_the_others_and_the_same_call_goes_on(
    quick_python: str, data: Path, tmp_path: Path
) -> None:
    """The default: block 1 trains the embedding. One block alone gets SIGTERM, not the launcher."""
    (tmp_path / "c.toml").write_text("")
    more = ["--budget.steps", 150, "--run.log_every", 1, "--run.checkpoint_every", 100]
    command = [
        str(ROOT / "train/launch/blocks.sh"),
        str(tmp_path / "c.toml"),
        str(tmp_path / "runs"),
        *options(data, 2, *more),
    ]
    environment = {**os.environ, "PYTHON": quick_python, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end, metrics = time.monotonic() + 300, tmp_path / "runs/block-1/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert launcher.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    [trainer] = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(trainer), signal.SIGTERM)
    _, said = launcher.communicate(timeout=300)
    assert (launcher.returncode, said) == (130, "block-1 was stopped; the same command continues\n")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"block-1", "block-1.log"}
    for _ in range(2):  # the second has nothing to do but to join
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert again.returncode == 0, again.stderr
    log = (tmp_path / "runs/block-2.log").read_text()
    assert "starting from" in log  # what the first call said is still there
    assert "nothing to do: at step 150" in log
    assert "stopped by signal" in (tmp_path / "runs/block-1.log").read_text()  # and stops no later call
    # An owner that would train further would leave the others behind: nothing starts.
    longer = [*command[:3], *options(data, 2, *more, "--budget.steps", 160)]
    told = subprocess.run(longer, env=environment, capture_output=True, text=True, timeout=300)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path}/runs/block-1 has budget left to train, but {tmp_path}/runs/block-2 was trained" in told.stderr
    assert find_checkpoint(tmp_path / "runs/block-1").name == "step-00000150"
    assert train(data, tmp_path / "one", 2, "--blocks.only", 1, *more) == 0
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, "--init.from", tmp_path / "one", *more) == 0
    joined, alone = weights(tmp_path / "runs/joined"), weights(tmp_path / "one") | weights(tmp_path / "two")
    assert joined.keys() == alone.keys()
    assert all(torch.equal(value, joined[name]) for name, value in alone.items())


def test_mistakes_in_a_launch_are_one_line_before_anything_trains(
    quick_python: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("")
    (tmp_path / "taken/joined").mkdir(parents=True)
    for folder, words, at_once, message in (
        ("runs", [], "0", "BLOCKS_AT_ONCE must be a whole number above 0, got 0"),
        ("runs", [], "two", "BLOCKS_AT_ONCE must be a whole number above 0, got two"),
        ("taken", [], "1", "taken/joined exists and is not a joined run"),
        ("runs", ["--init.from", tmp_path / "plain"], "1", "init.from needs blocks.shared = frozen"),
        ("runs", ["--blocks.shared", "all"], "1", "needs all blocks in one process"),
        ("runs", ["--model.n_blocks", 0, "--objective.name", "next_token"], "1", "is not a model in blocks"),
    ):
        environment = {**os.environ, "PYTHON": quick_python, "PYTHONPATH": str(ROOT), "BLOCKS_AT_ONCE": at_once}
        told = subprocess.run(
            [str(ROOT / "train/launch/blocks.sh"), str(tmp_path / "c.toml"), str(tmp_path / folder),
             *options(data, 2, *words)], env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
        assert message in told.stderr
        assert not (tmp_path / "runs").exists()


def test_the_joined_model_is_like_any_other(frozen_runs: list[Path], tmp_path: Path) -> None:
    join(frozen_runs, tmp_path / "joined")
    model, tokenizer = recurrent_db.load(tmp_path / "joined", "cpu")
    assert recurrent_db.generate(model, tokenizer, "ab", k=2, max_new_tokens=4, temperature=0.0)
    # What generation draws from its cache is what scoring gives without one.
    ids = torch.tensor([[20, 31, 42, 53, 64]])
    noise = NoiseSource(Rng(0, EVALUATION_STEP), torch.tensor([0]), model.config.max_seq_len)
    with torch.no_grad():
        [(_, whole)] = model.recurrence.hidden(model, ids, model.encode(ids), [2], noise)
        decoder = SequentialDecoder(model, [[20]], GenerationOptions(k=2, max_new_tokens=5))
        for position, token in enumerate([31, 42, 53, 64, 0]):
            step = decoder.logits()[0]
            torch.testing.assert_close(step, model.logits(whole)[0, position], rtol=1e-3, atol=1e-3)
            decoder.batch.append(0, token)
    config = Checkpoint(find_checkpoint(tmp_path / "joined")).config()
    assert config.blocks.only == 0


def test_lm_eval_and_the_repl_take_a_joined_model(
    frozen_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join(frozen_runs, tmp_path / "joined")
    model, tokenizer = recurrent_db.load(tmp_path / "joined", "cpu")
    harness = pytest.importorskip("recurrent_db.evaluation.lm_eval_model", reason="lm-eval is not installed")
    lm = harness.RecurrentDBLM(str(tmp_path / "joined"), k=2, draws=2, device="cpu")
    context, continuation = [20, 31, 42], [53, 64]
    [(total, _)] = lm._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    ids = torch.tensor([context + continuation])
    log_p = token_log_probabilities(
        model, ids[:, :-1], ids[:, 1:], [2], Rng(0, EVALUATION_STEP), torch.tensor([0]), draws=2
    )
    assert total < 0
    assert math.isfinite(total)
    assert abs(total - log_p[2][0, -2:].sum().item()) < 3  # other noise
    found = trace(model, context + continuation, 3, 4)
    assert found.log_p_NKV.shape[:2] == (3, 4)
    lines = table(found, 0, model, tokenizer)
    assert any(f"{noise_partition(blocks_config(n=2)).edges[1]:.3g}"[:4] in line for line in lines)
    session = Session(model, tokenizer, GenerationOptions(k=2, max_new_tokens=4))
    session.answer("ab")
    session.answer("/compare 1 2")
    assert capsys.readouterr().out


def test_a_block_alone_says_so_when_others_are_asked_for(frozen_runs: list[Path]) -> None:
    model, tokenizer = recurrent_db.load(frozen_runs[0], "cpu")
    recurrent_db.generate(model, tokenizer, "ab", k=1, max_new_tokens=2)  # the first is a model at sigma_max
    model, tokenizer = recurrent_db.load(frozen_runs[1], "cpu")
    with pytest.raises(UserError, match="holds only block 2 of 2"):
        recurrent_db.generate(model, tokenizer, "ab", k=2, max_new_tokens=2)
    for run, k in ((frozen_runs[1], 1), (frozen_runs[0], 2)):
        with pytest.raises(UserError, match=r"holds only block . of 2"):
            repl.run(repl.Args(run, k=k, device="cpu"))


def test_a_model_in_blocks_is_not_exported(frozen_runs: list[Path], tmp_path: Path) -> None:
    join(frozen_runs, tmp_path / "joined")
    with pytest.raises(UserError, match="model in blocks, which cannot be exported"):
        export(tmp_path / "joined", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_block_is_stopped_continued_and_replaced(data: Path, frozen_runs: list[Path], tmp_path: Path) -> None:
    frozen = ["--blocks.only", 2, "--blocks.shared", "frozen", "--seed", 0, "--optim.lr", 1e-3]
    assert train(data, tmp_path / "whole", 2, *frozen, "--run.checkpoint_every", 3) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "two")
    shutil.rmtree(find_checkpoint(tmp_path / "two"))  # as if it had been killed after the third step
    assert find_checkpoint(tmp_path / "two").name == "step-00000003"
    assert train(data, tmp_path / "two", 2, *frozen, "--run.checkpoint_every", 3, resume="newest") == 0
    resumed, whole = weights(tmp_path / "two"), weights(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    join(frozen_runs, tmp_path / "joined")
    join([tmp_path / "joined", tmp_path / "whole"], tmp_path / "again")
    again, before = weights(tmp_path / "again"), weights(tmp_path / "joined")
    for name, value in again.items():
        assert torch.equal(value, whole[name] if name.startswith("blocks.2.") else before[name])
    account = json.loads((tmp_path / "again/blocks.json").read_text())["blocks"]
    assert [account[number]["run"] for number in "12"] == [str(frozen_runs[0]), str(tmp_path / "whole")]
    join([frozen_runs[0], tmp_path / "two"], tmp_path / "again", overwrite=True)
    assert torch.equal(weights(tmp_path / "again")["blocks.2.final_norm.weight"], resumed["blocks.2.final_norm.weight"])


def test_the_owner_of_the_embedding_is_trained_first(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "one", 2, "--blocks.only", 1) == 0
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, "--init.from", tmp_path / "one") == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert torch.equal(one["embedding.weight"], two["embedding.weight"])
    start = build_model(
        load_config(None, options(data, 2, "--model.vocab_size", len(one["embedding.weight"]))).model, 0
    )
    assert not torch.equal(one["embedding.weight"], start.embedding.weight)
    # The memory of a block: nothing of the other, and no moments for a table that is not trained.
    assert not any(name.startswith("blocks.1.") for name in two)
    moments = Checkpoint(find_checkpoint(tmp_path / "two")).optimizer()
    assert not any("embedding.weight" in name.split("/")[1].split(".noise_")[0] and name.endswith("/embedding.weight")
                   for name in moments)  # fmt: skip
    account = join([tmp_path / "two", tmp_path / "one"], tmp_path / "joined")["blocks"]
    assert (account["1"]["bytes_read_before_training"], account["1"]["trains_shared"]) == (0, True)
    assert account["2"]["bytes_read_before_training"] == one["embedding.weight"].numel() * 4
    # One that was stopped is used, and what follows from it is said.
    assert train(data, tmp_path / "half", 2, "--blocks.only", 1, "--run.checkpoint_every", 3) == 0
    shutil.rmtree(find_checkpoint(tmp_path / "half"))
    capsys.readouterr()
    assert train(data, tmp_path / "after", 2, "--blocks.only", 2, "--init.from", tmp_path / "half") == 0
    assert "; that run used 50% of its budget and must not be trained further\n" in capsys.readouterr().err
    # An owner that was trained anew no longer fits.
    assert train(data, tmp_path / "anew", 2, "--blocks.only", 1, "--seed", 1) == 0
    with pytest.raises(UserError, match="shared embedding differs"):
        join([tmp_path / "two", tmp_path / "anew"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    # Unless it left the table as the other has it.
    kept = ["--blocks.shared", "frozen", "--init.from", tmp_path / "two"]
    assert train(data, tmp_path / "kept", 2, "--blocks.only", 1, *kept, "--seed", 1) == 0
    account = join([tmp_path / "joined", tmp_path / "kept"], tmp_path / "replaced")["blocks"]
    assert account["1"]["run"] == str(tmp_path / "kept")
    joined, before, name = (
        weights(tmp_path / "replaced"),
        weights(tmp_path / "joined"),
        "blocks.1.core.blocks.0.attn.qkv.weight",
    )
    assert torch.equal(joined[name], weights(tmp_path / "kept")[name])
    assert not torch.equal(joined[name], before[name])
    assert all(torch.equal(joined[other], before[other]) for other in joined if not other.startswith("blocks.1."))
    with pytest.raises(UserError, match="block 1 does: give the run of block 1"):
        train(data, tmp_path / "lone", 2, "--blocks.only", 2)
    # Nor does one that went on: what it left behind is found out before the other trains further.
    further = ["--budget.steps", 8, "--init.from", tmp_path / "one"]
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, *further, resume="newest") == 0
    assert train(data, tmp_path / "one", 2, "--blocks.only", 1, "--budget.steps", 8, resume="newest") == 0
    with pytest.raises(UserError, match=r"one was trained after block 2 had taken its embedding; train block 2 again"):
        train(data, tmp_path / "two", 2, "--blocks.only", 2, "--budget.steps", 9, *further[2:], resume="newest")
    assert len(list((tmp_path / "two/checkpoints").glob("step-00000009"))) == 0


def test_a_block_takes_of_another_run_what_it_has_a_place_for(
    data: Path, frozen_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join(frozen_runs, tmp_path / "joined")
    source = Checkpoint(find_checkpoint(tmp_path / "joined"))
    kept = source.weights(keep=lambda name: name.startswith("blocks.2."))
    assert kept
    assert kept.keys() == {name for name in source.weights() if name.startswith("blocks.2.")}
    still = ["--blocks.only", 2, "--blocks.shared", "frozen", "--optim.lr", 1e-12]
    for name, seed in (("again", 0), ("anew", 7)):
        given = tmp_path / "joined" if name == "again" else frozen_runs[0]
        assert train(data, tmp_path / name, 2, *still, "--init.from", given, "--seed", seed) == 0
    said = capsys.readouterr().err
    assert f"starting from {source.path}: its embedding, block 2\n" in said
    assert ": its embedding; block 2 is newly initialised\n" in said
    name = "blocks.2.core.blocks.0.attn.qkv.weight"
    again, anew, two = (weights(run)[name] for run in (tmp_path / "again", tmp_path / "anew", frozen_runs[1]))
    torch.testing.assert_close(again, two, rtol=0, atol=1e-8)
    assert (anew - two).abs().max() > 0.05
    plain = ["--model.n_blocks", 0, "--objective.name", "next_token", "--objective.denoise.grid", "edges"]
    assert train(data, tmp_path / "short", 2, *plain, "--model.n_core", 2) == 0
    with pytest.raises(UserError, match="has 2 layers, but this model has 4 in blocks"):
        train(data, tmp_path / "bad", 2, *still, "--init.from", tmp_path / "short")


def test_a_plain_model_becomes_blocks(data: Path, tmp_path: Path) -> None:
    plain = ["--model.n_blocks", 0, "--objective.name", "next_token", "--objective.denoise.grid", "edges"]
    assert train(data, tmp_path / "plain", 2, *plain) == 0
    before = weights(tmp_path / "plain")
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, "--init.from", tmp_path / "plain", "--blocks.shared",
                 "frozen", "--optim.lr", "1e-12") == 0  # fmt: skip
    after = weights(tmp_path / "two")
    for ours, theirs in (("embedding.weight", "embedding.weight"), ("blocks.2.final_norm.weight", "final_norm.weight"),
                         ("blocks.2.core.blocks.1.attn.qkv.weight", "core.blocks.3.attn.qkv.weight")):  # fmt: skip
        torch.testing.assert_close(after[ours], before[theirs], rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

SMALL = (
    "model.d_model=32 model.n_heads=2 model.d_mlp=48 model.d_condition=16 model.max_seq_len=32 data.sequence_length=32"
    " data.batch_size=4"
)


def test_a_blocks_memory_is_that_of_its_layers(
    script_here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    result = script_here("benchmarks/paper/blocks.py", "--memory", "--options", SMALL, "--results", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "blocks-memory.json").read_text())["rows"]}
    assert rows["B = 1, block 1"]["ratio"] == 1
    for number in (1, 2):
        assert rows[f"B = 4, block {number}"]["rest_ratio"] <= 0.33
        assert rows[f"B = 4, block {number}"]["rest_ratio"] < rows[f"B = 2, block {number}"]["rest_ratio"] <= 0.6
    assert rows["B = 2, block 1"]["tables_bytes"] == 4 * rows["B = 2, block 2"]["tables_bytes"] == 4 * 1024 * 32 * 4


def test_the_comparison_asks_for_its_judge_before_it_trains(
    script_here: Callable[..., subprocess.CompletedProcess[str]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    places = ["--work", tmp_path / "work", "--results", tmp_path / "results", "--data", data]
    told = script_here("benchmarks/paper/blocks.py", *places, "--judge", tmp_path / "nowhere")
    assert told.returncode == 2
    assert told.stderr.strip() == (
        f"error: --judge {tmp_path}/nowhere is not a run directory with a checkpoint (make one with eval/train_judge.py)"
    )
    assert not (tmp_path / "work").exists()


@pytest.mark.long
def test_the_comparison_runs_and_goes_on(
    script: Callable[..., subprocess.CompletedProcess[str]], data: Path, tmp_path: Path
) -> None:
    places = ["--work", tmp_path / "work", "--results", tmp_path / "results", "--data", data, "--device", "cpu"]
    sizes = ["--seeds", 0, "--budget-flops", 2e8, "--score-tokens", 512, "--draws", 2]
    words = ["benchmarks/paper/blocks.py", *places, *sizes, "--options", SMALL]
    first = script(*words, "--arms", "next_token,blocks-4")
    assert first.returncode == 0, first.stderr
    whole = script(*words, "--arms", "next_token,blocks-4,blocks-4-swap,masked-3")
    assert whole.returncode == 0, whole.stderr
    assert "start blocks-4-seed0" not in whole.stderr  # it is done
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results/blocks").glob("*.json")}
    assert set(results) == {f"{arm}-seed0" for arm in ("next_token", "blocks-4", "blocks-4-swap", "masked-3")}
    swapped, before = results["blocks-4-swap-seed0"], results["blocks-4-seed0"]
    assert swapped["nll_by_k"]["1"] == before["nll_by_k"]["1"]
    assert swapped["nll_by_k"]["4"] != before["nll_by_k"]["4"]
    assert len(before["blocks"]) == 4
    assert results["masked-3-seed0"]["bits_per_character"] > 0
    wrong = script(*words, "--arms", "next_token", "--draws", 3)
    assert wrong.returncode == 2
    assert "another draws" in wrong.stderr
