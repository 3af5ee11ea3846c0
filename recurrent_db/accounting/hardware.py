"""What the machine is, and the best it can do: devices, peak rates, energy, memory, environment."""

from __future__ import annotations

import itertools
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recurrent_db.config import ModelConfig
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes

PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12,
    "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 149.7e12, "A10": 125e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX PRO 6000": 503e12, "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12, "RTX 5090": 209.5e12, "RTX 5080": 112.6e12, "RTX 5070 Ti": 87.9e12, "RTX 4090": 165.2e12,
    "RTX 4080 SUPER": 104.4e12, "RTX 4080": 97.5e12, "RTX 4070 Ti SUPER": 88.2e12, "RTX 4070 Ti": 80.2e12,
    "RTX 3090 Ti": 80e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12,
}  # fmt: skip
"""Dense bf16 matrix FLOPs per second with fp32 accumulation (V100, T4: fp16) by a part of the device's name, from the
makers' data sheets. The longest part that matches counts, so ``H100 PCIe`` is not taken for ``H100``."""


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of a GPU besides its peak. Bytes, and bytes per second one way."""

    memory: float
    intra: float
    """Its links to the others of its node."""
    inter: float
    """Its share of its node's network."""


GPUS = {
    "GB200": Gpu(186e9, 900e9, 50e9), "B200": Gpu(180e9, 900e9, 50e9), "GH200": Gpu(96e9, 450e9, 50e9),
    "H200": Gpu(141e9, 450e9, 50e9), "H200 NVL": Gpu(141e9, 450e9, 50e9), "H100": Gpu(80e9, 450e9, 50e9),
    "H100 NVL": Gpu(94e9, 300e9, 50e9), "H100 PCIe": Gpu(80e9, 64e9, 50e9), "A100": Gpu(80e9, 300e9, 25e9),
    "L40S": Gpu(48e9, 32e9, 25e9), "A10": Gpu(24e9, 32e9, 12.5e9), "L4": Gpu(24e9, 32e9, 12.5e9),
    "V100": Gpu(32e9, 150e9, 12.5e9), "T4": Gpu(16e9, 16e9, 6.25e9), "RTX 4090": Gpu(24e9, 32e9, 12.5e9),
    "RTX 5090": Gpu(32e9, 64e9, 12.5e9), "RTX 3090": Gpu(24e9, 32e9, 12.5e9),
}  # fmt: skip
"""Memory and links from the makers' data sheets: NVLink (half of the sum of both directions that they quote), else PCIe x16;
network as NVIDIA's own 8-GPU systems have it (DGX A100: 200 Gb/s a GPU; DGX H100, H200 and B200: 400 Gb/s), elsewhere 100
Gb/s (200 for L40S, 50 for T4). A100 is the 80 GB version."""


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises `UserError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"run.device = {name!r} is no device; use cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"run.device = {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def measured_matmul_flops(size: int = 768, seconds: float = 0.15) -> float:
    """FLOPs per second of fp32 matrix products on this CPU with the current number of threads: the best of several."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    torch.mm(a, b)
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def product_seconds(
    rows: int, n_in: int, n_out: int, dtype: torch.dtype = torch.float32, seconds: float = 0.03
) -> tuple[float, float]:
    """Seconds on this CPU of a linear layer's matrix products alone, the best of at least three: its forward, and its
    backward (gradient to the input and to the weight). x: (rows, n_in), weight: (n_out, n_in)."""
    x, weight, dy = (torch.rand(shape).to(dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))

    def best(a: torch.Tensor, b: torch.Tensor) -> float:
        out = torch.mm(a, b)
        times: list[float] = []
        while len(times) < 3 or sum(times) < seconds:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - start)
        return min(times)

    return best(x, weight.T), best(dy, weight) + best(dy.T, x)


def attainable_flops(
    model: ModelConfig, passes: Passes, rows: int, dtype: torch.dtype, best: dict[Any, tuple[float, float]]
) -> float:
    """FLOPs per second of a training step of ``rows`` tokens that only did its products with weights.

    Each product has its own size and count, and runs as fast as this CPU runs it alone. A step can come near this rate,
    unlike that of one large product. ``best`` keeps the best times between calls: the machine may be busy during one.
    """
    width, hidden = model.d_model, model.d_mlp
    ends, grad = model.n_prelude + model.n_coda, passes.core_grad + passes.clean_grad
    runs = passes.core_no_grad + grad
    blocks = ends + model.n_core * runs, ends + model.n_core * grad
    layers = [
        *((*shape, *blocks) for shape in ((width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width))),
        (width, model.vocab_size, 1, 1),
    ]
    if model.injection != "add":
        layers.append((2 * width if model.injection == "linear" else width, width, runs, grad))
    flops = seconds = 0.0
    for n_in, n_out, forwards, backwards in layers:
        now, kept = product_seconds(rows, n_in, n_out, dtype), (rows, n_in, n_out, dtype)
        before = best.get(kept, now)
        best[kept] = min(before[0], now[0]), min(before[1], now[1])
        flops += 2 * rows * n_in * n_out * (forwards + 2 * backwards)
        seconds += forwards * best[kept][0] + backwards * best[kept][1]
    return flops / seconds


def table_peak_flops(device_name: str) -> float | None:
    """The table's peak for a GPU by its name. None for a GPU that the table lacks, even if it has a sibling, and for a
    slice of a GPU (MIG)."""
    if " MIG " in device_name:
        return None
    end = r"(?![A-Za-z0-9]| (?:Ti|SUPER|D|Laptop)\b)"
    found = [known for known in PEAK_FLOPS if re.search(rf"(?<![A-Za-z0-9]){re.escape(known)}{end}", device_name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def peak_flops(device: torch.device, override: float | None = None) -> float | None:
    """Peak FLOPs per second, for utilisation: ``override`` if given; on a GPU the table's, or None; on a CPU the measured
    rate of a matrix product."""
    if override is not None:
        return override
    if device.type != "cuda":
        return measured_matmul_flops()
    return table_peak_flops(torch.cuda.get_device_name(device))


def peak_note(device: torch.device, peak: float | None, given: bool) -> str:
    """A line on what utilisation is a share of, and whether that was ``given``, measured, or found in the table."""
    note = f"utilisation is a share of {peak:.3g} FLOPs/s" if peak else "utilisation: no peak known for this device"
    if given:
        return note
    return note + (", measured" if device.type != "cuda" else ", from the table" if peak else "; set --run.peak_flops")


class EnergyMeter:
    """Energy that a GPU has used since the last reading, from NVML's counter (Volta and later, whole device).

    Needs the package nvidia-ml-py (extra `gpu`). Without it, without a GPU or without a counter it reads None.
    """

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], int] | None = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._read = lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            self._last = self._read()
        except Exception:  # no package, no driver, no counter: energy is then not known, and nothing else changes
            self._read = None

    def joules(self) -> float | None:
        """Joules since the last call (or since the meter was made)."""
        if self._read is None:
            return None
        try:
            now = self._read()
        except Exception:
            self._read = None
            return None
        used, self._last = (now - self._last) / 1000, now
        return used


class UpdateClock:
    """Measures the share of a step's time that its update takes: clipping, optimizer, weight average.

    Each step has three marks: its start, its update's start, its end. On CUDA they are events in the device's stream; only
    `share` waits for them.
    """

    def __init__(self, device: torch.device, worth_a_note: bool = False) -> None:
        self.device, self.worth_a_note = device, worth_a_note
        self.update_seconds = self.step_seconds = 0.0
        """Sums over the steps that `share` was asked about."""
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def share(self) -> float:
        """Over the steps since the last call; there must have been one."""
        if self.device.type == "cuda":
            self._marks[-1].synchronize()
            between = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._marks)]
        else:
            between = [b - a for a, b in itertools.pairwise(self._marks)]
        self._marks.clear()
        update, step = sum(between[1::3]), sum(between[0::3]) + sum(between[1::3])
        self.update_seconds += update
        self.step_seconds += step
        return update / step

    def note(self) -> str:
        """The share so far as the end of a line; empty where the update takes the few percent that AdamW takes."""
        if not self.worth_a_note or not self.step_seconds:
            return ""
        return f", update {self.update_seconds / self.step_seconds:.1%} of the time"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that holds ``folder``, with ``-dirty`` where tracked files differ; None outside of one."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return result.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hide_secrets(text: str) -> str:
    """``text`` without the values of environment variables whose names say that they are secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name.upper()):
            text = text.replace(value, f"({name})")
    return text


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and commit of a run. No environment variables: they may hold secrets."""
    packages = {}
    for name in ("torch", "numpy", "sentencepiece", "safetensors", "tyro", "recurrent-db"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": str(device),
        "device_name": name,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(Path(__file__).parent),
        "command": [hide_secrets(word) for word in sys.argv],
    }
