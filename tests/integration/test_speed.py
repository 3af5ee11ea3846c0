"""The speed benchmark: its figures belong together, its groups and its reference are what they are said to be."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT, load_script, micro_config
from torch import nn
from torch.profiler import record_function

from recurrent_db.accounting.hardware import attainable_flops
from recurrent_db.accounting.llama_reference import build_llama, llama_flops
from recurrent_db.accounting.profiling import GROUPS, OTHER, group_of, time_split
from recurrent_db.errors import UserError
from recurrent_db.model import LoopedLM
from recurrent_db.model.attention import Rule
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import build_objective

Run = Callable[..., "CompletedProcess[str]"]
WHY = "the reference is a model of transformers (extra hf), which is not installed"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/speed/training.py")


@pytest.mark.parametrize("with_reference", [False, True])
def test_quick_run(
    tmp_path: Path, script: Run, script_here: Run, monkeypatch: pytest.MonkeyPatch, with_reference: bool
) -> None:
    if with_reference:
        pytest.importorskip("transformers", reason=WHY)
    page = (ROOT / "docs/measurements.md").read_text()
    (tmp_path / "page.md").write_text(page)
    words = ["--quick", "--device", "cpu", "--json", tmp_path / "new/speed.json", "--markdown", tmp_path / "page.md"]
    shorter = ["--repetitions", "2", "--warmup", "1", "--seconds", "0.02"]
    result = script(
        "benchmarks/speed/training.py", *words, *shorter, *([] if with_reference else ["--no-reference"])
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

    found = json.loads((tmp_path / "new/speed.json").read_text())
    assert (found["seed"], found["machine"]["device"]) == (0, "cpu")
    assert "--quick" in found["command"][0]
    assert [row["objective"] for row in found["rows"]] == [
        "next_token",
        "denoise",
        "denoise-two-stream",
        "unrolled",
    ]
    for row in found["rows"]:
        assert (row["preset"], row["backend"], row["compiled"], row["device"]) == ("tiny", "sdpa", False, "cpu")
        prefixes = ["", "reference_"] if with_reference else [""]
        for prefix in prefixes:
            assert row[f"{prefix}flops_per_s"] == pytest.approx(
                row[f"{prefix}tokens_per_s"] * row[f"{prefix}flops_per_token"]
            )
            assert row[f"{prefix}seconds_per_step"] == statistics.median(row[f"{prefix}seconds"])
            assert row[f"{prefix}share_of_peak"] > 0
            assert row[f"{prefix}peak_memory_bytes"] > 8 * 128 * 128 * 4
            groups = row[f"{prefix}time_by_group"]
            assert sum(groups.values()) == pytest.approx(sum(row[f"{prefix}time_by_phase"].values()))
            inside = (groups["matmul"] + groups["attention"]) / sum(groups.values())
            assert row[f"{prefix}outside_matmul_and_attention"] == pytest.approx(1 - inside)
            assert groups["matmul"] > groups[OTHER] > 0
        if with_reference:
            assert row["ratio"] == pytest.approx(row["flops_per_s"] / row["reference_flops_per_s"])
            assert 0 < row["ratio_least"] <= row["ratio_most"]
        else:
            assert row["ratio"] is row["reference_flops_per_s"] is None
    assert found["rows"][3]["core_iterations"] == 4  # the preset's mean depth, in every step
    assert found["core"][0]["ratio"] == pytest.approx(
        found["core"][0]["seconds_per_flop_deep"] / found["core"][0]["seconds_per_flop_one"]
    )

    written = (tmp_path / "page.md").read_text()
    assert written.split("<!-- speed: begin -->")[0] == page.split("<!-- speed: begin -->")[0]
    cpu, gpu = written.split("<!-- speed: begin -->")[1].split("<!-- speed: cuda -->")
    assert "| denoise-two-stream | tiny " in cpu
    assert "Not yet measured" in gpu
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    again = script_here(
        "benchmarks/speed/training.py", "--load", tmp_path / "new/speed.json", "--markdown", tmp_path / "page.md"
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout == result.stdout
    assert (tmp_path / "page.md").read_text() == written


def test_a_users_mistakes(
    tmp_path: Path, script_here: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    (tmp_path / "plain.md").write_text("# Nothing to replace\n")
    (tmp_path / "other.json").write_text('{"next_token": {}}')
    for words, message in (
        (["--presets", "huge"], "unknown 'huge'"),
        (["--objectives", "denois"], "choose from next_token, denoise"),
        (["--backends", "magic", "--quick", "--no-reference"], "magic"),
        (["--repetitions", "-1"], "--repetitions must be 0 or more"),
        (["--compile", "maybe"], "--compile takes one of none, compiled, both, got 'maybe'"),
        (["--markdown", tmp_path / "none.md"], "does not exist"),
        (["--load", tmp_path / "other.json"], "other.json is not a file that --json"),
        (["--load", tmp_path / "none.json"], "No such file"),
    ):
        told = script_here("benchmarks/speed/training.py", *words, "--device", "cpu")
        assert (told.returncode, len(told.stderr.splitlines())) == (2, 1), told.stderr
        assert message in told.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    told = script_here("benchmarks/speed/training.py", "--quick", "--device", "cpu")
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "pip install transformers" in told.stderr


def test_only_the_devices_own_tables_are_replaced() -> None:
    tables = load_script("benchmarks/speed/tables.py")
    page = f"above\n\n{tables.BEGIN}\nold\n{tables.END}\n\nbelow {tables.UNMEASURED}\n"
    first = tables.rewrite(page, "cpu", "| a |\n| - |\n\ntext")
    assert first.startswith("above\n\n")
    assert first.endswith(f"below {tables.UNMEASURED}\n")
    assert "old" not in first
    second = tables.rewrite(first, "cuda", r"| \1 |")
    assert tables.UNMEASURED not in second.split(tables.END)[0]
    assert "| a |\n| - |\n\ntext" in second
    assert tables.rewrite(second, "cpu", "| a |\n| - |\n\ntext") == second
    with pytest.raises(UserError, match="speed: begin"):
        tables.rewrite("no marks", "cpu", "text")


@pytest.mark.parametrize(
    ("group", "names"),
    {
        "matmul": "aten::mm aten::addmm aten::bmm aten::linear aten::matmul mkldnn::_linear_pointwise",
        "attention": "aten::scaled_dot_product_attention aten::_scaled_dot_product_flash_attention_for_cpu_backward "
        "aten::_flash_attention_forward aten::_efficient_attention_backward flash_attn::_flash_attn_forward FlashAttnFunc",
        "softmax, loss": "aten::_log_softmax aten::_log_softmax_backward_data aten::nll_loss_forward _LinearCrossEntropy "
        "aten::scatter_add_ aten::cross_entropy_loss",
        "optimizer, clipping": "aten::_fused_adamw_ aten::_foreach_norm Optimizer.step#AdamW.step",
        "embedding": "aten::embedding aten::embedding_dense_backward aten::index_select",
        "random numbers": "aten::normal_ aten::uniform_",
        "copies": "aten::copy_ aten::_to_copy aten::clone aten::cat aten::stack aten::fill_ aten::zeros "
        "aten::constant_pad_nd",
        "norm, elementwise": "aten::add aten::mul_ aten::addcmul_ aten::silu_backward aten::rsqrt aten::pow _ScaledRMS "
        "_ScaledRMSBackward aten::linalg_vector_norm aten::_fused_rms_norm aten::mv triton_poi_fused_add_0 "
        "CompiledFunction CompiledFunctionBackward",
        OTHER: "aten::view aten::transpose aten::as_strided autograd::engine::evaluate_function:MmBackward0 MmBackward0",
    }.items(),
)
def test_groups(group: str, names: str) -> None:
    assert {name: group_of(name) for name in names.split()} == dict.fromkeys(names.split(), group)


def test_groups_by_caller() -> None:
    assert group_of("## Call CompiledFxGraph fihp ##") == "norm, elementwise"
    assert group_of("aten::mul_", ("_LinearCrossEntropy", "forward")) == "softmax, loss"
    assert group_of("aten::mm", ("_LinearCrossEntropy", "forward")) == "matmul"
    assert group_of("aten::linalg_vector_norm", ("aten::_foreach_norm", "update")) == "optimizer, clipping"
    assert group_of("update") == "optimizer, clipping"


def test_where_the_time_of_a_step_goes() -> None:
    weight = nn.Parameter(torch.randn(256, 256))
    optimizer = torch.optim.AdamW([weight], fused=True)

    def step() -> None:
        with record_function("forward"):
            loss = (torch.ones(512, 256) @ weight).sin().sum()
        with record_function("backward"):
            loss.backward()
        with record_function("update"):
            optimizer.step()

    split = time_split(step, torch.device("cpu"))
    assert set(split.by_group) == {*GROUPS, OTHER}
    assert split.by_group["attention"] == split.by_group["embedding"] == 0
    assert min(split.by_group[name] for name in ("matmul", "norm, elementwise", "optimizer, clipping")) > 0
    assert min(split.by_phase.values()) > 0
    assert 0 < split.outside < 1


def test_attainable_rate() -> None:
    model = micro_config("--model.vocab_size", 61, "--model.d_mlp", 80).model
    best: dict[object, tuple[float, float]] = {}
    rate = attainable_flops(model, Passes(core_grad=1), 64, torch.float32, best)
    assert 1e6 < rate < 1e15
    assert len(best) == 6  # qkv, projection, two of the MLP, adapter, head
    fast = dict.fromkeys(best, (1e-9, 2e-9))  # faster than any: so they are kept
    blocks, width, hidden = model.n_prelude + 3 * model.n_core + model.n_coda, model.d_model, model.d_mlp
    weights = blocks * (4 * width**2 + 3 * width * hidden) + 61 * width + 3 * 2 * width**2
    expected = 6 * 64 * weights / ((4 * blocks + 1 + 3) * 3e-9)
    assert attainable_flops(model, Passes(core_grad=3), 64, torch.float32, fast) == pytest.approx(expected)


def test_slow_first_steps(speed: ModuleType) -> None:
    assert speed.slow_steps([9.0, 3.0, 1.1, 5.0], 1.0) == (2, 12.0)
    assert speed.slow_steps([1.9, 9.0], 1.0) == (0, 0.0)


def test_every_step_is_of_the_mean_depth(speed: ModuleType) -> None:
    config = micro_config("--objective.name", "unrolled", "--objective.unrolled.mean_depth", 7)
    objective = build_objective(config)
    passes = objective.passes(speed.steady_rng(objective, config, 0), 0.0)
    assert (passes.core_no_grad, passes.core_grad) == (5, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_both_models_are_compiled_or_neither(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    pytest.importorskip("transformers", reason=WHY)
    calls = 0

    def stand_in(part: Callable[..., object], **options: object) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            return part(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    setting = speed.Setting(speed.Args(length=16), "tiny", "sdpa", compiled, torch.device("cpu"), torch.float32)
    batch = speed.synthetic_batch(setting.config("next_token"), 1, 0, torch.device("cpu"))
    for arm, parts in ((speed.our_arm(setting, "next_token"), 4), (speed.reference_arm(setting), 1)):
        calls = 0
        arm.step(batch)
        assert calls == (parts if compiled else 0)  # prelude, iteration, coda, loss; the Llama whole


def test_documents_are_kept_apart_in_the_steps_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = load_script("benchmarks/speed/documents.py")
    plain, rules = LoopedLM.served, []

    def served(model: LoopedLM, rule: Rule, *more: Any) -> Any:
        rules.append(rule)
        return plain(model, rule, *more)

    monkeypatch.setattr(LoopedLM, "served", served)
    step = documents.make_step(documents.Args(batch_size=2), "next_token", torch.device("cpu"))
    assert step(True) > 0
    assert step(False) > 0
    masked, whole = rules
    assert whole.docs_BS is None
    borders = int((masked.docs_BS.diff() > 0).sum())
    assert 2 <= borders <= 12  # 256 positions, one in 60 on average


def test_what_a_step_spends_beside_the_model(data: Path, tmp_path: Path, script_here: Run) -> None:
    words = ["benchmarks/speed/overhead.py", "--data", data, "--steps"]
    told = script_here(*words, 1, "--json", tmp_path / "overhead.json")
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert found["seconds"].keys() == {"step", "reading", "counting"}
    assert found["shares"]["reading"] == pytest.approx(found["seconds"]["reading"] / found["seconds"]["step"])
    assert told.returncode == int(found["shares"]["reading"] > 1 / 20 or found["shares"]["counting"] > 1 / 200)
    assert [line.split(":")[0] for line in told.stdout.splitlines()] == ["reading", "counting"]
    assert script_here(*words, 0).returncode == 2


def test_a_gpus_sequences_are_of_1024_tokens(speed: ModuleType) -> None:
    for device, asked, length in (("cuda", 0, 1024), ("cuda", 512, 512), ("cpu", 0, 256), ("cpu", 64, 64)):
        args = speed.Args(length=asked)
        setting = speed.Setting(args, "pythia-70m-looped", "sdpa", False, torch.device(device), torch.float32)
        config = setting.config("denoise")
        assert (config.data.sequence_length, config.model.max_seq_len) == (length, length)


def test_memory_that_does_not_hold_a_batch(speed: ModuleType) -> None:
    def needs(most: int) -> Callable[[int], dict[str, int]]:
        def action(batch_size: int) -> dict[str, int]:
            if batch_size > most:
                raise torch.OutOfMemoryError
            return {"batch_size": batch_size}

        return action

    assert speed.fitting(8, needs(3)) == {"batch_size": 2}
    with pytest.raises(UserError, match="a single sequence"):
        speed.fitting(8, needs(0))


def test_the_reference_is_the_flat_models_size_and_counted_whole() -> None:
    pytest.importorskip("transformers", reason=WHY)
    config = micro_config("--model.vocab_size", 61)
    model, reference = config.model, build_llama(config)
    layers, width = model.n_prelude + model.n_core + model.n_coda, model.d_model
    weights = layers * (4 * width**2 + 3 * width * model.d_mlp) + model.vocab_size * width
    norms = (2 * layers + 1) * width
    assert sum(p.numel() for p in reference.parameters()) == weights + norms
    assert {p.dtype for p in reference.parameters()} == {torch.float32}
    length = config.data.sequence_length
    counted = llama_flops(reference, torch.zeros(1, length, dtype=torch.long))
    assert counted == 6 * weights + 12 * length * width * layers
    assert all(p.grad is None for p in reference.parameters())
    # As many matrix entries as the looped model has besides its adapter.
    looped = LoopedLM(config.model)
    entries = sum(p.numel() for name, p in looped.named_parameters() if p.ndim == 2 and not name.endswith("bias"))
    assert entries - 2 * width**2 == weights


def test_the_time_limits_for_a_gpu_add_up_to_what_is_said() -> None:
    text = (ROOT / "benchmarks/gpu.sh").read_text()
    seconds = sum(int(found) for found in re.findall(r"\bstep \w+ (\d+) ", text))
    said = re.search(r"add up to less than (\d+)\s+#?\s*minutes", text)
    assert said is not None
    assert 60 * int(said[1]) - 60 <= seconds < 60 * int(said[1])


@pytest.mark.skipif(not Path("/usr/bin/env").exists(), reason="needs a Unix shell")
def test_everything_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    result = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--dry-run"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = {path.name for path in (tmp_path / "out").iterdir()}
    logs = {f"{step}.log" for step in ["sdpa", "compiled", "flex", "flash", "documents", "memory", "float8", "tests"]}
    assert logs | {"sdpa.json", "documents.json", "memory.json", "float8.json", "tests.xml"} <= found
    # Products of normal numbers by e4m3 and e5m2: roundings of 2^-4 and 2^-3 of each value at most, of random sign.
    rows = json.loads((tmp_path / "out/float8.json").read_text())["rows"]
    assert all(0.01 < error < 0.1 for row in rows for error in row["relative_errors"])
    assert json.loads((tmp_path / "out/sdpa.json").read_text())["rows"]
    assert result.stdout.splitlines()[-1].startswith("all done")


def test_a_failed_gpu_step_does_not_stop_the_others(tmp_path: Path) -> None:
    """Python's stand-in imports everything and runs nothing but the memory benchmark."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in -c*|*memory.py*) exit 0;; esac\necho broken >&2\nexit 3\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    call = [ROOT / "benchmarks/gpu.sh", "sdpa", "memory"]
    result = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "failed: sdpa"
    assert "memory.py" in result.stdout
    assert (tmp_path / "out/sdpa.log").read_text() == "broken\n"
    call = [ROOT / "benchmarks/gpu.sh", "everything"]
    result = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    python.write_text("#!/bin/sh\nexit 1\n")
    result = subprocess.run(call[:1], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 2
    assert "missing: torch" in result.stderr
