"""Ends a job in which a process hangs or disappears, with one line that names the process."""

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
    """A thread that turns a hang into an error. The error names the process that the others wait for.

    Each process calls `beat` as it makes progress, and its watchdog copies the number of beats and the current activity
    into a shared store. If its process has not called `beat` for ``timeout`` seconds, the watchdog reads the reports of
    all processes. A process whose report does not change is stopped or disconnected. If all still report, the process with
    the fewest beats is the one that the others wait for. The watchdog then ends its own process, and torchrun ends or
    restarts the job.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.beats, self.what, self.at = 0, "starting", time.monotonic()
        self.period = min(5.0, timeout / 4)
        self._ticks = 0
        self._done = threading.Event()
        self.store = dist.PrefixStore("watchdog", rendezvous_store(False, timedelta(seconds=60)))
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, what: str) -> None:
        """Report progress. ``what`` is what this process does next."""
        self.beats, self.what, self.at = self.beats + 1, what, time.monotonic()

    def stop(self) -> None:
        """End the thread. The process may then take as long as it likes."""
        self._done.set()
        self._thread.join()

    def _report(self) -> None:
        self._ticks += 1
        line = f"{self._ticks}\t{self.beats}\t{socket.gethostname()}\t{self.what}"
        self.store.set(str(self.rank), line)

    def _reports(self) -> dict[int, list[str]]:
        """Reports by rank: number of reports, number of beats, host, activity."""
        present = [rank for rank in range(self.world) if self.store.check([str(rank)])]
        return {rank: self.store.get(str(rank)).decode().split("\t", 3) for rank in present}

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store disappears when the job ends
            self._report()
            while not self._done.wait(self.period):
                self._report()
                if time.monotonic() - self.at > self.timeout:
                    self._give_up()

    def _give_up(self) -> None:
        before = self._reports()
        for _ in range(4):  # give all processes time to report
            time.sleep(self.period / 2)
            self._report()
        now = self._reports()
        silent = [rank for rank in range(self.world) if rank not in now or now[rank][0] == before.get(rank, [""])[0]]
        fewest = min(int(beats) for _, beats, _, _ in now.values())
        behind = silent or [rank for rank, (_, beats, _, _) in now.items() if int(beats) == fewest]
        if self.rank == min((rank for rank in now if rank not in silent), default=self.rank):
            who = "; ".join(
                f"process {rank} on {now[rank][2]}, last report: {now[rank][3]}" if rank in now else f"process {rank}"
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
            time.sleep(self.period)  # another process prints the line before this one ends the job
        os._exit(1)


_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Connect", "NCCL", "Socket")


def report_lost(action: Callable[[], T]) -> T:
    """Run ``action`` and return its result. If another process is lost, print one line and exit with status 1.

    Among several processes any other failure, except a `UserError`, also ends this process at once with its traceback.
    The others would otherwise wait for it.
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
