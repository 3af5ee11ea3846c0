"""Measures the memory of a training step: its peak, and its split into parameters, gradients, activations and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recurrent_db.distributed.team import local
from recurrent_db.optim.ema import EMA


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements. Of a sharded tensor, only this process's part counts."""
    return sum(t.numel() * t.element_size() for t in map(local, tensors))


class MemorySplit:
    """Splits this process's memory in bytes: parameters, gradients, optimizer, EMA, activations.

    Activations are the tensors that the forward pass of a micro-batch keeps for its backward pass. On CUDA they are the
    growth of the allocated memory. On the CPU they are the sum of autograd's saved tensors, counting each storage once and
    no parameters. Temporary buffers inside operations are not part of the split, but of the peak.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.activations: dict[int, int] = {}
        """Bytes of activations by the number of core passes with gradient. Nothing else changes them between steps."""
        self._own = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
        self._constant: dict[str, int] = {}
        self._with_state = 0

    @contextmanager
    def forward(self, device: torch.device, depth: int) -> Iterator[None]:
        """Context of a micro-batch's forward pass. Measures the first one of each ``depth`` (core passes with gradient)."""
        if depth in self.activations:
            yield
        elif device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            yield
            self.activations[depth] = torch.cuda.memory_allocated(device) - before
        else:
            saved: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                # FSDP gathers parameters into tensors other than the shards.
                parameter = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
                if storage.data_ptr() not in self._own and not parameter:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            self.activations[depth] = sum(saved.values())

    def row(self, optimizer: torch.optim.Optimizer, ema: EMA | None, depth: int) -> dict[str, int]:
        """Columns of metrics.jsonl at the end of a step. Gradients are as large as the parameters that have them."""
        # A parameter has no optimizer state before its first step: other blocks' parameters may get theirs later.
        if not self._constant.get("memory/optimizer_bytes") or self._with_state != len(optimizer.state):
            self._with_state = len(optimizer.state)
            parameters = list(self.model.parameters())
            states = (v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, Tensor))
            self._constant = {
                "memory/parameters_bytes": tensor_bytes(parameters),
                "memory/gradients_bytes": tensor_bytes(p for p in parameters if p.requires_grad),
                "memory/optimizer_bytes": tensor_bytes(states),
                "memory/average_bytes": tensor_bytes(ema.shadow.values()) if ema is not None else 0,
            }
        return {**self._constant, "memory/activations_bytes": self.activations[depth]}


def peak_live_bytes(action: Callable[[], object], device: torch.device | None = None) -> int:
    """Peak memory in bytes of the tensors that ``action`` allocates, above the memory in use before it.

    On CUDA this is the allocator's peak. On the CPU it is the largest running sum of the allocator events that PyTorch's
    profiler records. This is exact for PyTorch's tensors, but omits memory that libraries allocate themselves.
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
