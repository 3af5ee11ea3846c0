"""Peak memory of a piece of work, counted from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_live_bytes(action: Callable[[], object], device: torch.device | None = None) -> int:
    """Most bytes of tensors that ``action`` holds at once, above what was held before it.

    On CUDA the allocator's peak; on the CPU the running sum of the allocator's events, which the profiler records:
    exact for PyTorch's own tensors, blind to what libraries allocate for themselves.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    results = profile.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, change in events:
        live += change
        peak = max(peak, live)
    return peak
