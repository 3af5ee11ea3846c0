"""Many long jobs, in slices of time, on a machine that may stop at any moment.

A job is a function that calls commands. What is to be done is asked again after each job (`pending`), since what one
job found can decide which others are wanted. Each job holds a lock on a file of its own, and its commands inherit it: two
calls of a benchmark share the work, and a trainer that outlived its killed parent is not started a second time.
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
    """One piece of work, by a name that is a file's."""

    @property
    def name(self) -> str: ...


class Stopped(Exception):
    """The slice is over: the job was left where it can go on."""


class Failed(Exception):
    """A command ended with an error; its last line."""


@dataclass
class Slice:
    """Runs jobs until nothing is left or the time is over.

    Args:
        work: folder of locks, logs and measured rates.
        jobs: commands at once.
        threads: of each command.
        minutes: length of the slice; none has no end.
        resumable: whether a job that is stopped goes on later from where it was.
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
        """Write down what the runs in the folder are made with, beside what their names say; they go on with nothing else.

        Raises:
            UserError: runs that are there were made with other things.
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
        """Run one of the project's commands to its end, its output appended to ``log``.

        Raises:
            Stopped: it was told to stop, or was not started any more.
            Failed: it ended with an error.
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
                    start_new_session=True,  # Ctrl-C reaches this process alone, which tells them
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
            raise Failed(f"{lines[-1]} (status {status}; all of it: {log})")

    def stop(self) -> None:
        """Tell the running commands to save and end; start no other."""
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
        """Measured units of work a second of this kind of job, on this machine and with this many threads."""
        return self._rates().get(f"{kind}/{self.threads}")

    def measured(self, kind: str, units: float, seconds: float) -> None:
        """Remember a rate."""
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
        """Do what ``pending`` names, first things first, until nothing is pending or the slice is over.

        Args:
            pending: the jobs that can be started now, most wanted first; asked again whenever one has ended.
            work: does a job; gets the job and the lock's file descriptor, for `call`. What it leaves undone by raising
                `Stopped` is pending again in the next slice.
            seconds: how long a job will take, or goes on to take; asked only where there is an end. A job that does not
                fit into what is left of the slice is not started, unless it is resumable and would fit into no slice of this
                length: then it goes as far as it gets.
            done: called in this thread after each job.

        Returns:
            the jobs that are still pending.

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
                        except Stopped:  # while it was measured
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
            os.close(lock)  # and thereby gives it up, once no command holds it either

    def _lock(self, name: str) -> int | None:
        """A file descriptor that holds the job's lock, or None where another process does the job."""
        descriptor = os.open(self.work / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the slice early."""
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
        ).start()  # a handler must not wait for the guard, which its own thread may hold
