"""Benchmarks and reports at a size of seconds: they end, they resume, and they print what they measured."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from helpers import MICRO, OBJECTIVES, ROOT, batch, load_script, micro_config, micro_model, synthetic_data

from recurrent_db.accounting.flops import cache_numbers_per_token, cost_per_token, total
from recurrent_db.arguments import parse
from recurrent_db.config import load_config
from recurrent_db.data import Batch, open_data, validation_batches
from recurrent_db.denoise.noise import GRIDS
from recurrent_db.evaluation.likelihood import token_log_probabilities
from recurrent_db.model import build_model
from recurrent_db.model.looped import STATE_STD
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.recurrence.loop import truncated_normal
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.report.cost import memory_by_holder, training_cost
from recurrent_db.report.runs import read_run
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.loading import load_with_config
from recurrent_db.training import trainer

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of each objective and of two kinds of denoiser."""
    folder = tmp_path_factory.mktemp("runs")
    synthetic_data(folder / "data")
    kinds = {name: ["--objective.name", name] for name in OBJECTIVES}
    kinds["two-stream"] = ["--objective.name", "denoise", "--objective.denoise.conditioning", "two-stream"]
    for name, options in kinds.items():
        words = [*MICRO, *options, "--data.path", str(folder / "data"), "--run.dir", str(folder / name)]
        trainer.train(load_config(None, [*words, "--budget.steps", "60", "--optim.lr", "1e-2"]))
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_html_report_knows_every_column_that_the_trainer_logs(folder: Path, name: str) -> None:
    run, metrics = read_run(folder / name, name), set()
    model, objective = micro_model(micro_config("--objective.name", name))
    with torch.no_grad():
        for step in range(60):
            metrics |= objective(model, batch(), Rng(0, step), step / 60)[1].keys()
    assert set(run.own_columns()) <= metrics
    held, cost, tokens = memory_by_holder(run), total(training_cost(run)), run.last("tokens")
    assert held is not None and tokens is not None
    assert held["parameters"] > 0 and held["activations"] == run.most("memory/activations_bytes")
    assert cost.causal == pytest.approx((run.last("flops_causal") or 0) / tokens)
    assert cost.recomputed == pytest.approx((run.last("flops_recomputed") or 0) / tokens)


@pytest.mark.parametrize("name", [*OBJECTIVES, "two-stream"])
def test_denoiser_report(folder: Path, script_here: Run, name: str) -> None:
    result = script_here(
        "eval/diagnostics/denoiser_report.py", folder / name, "--data", folder / "data", "--control", folder / "next_token",
        "--k", "1,3", "--draws", "1,2", "--tokens", "512", "--device", "cpu", "--sigmas", "4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / name / "eval/denoiser_report.json").read_text())
    keys = "nll_by_sigma nll_sigma_max sigma_star share_below_sigma_star context_gap state_gap walk_entropy nll_by_k"
    assert set(keys.split()) <= report.keys()
    assert (folder / name / "eval/denoiser_report.png").stat().st_size > 10_000
    assert report["context_gap"] < -0.1  # a Markov chain's next token needs its context
    assert len(report["walk_entropy"]) == 3
    assert all(0 <= entropy < math.log(300) + 1e-6 for entropy in report["walk_entropy"])
    if name in ("denoise", "two-stream"):
        nlls = [point["nll"] for point in report["nll_by_sigma"]]
        assert nlls[0] < nlls[-1]  # low noise shows the answer
        assert set(report["nll_by_k"]["3"]) == {"1", "2"}
    else:
        assert report["nll_by_sigma"] is None
    if name == "next_token":
        assert report["nll_by_k"]["1"]["1"]["nll"] == pytest.approx(report["nll_control"])


def test_the_report_counts_what_the_state_is_worth(folder: Path) -> None:
    """Zeros in place of a zero state change nothing; zeros in place of a state that is read do."""
    script = load_script("eval/diagnostics/denoiser_report.py")
    from recurrent_db.data import open_data, validation_batches
    from recurrent_db.store.loading import load

    batches = list(validation_batches(open_data(folder / "data", "validation"), 32, 4, 256))
    model, _ = load(folder / "next_token", "cpu")
    gap = script.Probes(model, batches, 0).state_gap(1)
    assert gap["zeros"] == pytest.approx(0, abs=1e-9)
    assert abs(gap["noise"]) > 1e-3


def test_depth_curve(folder: Path, script_here: Run) -> None:
    out = folder / "curve.json"
    result = script_here(
        "eval/depth_curve.py", folder / "denoise", "--data", folder / "data", "--k", "4,1", "--draws", "2",
        "--tokens", "256", "--json", out, "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    curve = json.loads(out.read_text())
    assert list(curve["by_k"]) == ["1", "4"]
    assert {"nll", "bits_per_byte", "stderr", "flops_per_token"} <= curve["by_k"]["1"].keys()
    assert (curve["draws"], curve["tokens"], curve["sigma"]) == (2, 256, 20.0)
    assert curve["state_is"] == "estimate"
    assert list(curve["state_rms_by_iteration"]) == ["1", "2", "3", "4"]
    assert all(rms > 0 for rms in curve["state_rms_by_iteration"].values())
    bound = script_here(
        "eval/depth_curve.py", folder / "denoise", "--data", folder / "data", "--k", "4,1", "--draws", "2",
        "--tokens", "256", "--json", out, "--device", "cpu", "--likelihood", "bound",
    )  # fmt: skip
    assert bound.returncode == 0, bound.stderr
    weighed = json.loads(out.read_text())
    assert weighed["likelihood"] == "bound"
    assert weighed["by_k"]["1"]["nll"] == pytest.approx(curve["by_k"]["1"]["nll"], abs=1e-5)
    assert (
        abs(weighed["by_k"]["4"]["nll"] - curve["by_k"]["4"]["nll"]) > 1e-4
    )  # which of them is larger is not the program's
    for words, message in (
        (["--k", "0"], "--k must be 1 or more"),
        (["--k", "one"], "whole numbers"),
        (["--draws", "0"], "must be 1 or more"),
        (["--tokens", "-5"], "must be 0 or more"),
        (["--json", folder / "denoise/config.json/x.json"], "cannot write"),
    ):
        told = script_here("eval/depth_curve.py", folder / "denoise", "--data", folder / "data", *words)
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
        assert message in told.stderr


def test_levels_of_a_walk(folder: Path, script_here: Run) -> None:
    """The first level is the read-out at sigma_max; the run's shares sum to its bound; the closed form's to its
    likelihood at sigma_max, since it is exact and needs no network at other levels."""
    out, curve = folder / "levels.json", folder / "bound.json"
    common = folder / "denoise", "--data", folder / "data", "--tokens", "512", "--device", "cpu", "--json"
    result = script_here("eval/diagnostics/walk_levels.py", *common, out, "--k", "5")
    assert result.returncode == 0, result.stderr
    script_here("eval/depth_curve.py", *common, curve, "--k", "1,5", "--draws", "1", "--likelihood", "bound")
    found, scored = json.loads(out.read_text()), json.loads(curve.read_text())["by_k"]
    sigmas = [level["sigma"] for level in found["levels"]]
    assert sigmas == sorted(sigmas, reverse=True) and len(sigmas) == 5
    assert found["levels"][0]["loss"] == pytest.approx(scored["1"]["nll"], abs=1e-5)
    assert found["bound"] == pytest.approx(scored["5"]["nll"], abs=1e-4)
    assert found["exact_bound"] == pytest.approx(scored["1"]["nll"], abs=0.02)
    assert all(level["exact_loss"] < level["loss"] + 0.01 for level in found["levels"])
    told = script_here("eval/diagnostics/walk_levels.py", folder / "unrolled", "--data", folder / "data")
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "walks over no noise levels" in told.stderr


def one_sequence_batches(vocab_size: int) -> list[Batch]:
    rng = np.random.default_rng(3)
    rows = torch.from_numpy(rng.integers(0, vocab_size, (3, 1, 12)))
    return [Batch(row, row, torch.zeros_like(row, dtype=torch.int32), torch.tensor([i])) for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", ["next_token", "unrolled"])
def test_state_rms_is_that_of_the_loop_written_out(name: str) -> None:
    model, _ = micro_model(micro_config("--objective.name", name))
    batches, squares = one_sequence_batches(61), torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            e_BTD = model.encode(batch.tokens_BT)
            state_BTD = torch.zeros_like(e_BTD)
            if model.recurrence.stochastic:
                noise = NoiseSource(Rng(5, EVALUATION_STEP), batch.sample_index_B, model.config.max_seq_len)
                u = noise.uniform(*e_BTD.shape[1:], "state", e_BTD.device)
                state_BTD = truncated_normal(u, STATE_STD).to(e_BTD.dtype)
            for iteration in range(4):
                state_BTD = model.iterate(state_BTD, e_BTD)
                squares[iteration] += state_BTD.square().mean() / len(batches)
    measure = load_script("eval/depth_curve.py").state_rms_by_iteration
    expected = squares.sqrt().tolist()
    assert len(set(expected)) == 4
    for k in (1, 2, 3, 4):
        assert measure(model, batches, k, 5) == pytest.approx(expected[:k], rel=1e-9)


def test_state_rms_of_a_walk_is_that_of_its_estimates() -> None:
    model, _ = micro_model(micro_config("--objective.name", "denoise", "--objective.denoise.bridge", "state"))
    walk = model.recurrence
    assert isinstance(walk, DenoiseWalk)
    batches = one_sequence_batches(61)
    measure = load_script("eval/depth_curve.py").state_rms_by_iteration
    for k in (1, 2, 3, 4):
        sigmas, squares = GRIDS[walk.config.grid](walk.density, k), torch.zeros(k, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                e_BTD = model.encode(batch.tokens_BT)
                noise = NoiseSource(Rng(5, EVALUATION_STEP), batch.sample_index_B, model.config.max_seq_len)
                z_BTD = walk.density.sigma_max * noise.normal(*e_BTD.shape[1:], "noise", e_BTD.device)
                for index, sigma in enumerate(sigmas):
                    estimate_BTD = walk.estimate(model, z_BTD, sigma, e_BTD)
                    squares[index] += estimate_BTD.double().square().mean() / len(batches)
                    if index + 1 < k:  # Euler
                        share = sigmas[index + 1] / sigma
                        z_BTD = share * z_BTD + (1 - share) * estimate_BTD
        assert measure(model, batches, k, 5) == pytest.approx(squares.sqrt().tolist(), rel=1e-5)
    walk.config.sampler = "heun"
    assert len(measure(model, batches, 4)) == 7


def test_a_denoisers_walk_can_be_chosen_when_scoring(folder: Path, script_here: Run) -> None:
    """Every way of walking gives another number at K = 3; a run that does not walk has nothing to choose."""
    nlls = []
    for words in ([], ["--bridge", "hard"], ["--bridge", "state"], ["--sampler", "heun"], ["--sampler", "ancestral"],
                  ["--grid", "karras"]):  # fmt: skip
        out = folder / "walk.json"
        result = script_here(
            "eval/depth_curve.py", folder / "denoise", "--data", folder / "data", "--k", "3", "--draws", "1",
            "--tokens", "256", "--json", out, "--device", "cpu", *words,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        nlls.append(json.loads(out.read_text())["by_k"]["3"]["nll"])
    assert len(set(nlls)) == len(nlls)
    told = script_here("eval/depth_curve.py", folder / "unrolled", "--data", folder / "data", "--bridge", "hard")
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)


def test_table5_ends_and_does_no_work_twice(
    folder: Path, script_here: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its commands run in this process here, which saves a dozen starts of Python."""
    table5, calls = load_script("benchmarks/paper/table5.py"), []

    def call(*words: object) -> None:
        calls.append(str(words[0]))
        done = script_here(*map(str, words))
        assert done.returncode == 0, done.stderr

    def run(*options: object) -> tuple[list[str], list[str]]:
        """What the benchmark prints, and the scripts it runs."""
        calls.clear()
        words = ["--data", folder / "data", "--out", folder / "table5", "--tokens", "3000", *options]
        assert table5.main(parse(table5.Args, [str(word) for word in words])) == 0
        return capfd.readouterr().out.splitlines(), list(calls)

    monkeypatch.setattr(table5, "call", call)
    synthetic_data(folder / "judge-data", seed=2)
    text = ["--judge-data", folder / "judge-data", "--prompts", "4", "--prompt-tokens", "8", "--text-tokens", "4", "--each",
            "1", "--resamples", "5"]  # fmt: skip
    printed, scripts = run(*text, "--k", "1,2", "--draws", "1")
    arm = ["train/pretrain.py", "eval/depth_curve.py", "eval/generation.py"]
    assert scripts == ["eval/train_judge.py", *arm, *arm, *arm]
    result = json.loads((folder / "table5/RESULT.json").read_text())
    flops = {name: runs[0]["flops"] for name, runs in result["arms"].items()}
    assert set(flops) == {"unrolled", "denoise_paper", "next_token"}
    assert result["arms"]["denoise_paper"][0]["tokens"] >= 9000
    assert result["arms"]["denoise_paper"][0]["nll_sigma_max"] is not None
    made = {
        (name, row["k"], row["bridge"], row["decoding"])
        for name, runs in result["arms"].items()
        for row in runs[0]["text"]["rows"]
        if row["name"] == "model"
    }
    ways = (("unrolled", 32, None), ("denoise_paper", 1, None), ("denoise_paper", 4, "hard"), ("next_token", 1, None))
    assert made == {(*way, decoding) for way in ways for decoding in ("p=0.95", "greedy")}
    assert f"text, judged by {folder / 'table5/judge'}:" in printed
    assert [line.split()[0] for line in printed[-5:]] == ["next_token", "real", "untrained", "unigram", "uniform"]
    again, scripts = run(*text, "--k", "1,2", "--draws", "1")
    assert scripts == [] and again[-10:] == printed[-10:]
    # Other K are scored again, not taken from before; so is the text at other settings.
    other, scripts = run("--k", "1,3", "--draws", "1")
    assert scripts == ["eval/depth_curve.py"] * 3 and other[-1].startswith("no text half")
    assert run(*text, "--k", "1,3", "--draws", "1", "--text-tokens", "5")[1] == ["eval/generation.py"] * 3


def test_table5_tells_a_failed_command_and_two_judges(folder: Path, script_here: Run) -> None:
    words = ["benchmarks/paper/table5.py", "--data", folder / "data", "--out", folder / "failed", "--tokens", "3000"]
    failed = script_here(*words, "--judge-data", folder / "data")  # the arms' own data make no judge
    assert failed.returncode == 2
    assert "trained on the same text as" in failed.stderr
    assert failed.stderr.splitlines()[-1] == "error: the command above failed; repeat this command to continue"
    both = script_here(*words, "--judge-data", folder / "data", "--judge", folder / "next_token")
    assert (both.returncode, len(both.stderr.splitlines())) == (2, 1)


@pytest.mark.long
def test_the_demo_at_a_size_of_seconds(tmp_path: Path, script: Run) -> None:
    """Every step of `make demo` on the embedded corpus, with a budget too small to learn anything; and again."""
    pytest.importorskip("lm_eval", reason="the demo runs lm-eval, which is not installed")
    demo, out = load_script("benchmarks/demo.py"), tmp_path / "demo"
    assert set(demo.ARMS) == {"denoise", "one_step", "unrolled", "next_token"}
    words = ["--out", out, "--flops", "2e10", "--vocab-size", "512", "--k", "1,2", "--score-tokens", "1024"]
    for _ in range(2):
        result = script("benchmarks/demo.py", *words)
        assert result.returncode == 0, result.stderr
        page = (out / "report.html").read_text()
        rows = [line.split() for line in result.stdout.split("Held-out NLL by K")[1].splitlines()]
        for arm in demo.ARMS:
            assert arm in page
            assert json.loads((out / arm / "metrics.jsonl").read_text().splitlines()[-1])["flops"] >= 2e10
            [by_k] = [row[1:] for row in rows if row[:1] == [arm]][:1]
            curve = json.loads((out / arm / "eval/depth_curve.json").read_text())["by_k"]
            assert by_k == [f"{curve[k]['nll']:.3f}" for k in ("1", "2")]
        assert (out / demo.SAMPLED / "eval/lm_eval.json").exists()
        (out / "left over").touch()
    again = script("benchmarks/demo.py", "--out", tmp_path)
    assert again.returncode == 2  # a folder that is no demo is left alone


def test_the_readme_loads_the_arm_that_the_demo_samples() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'load("runs/demo/{load_script("benchmarks/demo.py").SAMPLED}")' in readme


def test_the_demo_prints_lines_of_progress(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no terminal shows a progress bar: the arm, the share of its budget, the loss, seconds."""
    demo = load_script("benchmarks/demo.py")
    assert demo.EVERY < 20
    monkeypatch.setattr(demo, "EVERY", 0.1)
    monkeypatch.setattr(demo.sys.stderr, "isatty", lambda: False)
    last = json.loads((folder / "unrolled/metrics.jsonl").read_text().splitlines()[-1])
    state = functools.partial(demo.spent, folder / "unrolled", 2 * last["flops"])
    demo.command("-c", "import time; time.sleep(1)", what="unrolled", state=state)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unrolled: ")]
    assert len(lines) >= 2
    assert all(re.fullmatch(rf"unrolled: 50% of the budget, loss {last['loss']:.3f}, \d+ s", line) for line in lines)
    assert demo.spent(folder / "no run", 1.0) == "0% of the budget"
    monkeypatch.setattr(demo.sys.stderr, "isatty", lambda: True)
    demo.command("-c", "import time; time.sleep(0.5)", what="unrolled")
    assert "unrolled: " not in capsys.readouterr().out


def test_decode(script_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is measured beside products that are, to the FLOP, what the count says of weights."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    words = [
        "--config",
        ROOT / "train/configs/tiny.toml",
        "--vocab-size",
        "64",
        "--k",
        "3",
        "--tokens",
        "32",
        "--rows",
        "2",
    ]
    result = script_here("benchmarks/speed/decode.py", *words, "--json", tmp_path / "decode.json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("denoise")
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["objective"] for row in rows] == ["unrolled", "denoise"]
    script = load_script("benchmarks/speed/decode.py")
    for row in rows:
        assert row["speedup"] == pytest.approx(row["seconds_recomputing"] / row["seconds"])
        assert row["over_needed"] == pytest.approx(row["seconds"] / row["seconds_needed"])
        config = load_config(ROOT / "train/configs/tiny.toml", ["--objective.name", row["objective"]])
        config.model.vocab_size = 64
        model = build_model(config.model, 0)
        model.recurrence = build_objective(config).recurrence
        cost = total(cost_per_token(config.model, 1, model.recurrence.passes(3)))
        assert script.products(model, 3)[1] == cost.matmul
        assert row["cache_bytes_per_token"] == 4 * cache_numbers_per_token(config.model, model.recurrence.passes(3))
    result = script_here("benchmarks/speed/decode.py", *words[:4], "--tokens", "200")
    assert result.returncode == 2
    assert "above the model's window of 128" in result.stderr


def test_decode_by_other_samplers(
    folder: Path, script_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's samplers beside sequential decoding: the exact ones give its text, an exit at once gives two iterations."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    words = ["--run", folder / "unrolled", "--k", "6", "--tokens", "20", "--prompts", "2", "--rows", "3"]
    options = ["--prompt-tokens", "5", "--json", tmp_path / "samplers.json"]
    methods = "speculative:1:3,diagonal:2,diagonal-unverified,latent:1e9,kl:0+warm"
    result = script_here("benchmarks/speed/decode.py", *words, *options, "--methods", methods)
    assert result.returncode == 0, result.stderr
    rows = {row["method"]: row for row in json.loads((tmp_path / "samplers.json").read_text())["rows"]}
    assert list(rows) == ["sequential", *methods.split(",")]
    assert [line.split()[0] for line in result.stdout.splitlines()[-6:]] == list(rows)
    for name in ("sequential", "speculative:1:3", "diagonal:2"):
        assert (rows[name]["identical"], rows[name]["share_before_difference"], rows[name]["mean_k"]) == (2, 1, 6)
    assert rows["latent:1e9"]["mean_k"] == 2
    assert rows["kl:0+warm"]["mean_k"] == 6
    for row in rows.values():
        assert 0 < row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
        assert row["ratio_of_rows"] == pytest.approx(
            row["tokens_per_s_of_rows"] / rows["sequential"]["tokens_per_s_of_rows"]
        )
    for wrong, message in (
        ("parallel", "exit must be"),
        ("kl+cold", "only warm can follow"),
        ("diagonal:0", "sampler must be"),
    ):
        result = script_here("benchmarks/speed/decode.py", *words, "--methods", wrong)
        assert result.returncode == 2
        assert message in result.stderr


@pytest.mark.parametrize("name", ["unrolled", "two-stream"])
def test_cache_policies(folder: Path, script_here: Run, name: str) -> None:
    """`full` is the likelihood of the window read at once; more slots than iterations are the same; fewer are not."""
    words = [folder / name, "--data", folder / "data", "--k", "4", "--tokens", "128", "--device", "cpu"]
    out = folder / f"policies-{name}.json"
    result = script_here(
        "eval/diagnostics/cache_policies.py", *words, "--policies", "full,modulo-4,last", "--json", out
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["by_k"]["4"]
    model, _, config, _ = load_with_config(folder / name, "cpu")
    data = open_data(str(folder / "data"), "validation")
    nlls = []
    with torch.no_grad():
        for batch in validation_batches(data, config.data.sequence_length, 4, 128):
            arguments = batch.tokens_BT, batch.targets_BT, [4], Rng(0, EVALUATION_STEP), batch.sample_index_B
            nlls.append(-token_log_probabilities(model, *arguments)[4].double().mean(-1))
    assert rows["full"]["nll"] == pytest.approx(torch.cat(nlls).mean().item(), abs=1e-4)
    assert rows["full"]["difference"] == 0
    assert abs(rows["modulo-4"]["difference"]) < 1e-6
    assert abs(rows["last"]["difference"]) > 1e-4
    assert rows["last"]["bytes_per_token"] < rows["full"]["bytes_per_token"] == rows["modulo-4"]["bytes_per_token"]
    result = script_here("eval/diagnostics/cache_policies.py", *words, "--policies", "full,first")
    assert result.returncode == 2
    assert "the cache policy must be full, last or modulo-S" in result.stderr
