"""Splits the time of a training step by groups of operations and by phase.

PyTorch's profiler records the time of each operation without the operations that it calls: its CPU time on a CPU, the time
of its kernels on CUDA. Each operation belongs to one of `GROUPS` by its name, or by the name of the operation that called
it. The profiler slows each operation down, so the many small operations of a small model look more expensive than they
are. Measure the time of a whole step without the profiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OPTIMIZER = "optimizer, clipping"
LOSS = "softmax, loss"
OTHER = "other"

GROUPS = {
    "attention": r"(?i).*(scaled_dot_product|flash_?att|flex_att|efficient_att|sdpa).*",
    "matmul": r"(add|b|badd)?mm(_|\.out)?|_?scaled_mm|_grouped_mm|matmul|linear|einsum|.*(_linear|convolution).*",
    LOSS: r"(?i).*(softmax|nll_loss|cross_?entropy).*|gather|scatter(_add)?_?",
    OPTIMIZER: r"_fused_adamw_|_foreach_.*|Optimizer\..*",
    "embedding": r"embedding.*|index_select",
    "random numbers": r"(normal|uniform|random|bernoulli|exponential)_?|special_ndtri|erfinv_?",
    "copies": r"copy_|_?to_copy|to|clone|contiguous|(cat|stack)(\.out)?|fill_|zero_|(zeros|ones|full|empty)(_like)?"
    r"|(constant_)?pad(_nd)?|_reshape_alias|slice_backward|select_backward|Mem(cpy|set).*",
    "norm, elementwise": r"(add|sub|rsub|mul|div|addcmul|addcdiv|lerp|neg|abs|reciprocal|square|r?sqrt|pow|exp2?|log|cos|sin"
    r"|silu|sigmoid|tanh|clamp(_min|_max)?|minimum|maximum|where|masked_fill|complex|polar|sum|mean|sum_to_size|cumsum|any|all"
    r"|diff|eq|ne|ge|gt|le|lt|bitwise_\w+|logical_\w+|mv|addmv|dot)_?|silu_backward|linalg_vector_norm|.*(rms|layer)_norm.*"
    r"|_?(Fused|Scaled)R(MS|ms).*|_SwiGLU.*|_RotatedQKV.*"
    r"|.*Compiled(Fx|Func).*|Torch-Compiled Region.*|triton_.*|.*cpp_fused.*",
}
"""Group -> pattern of operation names without namespace. The first pattern that matches the whole name decides.

Names without a match are `OTHER`: views, dispatch, autograd's bookkeeping. Compiled code counts as elementwise, even if it
contains norms, softmax or lookups. Its matrix products and attention are separate operations."""

_PATTERNS = {group: re.compile(pattern) for group, pattern in GROUPS.items()}
_PHASES = ("forward", "backward", "update")


def group_of(name: str, callers: tuple[str, ...] = ()) -> str:
    """The group of an operation.

    Everything inside a range called ``update`` is `OPTIMIZER`. Everything inside the linear cross-entropy except its matrix
    products is `LOSS`.

    Args:
        callers: names of the operations that called it, nearest first.
    """
    if "update" in callers or name == "update":
        return OPTIMIZER
    short = name.rpartition("::")[2]
    group = next((group for group, pattern in _PATTERNS.items() if pattern.fullmatch(short)), OTHER)
    if group != "matmul" and any("LinearCrossEntropy" in caller for caller in callers):
        return LOSS
    return group


@dataclass(frozen=True)
class TimeSplit:
    """Seconds of one step by group and by phase, measured under the profiler."""

    by_group: dict[str, float]
    by_phase: dict[str, float]

    @property
    def outside(self) -> float:
        """Share of the time outside matrix products and attention (0 to 1)."""
        total = sum(self.by_group.values())
        return 1 - (self.by_group["matmul"] + self.by_group["attention"]) / total if total else 0.0


def time_split(step: Callable[[], object], device: torch.device, steps: int = 2) -> TimeSplit:
    """Profile ``steps`` calls of ``step``, and return the mean over them.

    ``step`` must mark its phases with `torch.profiler.record_function`: ``forward``, ``backward``, ``update``. Operations
    outside these ranges count as forward.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    by_group = dict.fromkeys((*GROUPS, OTHER), 0.0)
    by_phase = dict.fromkeys(_PHASES, 0.0)
    events: list[Any] = list(profile.events() or [])
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time is already in the operation that launched it
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        callers, parent = [], event.cpu_parent
        while parent is not None:
            callers.append(parent.name)
            parent = parent.cpu_parent
        names = [event.name, *callers]
        if "update" in names:
            phase = "update"
        else:  # on CUDA the backward pass runs in its own thread, outside the range
            back = any(name == "backward" or name.startswith("autograd::engine") for name in names)
            phase = "backward" if back else "forward"
        by_group[group_of(event.name, tuple(callers))] += microseconds / 1e6 / steps
        by_phase[phase] += microseconds / 1e6 / steps
    return TimeSplit(by_group, by_phase)
