"""Processes that hang or disappear: each becomes one line that names the process, and the end of the job."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from recurrent_db.distributed.rendezvous import rendezvous_store
from recurrent_db.errors import UserError

T = TypeVar("T")


class Watchdog:
    """A thread that turns a hang into an error that names the process the others wait for.

    Every process reports at each turn what it does (`beat`), and its watchdog copies that into a store that all share. When
    a process has made no turn for ``timeout`` seconds, its watchdog reads what the others left there. A process that
    leaves nothing any more is stopped or cut off; else the others wait for the one with the fewest turns. Then the
    watchdog ends its process, and torchrun ends or restarts the job.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.turns, self.what, self.at = 0, "starting", time.monotonic()
        self.period = min(5.0, timeout / 4)
        self._ticks = 0
        self._done = threading.Event()
        self.store = dist.PrefixStore("watchdog", rendezvous_store(False, timedelta(seconds=60)))
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, what: str) -> None:
        """This process makes progress, and does ``what`` next."""
        self.turns, self.what, self.at = self.turns + 1, what, time.monotonic()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _report(self) -> None:
        self._ticks += 1
        line = f"{self._ticks}\t{self.turns}\t{socket.gethostname()}\t{self.what}"
        self.store.set(str(self.rank), line)

    def _reports(self) -> dict[int, list[str]]:
        """By rank: ticks, turns, host, and what it does."""
        there = [rank for rank in range(self.world) if self.store.check([str(rank)])]
        return {rank: self.store.get(str(rank)).decode().split("\t", 3) for rank in there}

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and so is the job
            self._report()
            while not self._done.wait(self.period):
                self._report()
                if time.monotonic() - self.at > self.timeout:
                    self._give_up()

    def _give_up(self) -> None:
        before = self._reports()
        for _ in range(4):  # time for all to report
            time.sleep(self.period / 2)
            self._report()
        now = self._reports()
        silent = [rank for rank in range(self.world) if rank not in now or now[rank][0] == before.get(rank, [""])[0]]
        fewest = min(int(turns) for _, turns, _, _ in now.values())
        behind = silent or [rank for rank, (_, turns, _, _) in now.items() if int(turns) == fewest]
        if self.rank == min((rank for rank in now if rank not in silent), default=self.rank):
            who = "; ".join(
                f"process {rank} on {now[rank][2]}, last heard of while {now[rank][3]}"
                if rank in now
                else f"process {rank}"
                for rank in behind[:8]
            )
            why = (
                "no answer from"
                if silent
                else "all wait for"
                if len(behind) < self.world
                else "all are at the same point:"
            )
            print(f"error: no progress for {self.timeout:g} seconds (parallel.timeout); {why} {who}", file=sys.stderr)
            sys.stderr.flush()
        else:
            time.sleep(self.period)  # the line first, then the end of the job
        os._exit(1)


_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Connect", "NCCL", "Socket")


def report_lost(action: Callable[[], T]) -> T:
    """Run ``action``. If it fails because another process is gone, say so in one line and end with status 1.

    A process of several ends at once when it fails, so that the others need not wait for it.
    """
    try:
        return action()
    except (UserError, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and any(word in text for word in _LOST):
            print(
                f"error (process {dist.get_rank()}): lost contact with another process: {text[:200]}", file=sys.stderr
            )
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
