"""Measures a training step's memory: the peak from the allocator's own events, and a split by what holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recurrent_db.distributed.team import local
from recurrent_db.optim.ema import EMA


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements; of a sharded tensor, this process's part."""
    return sum(t.numel() * t.element_size() for t in map(local, tensors))


class MemorySplit:
    """Bytes by what holds them in this process: parameters, gradients, optimizer, weight average, activations.

    Activations are what the forward pass of a micro-batch leaves alive for its backward. On CUDA they are the allocator's
    difference. On the CPU they are the sum over autograd's saved tensors, each storage once, parameters not counted.
    Buffers inside single operations are not part of the split; the peak has them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.activations: dict[int, int] = {}
        """Bytes by the number of backpropagated iterations: nothing else changes them from step to step."""
        self._own = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
        self._constant: dict[str, int] = {}

    @contextmanager
    def forward(self, device: torch.device, depth: int) -> Iterator[None]:
        """Watch the forward pass of a micro-batch, the first one of each ``depth``."""
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
                # Parameters that are gathered for the pass are other tensors than the shards.
                parameter = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
                if storage.data_ptr() not in self._own and not parameter:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            self.activations[depth] = sum(saved.values())

    def row(self, optimizer: torch.optim.Optimizer, ema: EMA | None, depth: int) -> dict[str, int]:
        """Columns for the metrics, at a step's end. Gradients are as large as the parameters that have them."""
        if not self._constant.get("memory/optimizer_bytes"):  # the optimizer holds nothing before a step is taken
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
    """Most bytes of tensors that ``action`` holds at once, above what was held before it.

    On CUDA this is the allocator's peak. On the CPU it is the running sum of the allocator's events, which the profiler
    records: exact for PyTorch's own tensors, without what libraries allocate for themselves.
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
