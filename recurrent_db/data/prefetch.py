"""Prepares batches ahead of the step that reads them: a thread gathers and pins them while the device works."""

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
    """Yield the micro-batches of every optimizer step from ``first_step`` on, on ``device``: `Loader.micro_batches` of
    process ``rank`` of ``world``.

    With ``thread``, a thread prepares the next `STEPS_AHEAD` steps, for a CUDA device in pinned memory, from which the
    copy does not wait. The default uses a thread if batches go to another device: on the CPU gathering costs a hundredth
    of a step, and a thread would compete for the cores. An error of the loader is raised by the step whose batch it was.
    The thread ends with the iterator or the program.
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
