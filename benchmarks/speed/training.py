"""Measure the speed of a training step by objective, beside a plain Llama of the same widths in the same run.

python benchmarks/speed/training.py [--quick] [--compile none|compiled|both] [--threads N] [--json OUT] [--markdown PAGE]

The reference is Hugging Face's LlamaForCausalLM with as many layers as the looped model has at K = 1, the same vocabulary,
and tied embeddings. It trains on the same tokens with the same optimizer, clipping and dtype. Both models are eager or both
are compiled, and they are timed in turns. Rates are model FLOPs per second (`flops.step_cost`; PyTorch's counter for the
reference). docs/measurements.md explains each column; `--markdown docs/measurements.md` writes the tables there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import contextlib
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.speed.tables import rewrite, tables
from recurrent_db.accounting.flops import cost_per_token, step_cost
from recurrent_db.accounting.hardware import attainable_flops, choose_device, environment, table_peak_flops
from recurrent_db.accounting.llama_reference import build_llama, llama_flops
from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.accounting.profiling import TimeSplit, time_split
from recurrent_db.arguments import Names, run_command
from recurrent_db.config import Config, load_config
from recurrent_db.data import Batch
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.attention import Need, choose
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import Objective, build_objective
from recurrent_db.optim.optimizer import CLIP_NORM, build_optimizer
from recurrent_db.rng import Rng
from recurrent_db.schema import Count, NotNegative

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "train/configs"
OBJECTIVES = {
    "next_token": ["--objective.name", "next_token"],
    "denoise": ["--objective.name", "denoise"],
    "denoise-two-stream": ["--objective.name", "denoise", "--objective.denoise.conditioning", "two-stream"],
    "unrolled": ["--objective.name", "unrolled"],
}
BATCH_SIZES = {"cpu": {"tiny": 8, "pythia-70m-looped": 2}, "cuda": {"pythia-70m-looped": 16, "looped-1b": 8}}
"""Sequences in a step, by device and preset. The presets listed for a device are its default."""
GPU_LENGTH = 1024
"""Tokens in a sequence on a GPU, for all presets."""
CORE_DEPTH = 8
"""Number of backpropagated iterations to compare with one iteration."""


@dataclass
class Args:
    """Measure training steps: tokens and FLOPs per second, memory, and time by part, beside a plain Llama."""

    presets: Names = ()
    """Names of configurations in train/configs. The default is tiny and pythia-70m-looped on a CPU,
    pythia-70m-looped and looped-1b on a GPU."""
    objectives: Names = tuple(OBJECTIVES)
    """Objectives to measure: next_token, denoise, denoise-two-stream, unrolled."""
    backends: Names = ("sdpa",)
    """Attention back ends."""
    compile: Literal["none", "compiled", "both"] = "none"
    """Eager, torch.compile for both models, or both modes one after the other."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of both models. auto is bfloat16 autocast on CUDA, float32 elsewhere. Weights are always float32."""
    threads: Count = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    batch_size: Count = 0
    """Sequences in a step; 0 uses the preset's for the device. Halved for both models if it does not fit in memory."""
    length: Count = 0
    """Tokens in a sequence; 0 uses the preset's, or 1,024 on a GPU."""
    warmup: Count = 0
    """Untimed first steps of each model; 0 means 3, or 2 with --quick."""
    repetitions: Count = 0
    """Timed repetitions of each model, in turns; 0 means 7, or 5 with --quick."""
    seconds: NotNegative = 0.0
    """Minimum length of a repetition in seconds, for which short steps are repeated; 0 means 0.3, or 0.1 with --quick."""
    seed: int = 0
    """Seed of weights, tokens and noise."""
    quick: bool = False
    """Only the preset tiny, with few and short repetitions. After 25 seconds each model gets only one, so that it stays
    short on a busy machine. Under 50 seconds on two cores without compilation."""
    no_reference: bool = False
    """Leave the Llama out. The package transformers is then not needed."""
    json: Path | None = None
    """File for all results, written again after every row."""
    markdown: Path | None = None
    """Markdown file whose tables between the marks are replaced."""
    load: list[Path] = field(default_factory=list)
    """Measure nothing; use the rows of these --json files."""


@dataclass(frozen=True)
class Setting:
    """Settings that the arms of one comparison share."""

    args: Args
    preset: str
    backend: str
    compiled: bool
    device: torch.device
    dtype: torch.dtype
    until: float = math.inf
    """Time (`time.perf_counter`) at which to stop repeating."""

    def config(self, objective: str) -> Config:
        asked = self.args.length or (GPU_LENGTH if self.device.type == "cuda" else 0)
        length = ["--data.sequence_length", str(asked), "--model.max_seq_len", str(asked)]
        words = [*OBJECTIVES[objective], *(length if asked else [])]
        config = load_config(CONFIGS / f"{self.preset}.toml", words)
        config.model.vocab_size = config.model.vocab_size or 2048
        return config

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        bfloat16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    @property
    def batch_size(self) -> int:
        return self.args.batch_size or BATCH_SIZES.get(self.device.type, {}).get(self.preset, 8)

    def __str__(self) -> str:
        return f"{self.preset}, {self.backend}, {'compiled' if self.compiled else 'eager'}"


# ---------------------------------------------------------------------------------------------------------------------
# The two models


def use_backend(model: LoopedLM, name: str, setting: Setting, two_stream: bool) -> None:
    """Set the attention back end of ``model``. Raises `UserError` if it cannot be used."""
    head_size = model.config.d_head
    dtype = setting.dtype if setting.device.type == "cuda" else torch.float32
    need = Need(setting.device, dtype, head_size, documents=True, two_stream=two_stream)
    model.attention, line = choose(name, need)
    print(line, file=sys.stderr)


def synthetic_batch(config: Config, n: int, seed: int, device: torch.device) -> Batch:
    """Uniformly random tokens. Speed does not depend on them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.model.vocab_size, (n, config.data.sequence_length + 1), generator=generator)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros_like(ids[:, 1:]), torch.arange(n))
    return batch.to(device)


def training_step(setting: Setting, model: nn.Module, loss: Callable[[Batch], Tensor]) -> Callable[[Batch], None]:
    """A function that makes the trainer's step for either model: forward, backward, clipping, AdamW."""
    optim = setting.config("next_token").optim
    optimizer = build_optimizer(model, optim)
    model.train()

    def step(batch: Batch) -> None:
        with record_function("forward"), setting.autocast():
            value = loss(batch)
        with record_function("backward"):
            value.backward()
        with record_function("update"):
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def steady_rng(objective: Objective, config: Config, seed: int) -> Rng:
    """Random numbers of a step with the preset's mean depth, so that all timed steps do equal work."""
    for step in itertools.count():
        passes = objective.passes(Rng(seed, step), 0.0)
        mean = config.objective.unrolled.mean_depth
        if config.objective.name != "unrolled" or passes.core_no_grad + passes.core_grad == mean:
            return Rng(seed, step)
    raise AssertionError


@dataclass
class Arm:
    """A model in training."""

    step: Callable[[Batch], None]
    flops_per_token: float
    first: list[float] = field(default_factory=list)
    """Seconds of the very first steps, which include compilation."""
    passes: Passes | None = None


def our_arm(setting: Setting, name: str) -> Arm:
    config = setting.config(name)
    model, objective = build_model(config.model, setting.args.seed, setting.device), build_objective(config)
    model.recurrence = objective.recurrence
    use_backend(model, setting.backend, setting, config.objective.denoise.conditioning == "two-stream")
    compile_ours(model, setting)
    rng = steady_rng(objective, config, setting.args.seed)
    passes = objective.passes(rng, 0.0)
    step = training_step(setting, model, lambda batch: objective(model, batch, rng, 0.0)[0])
    return Arm(step, step_cost(config, passes).total, passes=passes)


def compile_ours(model: LoopedLM, setting: Setting) -> None:
    if setting.compiled:
        model.compile_parts()


def reference_arm(setting: Setting) -> Arm:
    config = setting.config("next_token")
    torch.manual_seed(setting.args.seed)
    model = build_llama(config).to(setting.device)
    one = synthetic_batch(config, 1, setting.args.seed, setting.device)
    flops = llama_flops(model, one.tokens_BT)
    called: Any = torch.compile(model) if setting.compiled else model
    step = training_step(setting, model, lambda b: called(input_ids=b.tokens_BT, labels=b.tokens_BT).loss)
    return Arm(step, flops)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds_of(action: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Wall time per call, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def in_turns(setting: Setting, actions: Sequence[Callable[[], object]], least: list[float]) -> list[list[float]]:
    """Seconds per call of each action in each repetition, in turns: A, B, A, B. ``least`` is about the shortest time of one
    call of each."""
    calls = [max(1, math.ceil(setting.args.seconds / seconds)) for seconds in least]
    times: list[list[float]] = [[] for _ in actions]
    for done in range(setting.args.repetitions):
        if done and time.perf_counter() > setting.until:
            break
        for action, count, kept in zip(actions, calls, times, strict=True):
            kept.append(seconds_of(action, setting.device, count))
    return times


def slow_steps(first: list[float], median: float) -> tuple[int, float]:
    """Number and total seconds of the steps before the first that takes at most twice the median."""
    slow = list(itertools.takewhile(lambda seconds: seconds > 2 * median, first))
    return len(slow), sum(slow)


def measure(
    setting: Setting, name: str, reference: Arm | None, best: dict[Any, Any], batch_size: int
) -> dict[str, Any]:
    """Measure the row of one objective."""
    args, device, config = setting.args, setting.device, setting.config(name)
    batch = synthetic_batch(config, batch_size, args.seed, device)
    ours = our_arm(setting, name)
    assert ours.passes is not None
    arms = {"": ours, **({"reference_": reference} if reference is not None else {})}
    warm = []
    for arm in arms.values():
        first = [seconds_of(partial(arm.step, batch), device) for _ in range(args.warmup)]
        arm.first = arm.first or first
        warm.append(min(first))
    times = in_turns(setting, [partial(arm.step, batch) for arm in arms.values()], warm)
    tokens = batch.tokens_BT.numel()
    peak = (
        table_peak_flops(torch.cuda.get_device_name(device))
        if device.type == "cuda"
        else attainable_flops(config.model, ours.passes, tokens, setting.dtype, best)
    )
    row: dict[str, Any] = {
        "objective": name, "preset": setting.preset, "backend": setting.backend, "compiled": setting.compiled,
        "device": str(device), "dtype": str(setting.dtype).removeprefix("torch."), "batch_size": batch_size,
        "length": config.data.sequence_length, "core_iterations": ours.passes.core_no_grad + ours.passes.core_grad,
        "core_iterations_with_gradient": ours.passes.core_grad, "peak_flops_per_s": peak,
        "reference_flops_per_s": None, "ratio": None,
    }  # fmt: skip
    for (prefix, arm), seconds in zip(arms.items(), times, strict=True):
        median, split = statistics.median(seconds), time_split(partial(arm.step, batch), device)
        steps, compiling = slow_steps(arm.first, median)
        row |= {
            f"{prefix}seconds": seconds, f"{prefix}seconds_per_step": median,
            f"{prefix}tokens_per_s": tokens / median, f"{prefix}flops_per_token": arm.flops_per_token,
            f"{prefix}flops_per_s": arm.flops_per_token * tokens / median,
            f"{prefix}share_of_peak": arm.flops_per_token * tokens / median / peak if peak else None,
            f"{prefix}peak_memory_bytes": peak_live_bytes(partial(arm.step, batch), device),
            f"{prefix}slow_first_steps": steps, f"{prefix}slow_first_seconds": compiling, **split_keys(prefix, split),
        }  # fmt: skip
    if reference is not None:
        work = ours.flops_per_token / reference.flops_per_token
        pairs = [work * theirs / own for own, theirs in zip(*times, strict=True)]
        row |= {"ratio": row["flops_per_s"] / row["reference_flops_per_s"], "ratio_least": min(pairs),
                "ratio_most": max(pairs)}  # fmt: skip
    return row


def split_keys(prefix: str, split: TimeSplit) -> dict[str, Any]:
    return {f"{prefix}time_by_group": split.by_group, f"{prefix}time_by_phase": split.by_phase,
            f"{prefix}outside_matmul_and_attention": split.outside}  # fmt: skip


def measure_core(setting: Setting, batch_size: int) -> dict[str, Any]:
    """Seconds per FLOP of the core only, forward and backward: one iteration against `CORE_DEPTH`."""
    config = setting.config("next_token")
    model = build_model(config.model, setting.args.seed, setting.device)
    use_backend(model, setting.backend, setting, False)
    compile_ours(model, setting)
    shape = batch_size, config.data.sequence_length, config.model.d_model
    dtype = setting.dtype if setting.device.type == "cuda" else torch.float32
    state, e, gradient = (torch.randn(shape, device=setting.device, dtype=dtype) for _ in range(3))
    state.requires_grad_()
    e.requires_grad_()

    def run(depth: int) -> None:
        with setting.autocast():
            out = model.iterate(state, e, depth)
        out.backward(gradient.to(out.dtype))
        model.zero_grad(set_to_none=True)
        state.grad = e.grad = None

    flops = {}
    for depth in (1, CORE_DEPTH):
        parts = cost_per_token(config.model, config.data.sequence_length, Passes(core_grad=depth))
        flops[depth] = (parts["core"].total + parts["adapter"].total) * batch_size * config.data.sequence_length
    actions = [partial(run, depth) for depth in flops]
    warm = [min(seconds_of(action, setting.device) for _ in range(setting.args.warmup)) for action in actions]
    times = in_turns(setting, actions, warm)
    one, deep = (statistics.median(t) / f for t, f in zip(times, flops.values(), strict=True))
    pairs = [b / a * flops[1] / flops[CORE_DEPTH] for a, b in zip(*times, strict=True)]
    return {
        "preset": setting.preset, "backend": setting.backend, "compiled": setting.compiled, "batch_size": batch_size,
        "device": str(setting.device), "iterations": CORE_DEPTH, "seconds_per_flop_one": one,
        "seconds_per_flop_deep": deep, "ratio": deep / one, "ratio_least": min(pairs), "ratio_most": max(pairs),
    }  # fmt: skip


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting(batch_size: int, action: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Run ``action`` with ``batch_size``, or with half of it, a quarter..., whichever first fits in memory."""
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return action(batch_size)
        if batch_size == 1:
            raise UserError("a single sequence does not fit in the device's memory: choose smaller --presets")
        batch_size //= 2
        free()
        note(f"out of memory: continuing with {batch_size} sequences")


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The comparisons


def cpu_name() -> str:
    """The processor's name, and the vector instructions that PyTorch uses on it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1].strip() if found else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def settings(args: Args) -> list[Setting]:
    """The comparisons to make. Raises `UserError` for wrong options."""
    device = choose_device(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    presets = args.presets or (["tiny"] if args.quick else list(BATCH_SIZES.get(device.type, BATCH_SIZES["cpu"])))
    known = {"presets": sorted(p.stem for p in CONFIGS.glob("*.toml")), "objectives": list(OBJECTIVES)}
    for option, words in (("presets", presets), ("objectives", args.objectives)):
        for word in words:
            if word not in known[option]:
                raise UserError(f"--{option}: unknown {word!r}; choose from {', '.join(known[option])}")
    modes = {"none": [False], "compiled": [True], "both": [False, True]}[args.compile]
    every = itertools.product(presets, args.backends, modes)
    until = time.perf_counter() + 25 if args.quick else math.inf
    return [Setting(args, preset, backend, mode, device, dtype, until) for preset, backend, mode in every]


def run(args: Args, result: dict[str, Any]) -> None:
    """Measure all rows, and add them to ``result``."""
    every = settings(args)
    if not args.no_reference:
        build_llama(load_config(CONFIGS / "tiny.toml", ["--model.vocab_size", "16"]))
        import transformers

        result["machine"]["packages"]["transformers"] = transformers.__version__
    for setting in every:
        best: dict[Any, Any] = {}
        reference = None if args.no_reference else reference_arm(setting)
        for name in args.objectives:
            row = fitting(setting.batch_size, partial(measure, setting, name, reference, best))
            result["rows"].append(row)
            note(f"{setting}: {name} {row['tokens_per_s']:,.0f} tokens/s" + (
                f", {row['ratio']:.2f} times the reference's FLOPs per second" if row["ratio"] else ""))  # fmt: skip
            save(args, result)
            free()
        reference = None
        free()
        result["core"].append(fitting(setting.batch_size, partial(measure_core, setting)))
        save(args, result)
        if setting.compiled:
            torch._dynamo.reset()


def save(args: Args, result: dict[str, Any]) -> None:
    if args.json is not None:
        write_atomic(args.json, json.dumps(result, indent=1))


def read_result(path: Path) -> dict[str, Any]:
    """Read a file that --json wrote. Raises `UserError` for any other file."""
    try:
        result = json.loads(path.read_text())
        if {"rows", "core", "machine", "seed", "command"} <= result.keys():
            return result
    except (ValueError, AttributeError):
        pass
    raise UserError(f"--load: {path} is not a file that --json of this script wrote")


def main(args: Args) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages on standard error
    for option, full, quick in (("warmup", 3, 2), ("repetitions", 7, 5), ("seconds", 0.3, 0.1)):
        given = getattr(args, option)
        setattr(args, option, given or (quick if args.quick else full))
    if args.threads:
        torch.set_num_threads(args.threads)
    for path in (args.json, args.markdown):
        if path is not None:
            check_output(path)
    if args.markdown is not None and not args.markdown.exists():
        raise UserError(f"--markdown: {args.markdown} does not exist")
    result: dict[str, Any] = {"rows": [], "core": []}
    if args.load:
        loaded = [read_result(path) for path in args.load]
        for each in loaded:
            result["rows"] += each["rows"]
            result["core"] += each["core"]
        result |= {"seed": loaded[0]["seed"], "machine": loaded[0]["machine"],
                   "command": [command for each in loaded for command in each["command"]]}  # fmt: skip
    else:
        machine = environment(choose_device(args.device))
        machine["packages"]["transformers"] = "not used"
        machine["device_name"] = machine["device_name"] if "cuda" in machine["device"] else cpu_name()
        command = shlex.join(["python", "benchmarks/speed/training.py", *sys.argv[1:]])
        result |= {"seed": args.seed, "machine": machine, "command": [command]}
        with tempfile.TemporaryDirectory() as cache:  # an empty cache, so that the first step really compiles
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            # Every row compiles the same functions for another model. Beyond the default limit of 8 they would run eager.
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.accumulated_recompile_limit = 4096
            run(args, result)
    print(tables(result))
    save(args, result)
    if args.markdown is not None and result["rows"]:
        kind = result["rows"][0]["device"].partition(":")[0]
        write_atomic(args.markdown, rewrite(args.markdown.read_text(), kind, tables(result)))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
