"""The machine: devices, peak FLOP rates, energy, memory, software environment."""

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
"""Dense bf16 matrix FLOPs per second with fp32 accumulation (V100, T4: fp16), from NVIDIA's data sheets. A key is a part of
a device's name. The longest key that matches is used, so ``H100 PCIe`` is not taken for ``H100``."""


@dataclass(frozen=True)
class Gpu:
    """Memory and links of a GPU."""

    memory: float
    """Bytes of memory."""
    intra: float
    """Bytes per second, one way, of its links to the other GPUs of its node."""
    inter: float
    """Bytes per second, one way, of its share of its node's network."""


GPUS = {
    "GB200": Gpu(186e9, 900e9, 50e9), "B200": Gpu(180e9, 900e9, 50e9), "GH200": Gpu(96e9, 450e9, 50e9),
    "H200": Gpu(141e9, 450e9, 50e9), "H200 NVL": Gpu(141e9, 450e9, 50e9), "H100": Gpu(80e9, 450e9, 50e9),
    "H100 NVL": Gpu(94e9, 300e9, 50e9), "H100 PCIe": Gpu(80e9, 64e9, 50e9), "A100": Gpu(80e9, 300e9, 25e9),
    "L40S": Gpu(48e9, 32e9, 25e9), "A10": Gpu(24e9, 32e9, 12.5e9), "L4": Gpu(24e9, 32e9, 12.5e9),
    "V100": Gpu(32e9, 150e9, 12.5e9), "T4": Gpu(16e9, 16e9, 6.25e9), "RTX 4090": Gpu(24e9, 32e9, 12.5e9),
    "RTX 5090": Gpu(32e9, 64e9, 12.5e9), "RTX 3090": Gpu(24e9, 32e9, 12.5e9),
}  # fmt: skip
"""Memory and links of GPUs by name, from NVIDIA's data sheets. A100 is the 80 GB version.

Links within a node are NVLink (half of the quoted sum of both directions), or else PCIe x16. The network is that of NVIDIA's
own 8-GPU systems (DGX A100: 200 Gb/s per GPU; DGX H100, H200 and B200: 400 Gb/s), for other GPUs 100 Gb/s (L40S: 200, T4:
50)."""


def choose_device(name: str) -> torch.device:
    """The device called ``name``: "cpu", "cuda", "cuda:N", or "auto" (CUDA if available).

    Raises:
        UserError: this machine has no such device, or this project does not support it. Apple's mps is not supported,
            because it has no float64, in which noise levels, rotary angles and likelihoods are computed.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    if name == "cpu":
        return torch.device(name)
    if not re.fullmatch(r"cuda(:[0-9]{1,3})?", name):
        reason = "has no float64, so it is not supported" if name.startswith("mps") else "is not supported"
        raise UserError(f"device {name!r} {reason}: use cpu, cuda, cuda:N or auto")
    index = int(name.partition(":")[2] or 0)
    if index >= found:
        raise UserError(f"device {name!r} does not exist: this machine has {found} CUDA devices")
    return torch.device(name)


def measured_matmul_flops(size: int = 768, seconds: float = 0.15) -> float:
    """FLOPs per second of an fp32 product of two (size, size) matrices on this CPU, with the current number of threads.

    The best of all repetitions within ``seconds``, and of at least one on a busy machine.
    """
    a, b = torch.rand(size, size), torch.rand(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    torch.mm(a, b)
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def product_seconds(
    rows: int, n_in: int, n_out: int, dtype: torch.dtype = torch.float32, seconds: float = 0.03
) -> tuple[float, float]:
    """Time the matrix products of a linear layer on this CPU. The input is (rows, n_in), the weight (n_out, n_in).

    Returns:
        Seconds of the forward pass, and of the backward pass (gradients of input and weight). Each product is timed at
        least three times, and the best time counts.
    """
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
    """Upper bound on the FLOPs per second of a training step on this CPU: a step that only multiplies by its weights.

    Each product is timed alone at its own size. A step can come close to this rate, unlike the rate of one large product.

    Args:
        rows: tokens of the step.
        best: best times so far, updated in place. Keep it between calls, because the machine may be busy during one.
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
    """The entry of `PEAK_FLOPS` for a GPU. None if the table lacks exactly this model, and for a slice of a GPU (MIG)."""
    if " MIG " in device_name:
        return None
    end = r"(?![A-Za-z0-9]| (?:Ti|SUPER|D|Laptop)\b)"
    found = [known for known in PEAK_FLOPS if re.search(rf"(?<![A-Za-z0-9]){re.escape(known)}{end}", device_name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def peak_flops(device: torch.device, override: float | None = None) -> float | None:
    """Peak FLOPs per second of a device, the denominator of MFU.

    ``override`` if given; else `table_peak_flops` for a GPU (may be None), and `measured_matmul_flops` for a CPU.
    """
    if override is not None:
        return override
    if device.type != "cuda":
        return measured_matmul_flops()
    return table_peak_flops(torch.cuda.get_device_name(device))


def peak_note(device: torch.device, peak: float | None, given: bool) -> str:
    """A log line that names the peak, and whether it was measured, found in the table, or ``given`` by the user."""
    note = f"MFU is relative to {peak:.3g} FLOPs/s" if peak else "MFU: the peak of this device is unknown"
    if given:
        return note
    return note + (", measured" if device.type != "cuda" else ", from the table" if peak else "; set --run.peak_flops")


class EnergyMeter:
    """Reads the energy use of a GPU from NVML's counter (Volta and later, whole device).

    It needs the package nvidia-ml-py (extra `gpu`). Without the package, a GPU or a counter, `joules` returns None.
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
        except Exception:  # no package, driver or counter: the energy is unknown
            self._read = None

    def joules(self) -> float | None:
        """Joules since the previous call, or since construction; None if unknown."""
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
    """Measures the share of a step's time that its update takes: clipping, optimizer, EMA.

    Call `mark` three times per step: at its start, at the start of the update, and at its end. On CUDA a mark is an event in
    the device's stream, and only `share` waits for it.

    Args:
        worth_a_note: `note` returns the share.
    """

    def __init__(self, device: torch.device, worth_a_note: bool = False) -> None:
        self.device, self.worth_a_note = device, worth_a_note
        self.update_seconds = self.step_seconds = 0.0
        """Sums over all steps up to the last call of `share`."""
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Record the current time."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def share(self) -> float:
        """The update's share of the time (0 to 1) over the steps since the previous call; at least one is needed."""
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
        """The update's share so far as the end of a log line. Empty without ``worth_a_note``, as for AdamW."""
        if not self.worth_a_note or not self.step_seconds:
            return ""
        return f", update {self.update_seconds / self.step_seconds:.1%} of the time"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes so far: allocated by PyTorch on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_commit(folder: Path) -> str | None:
    """Git commit of the checkout that holds ``folder``, with ``-dirty`` if tracked files differ. None without a checkout."""

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
    """Replace the values of environment variables with secret-sounding names in ``text``."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name.upper()):
            text = text.replace(value, f"({name})")
    return text


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and command line of a run. Environment variables are left out: they may hold secrets."""
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
