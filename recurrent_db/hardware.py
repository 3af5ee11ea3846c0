"""What the machine is and what it can do at best."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recurrent_db.errors import UserError

PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "RTX 4090": 165e12,
    "RTX 5090": 210e12, "RTX 3090": 71e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12,
}  # fmt: skip
"""Dense bf16 (V100: fp16) matrix FLOPs per second by device name, from the makers' data sheets."""


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


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOPs per second that utilisation is a share of: the table's on a GPU, measured on a CPU; None if unknown."""
    if device.type != "cuda":
        return measured_matmul_flops()
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


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
        "command": sys.argv,
    }
