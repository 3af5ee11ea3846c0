"""Prepares the batches of the next steps in a thread while the device computes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from recurrent_db.data.loader import AnyBatch, StepLoader

STEPS_AHEAD = 2
"""Number of steps whose batches are prepared in advance."""


def prefetch(
    loader: StepLoader[AnyBatch],
    first_step: int,
    micro_batch_size: int,
    device: torch.device,
    thread: bool | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Iterable[AnyBatch]]:
    """For each optimizer step from ``first_step`` on, yield its micro-batches on ``device``.

    They are those of `StepLoader.micro_batches`. An error of the loader is raised at the step whose batch failed.

    Args:
        thread: prepare the next `STEPS_AHEAD` steps in a thread, for CUDA in pinned memory, from which copies do not wait.
            The thread ends with the iterator. None uses a thread unless ``device`` is the CPU: there, gathering costs a
            hundredth of a step, and a thread would compete for the cores.
        rank, world: number of this process, and number of processes.
    """
    if thread is None:
        thread = device.type != "cpu"
    if not thread:
        for step in itertools.count(first_step):
            yield (micro.to(device) for micro in loader.micro_batches(step, micro_batch_size, rank, world))

    def prepare(step: int) -> list[AnyBatch]:
        batches = list(loader.micro_batches(step, micro_batch_size, rank, world))
        return [micro.pin() for micro in batches] if device.type == "cuda" else batches

    with ThreadPoolExecutor(1, "prefetch") as pool:
        ahead: deque[Future[list[AnyBatch]]] = deque()
        for step in itertools.count(first_step):
            ahead.append(pool.submit(prepare, step))
            if len(ahead) > STEPS_AHEAD:
                yield (micro.to(device) for micro in ahead.popleft().result())
