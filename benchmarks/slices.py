"""Runs many long jobs in time slices, on a machine that may stop at any moment.

A job is a function that runs commands. The list of remaining jobs is computed again after each job (`pending`), because a
result can decide which other jobs are needed. Each job locks a file of its own, and its commands inherit the lock. Two calls
of a benchmark therefore share the work, and a trainer that outlived its killed parent is not started a second time.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic

ROOT = Path(__file__).parents[1]


class Job(Hashable, Protocol):
    """One piece of work. Its name must be a valid file name."""

    @property
    def name(self) -> str: ...


class Stopped(Exception):
    """The time slice is over. The job can continue later."""


class Failed(Exception):
    """A command ended with an error. The message is its last line of output."""


@dataclass
class Slice:
    """Runs jobs until none is left or the time is over.

    Args:
        work: folder for locks, logs and measured rates.
        jobs: number of parallel jobs.
        threads: CPU threads of each command.
        minutes: length of the time slice; None has no limit.
        resumable: whether a stopped job can continue later from where it was.
    """

    work: Path
    jobs: int = 1
    threads: int = 1
    minutes: float | None = None
    resumable: bool = True
    stopping: bool = False
    _live: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()

    def claim(self, made_with: dict[str, Any]) -> None:
        """Record the settings with which the runs in the folder are made, beyond those in their names.

        Raises:
            UserError: the existing runs were made with other settings.
        """
        place, text = self.work / "made-with.json", json.dumps(made_with, indent=1, sort_keys=True)
        if not place.exists():
            write_atomic(place, text)
        before = json.loads(place.read_text())
        for key, value in json.loads(text).items():
            if before.get(key) != value:
                raise UserError(f"the runs in {self.work} were made with another {key}: choose another --work")

    # -----------------------------------------------------------------------------------------------------------------
    # Commands

    def call(self, log: Path, lock: int, *words: object) -> None:
        """Run one of the project's commands and append its output to ``log``.

        Raises:
            Stopped: the command was stopped, or was not started because the slice is over.
            Failed: the command ended with an error.
        """
        with log.open("ab") as file:
            with self._guard:
                if self.stopping:
                    raise Stopped
                start = file.tell()
                file.write(("$ python " + " ".join(map(str, words)) + "\n").encode())
                file.flush()
                process = subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    cwd=ROOT,
                    stdout=file,
                    stderr=file,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT)},
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C reaches only this process, which then stops the commands
                )
                self._live[process.pid] = process
            status = process.wait()
            with self._guard:
                del self._live[process.pid]
        if self.stopping:
            raise Stopped
        if status:
            with log.open("rb") as output:
                output.seek(start)
                lines = output.read().decode(errors="replace").strip().splitlines()
            raise Failed(f"{lines[-1]} (status {status}; full output: {log})")

    def stop(self) -> None:
        """Ask the running commands to save and end, and start no others."""
        with self._guard:
            self.stopping = True
            for process in self._live.values():
                process.terminate()

    # -----------------------------------------------------------------------------------------------------------------
    # Time

    @property
    def minutes_left(self) -> float:
        if self.minutes is None:
            return float("inf")
        return self.minutes - (time.monotonic() - self.started) / 60

    def rate(self, kind: str) -> float | None:
        """Measured units of work per second for this kind of job, with this machine and number of threads."""
        return self._rates().get(f"{kind}/{self.threads}")

    def measured(self, kind: str, units: float, seconds: float) -> None:
        """Store a measured rate."""
        with self._guard:
            rates = self._rates()
            rates[f"{kind}/{self.threads}"] = units / max(seconds, 1e-9)
            write_atomic(self.work / "rates.json", json.dumps(rates, indent=1))

    def _rates(self) -> dict[str, float]:
        path = self.work / "rates.json"
        found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        return found

    # -----------------------------------------------------------------------------------------------------------------
    # The loop

    def run(
        self,
        pending: Callable[[], Sequence[Any]],
        work: Callable[[Any, int], None],
        seconds: Callable[[Any], float],
        done: Callable[[Any], None] = lambda job: None,
    ) -> list[Any]:
        """Run the jobs that ``pending`` returns, in order, until none is left or the slice is over.

        Args:
            pending: returns the jobs that can start now, most important first. Called again whenever a job has ended.
            work: does a job. It gets the job and the lock's file descriptor, for `call`. A job that raises `Stopped` is
                pending again in the next slice.
            seconds: estimates the remaining time of a job. Called only if the slice has a limit. A job that does not fit
                into the rest of the slice is not started. The exception is a resumable job that is longer than a whole
                slice: it runs until the slice ends.
            done: called in this thread after each job.

        Returns:
            The jobs that are still pending.

        Raises:
            UserError: a job's command failed.
        """
        running: dict[Future[None], Any] = {}
        begun: set[Any] = set()
        bar = tqdm(desc="runs", unit="run", disable=None)
        with self._signals(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    for job in pending() if not self.stopping else ():
                        if len(running) == self.jobs:
                            break
                        if job in begun:
                            continue
                        try:
                            expected = seconds(job) if self.minutes else 0.0
                        except Stopped:  # raised while the rate was measured
                            break
                        if not self._fits(expected):
                            continue
                        lock = self._lock(job.name)
                        if lock is None:
                            continue
                        begun.add(job)
                        note = f": about {expected / 60:.1f} of {self.minutes_left:.1f} minutes" if self.minutes else ""
                        bar.write(f"start {job.name}{note}", file=sys.stderr)
                        running[pool.submit(self._hold, lock, work, job)] = job
                    if not running:
                        return list(pending())
                    timeout = None if self.minutes is None or self.stopping else max(0.0, self.minutes_left * 60)
                    ended, _ = wait(running, timeout, FIRST_COMPLETED)
                    if not ended:
                        self.stop()
                    for future in ended:
                        job = running.pop(future)
                        try:
                            future.result()
                        except Stopped:
                            continue
                        bar.update()
                        done(job)
            except Failed as error:
                raise UserError(f"{job.name}: {error}") from None
            finally:
                self.stop()
                bar.close()

    def _fits(self, seconds: float) -> bool:
        if self.minutes is None:
            return True
        never = self.resumable and seconds > self.minutes * 60
        return self.minutes_left > 0 and (never or seconds <= self.minutes_left * 60)

    @staticmethod
    def _hold(lock: int, work: Callable[[Any, int], None], job: Any) -> None:
        try:
            work(job, lock)
        finally:
            os.close(lock)  # releases the lock, once the commands have closed it too

    def _lock(self, name: str) -> int | None:
        """A file descriptor that holds the job's lock; None if another process works on the job."""
        descriptor = os.open(self.work / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the slice early."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, lambda *_: self._stop_soon()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_soon(self) -> None:
        threading.Thread(
            target=self.stop
        ).start()  # in a thread, because a signal handler must not wait for the lock that its own thread may hold
