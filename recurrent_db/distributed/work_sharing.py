"""Divides one list of work among the processes that torchrun started.

Every process holds the whole list, works on its part, and receives all results. The result of an item does not depend on
the number of processes.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from recurrent_db.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that divide a list of work. The default is this process alone."""

    rank: int = 0
    world: int = 1
    group: Any = None
    """gloo process group that results are exchanged through."""

    @classmethod
    def join(cls) -> Processes:
        """Join the existing process group, or else the processes of torchrun's environment. Uses gloo, on the CPU.

        Raises:
            UserError: the other processes cannot be reached.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2:
                return cls()
            try:
                # The slowest process may need long for its part.
                dist.init_process_group("gloo", timeout=timedelta(weeks=1))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"cannot reach the other processes: {error}") from None
            # If the group is still open when the interpreter exits, gloo's threads sometimes abort the process.
            atexit.register(dist.destroy_process_group)
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def my_part(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part of the list: every ``world``-th item, so that a sorted list is divided evenly."""
        return work[self.rank :: self.world]

    def merge(self, results: Sequence[Any]) -> list[Any]:
        """Gather the results of all processes, in the order of the whole list. All processes must call it.

        Args:
            results: JSON values, one for each item of `my_part`. Floats are transferred exactly.
        """
        if self.world == 1:
            return list(results)
        mine = torch.frombuffer(bytearray(json.dumps(list(results)).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.group)
        room = max(int(size) for size in sizes)
        padded = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(padded, torch.nn.functional.pad(mine, (0, room - len(mine))), group=self.group)
        parts = [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(padded, sizes, strict=True)]
        merged: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            merged[rank :: self.world] = part
        return merged
