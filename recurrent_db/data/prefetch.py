"""Batches ahead of the step that reads them: gathered and pinned by one thread while the device works."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from recurrent_db.data.loader import Batch, Loader

STEPS_AHEAD = 2
"""Optimizer steps whose batches are prepared while one is computed."""


def prefetch(
    loader: Loader,
    first_step: int,
    micro_batch_size: int,
    device: torch.device,
    thread: bool | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Iterable[Batch]]:
    """For every optimizer step from ``first_step`` on, its micro-batches on ``device``: those of `Loader.micro_batches` for
    the ``rank``-th of ``world`` processes.

    With a thread the next `STEPS_AHEAD` steps are prepared in the background; for a CUDA device in pinned memory, from
    which the copy does not wait. The default takes one where batches go to another device: on the CPU gathering costs
    a hundredth of a step, and a thread would compete for the cores that compute it. Whatever the loader raises is raised
    by the step whose batch it was. The thread waits for nothing but work, so that it ends with the iterator or with
    the program, however these end.
    """
    if thread is None:
        thread = device.type != "cpu"
    if not thread:
        for step in itertools.count(first_step):
            yield (micro.to(device) for micro in loader.micro_batches(step, micro_batch_size, rank, world))

    def prepare(step: int) -> list[Batch]:
        batches = list(loader.micro_batches(step, micro_batch_size, rank, world))
        return [micro.pin() for micro in batches] if device.type == "cuda" else batches

    with ThreadPoolExecutor(1, "prefetch") as pool:
        ahead: deque[Future[list[Batch]]] = deque()
        for step in itertools.count(first_step):
            ahead.append(pool.submit(prepare, step))
            if len(ahead) > STEPS_AHEAD:
                yield (micro.to(device) for micro in ahead.popleft().result())
