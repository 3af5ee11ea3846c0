"""Processes for a test: one trainer (`start`), or several with the environment that torchrun gives (`Job`, `run`).

They are forked from a server that has imported everything, which takes a twentieth of the time.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import ROOT

from recurrent_db.commands.train import arguments
from recurrent_db.training import trainer

PRELOADED = ["many", "recurrent_db.store.sharded", "recurrent_db.objectives", "torch.distributed.fsdp", "torch._dynamo"]


def _main(module: str, name: str, arguments: tuple[Any, ...], environment: dict[str, str | None], log: Path) -> None:
    import torch

    for key, value in environment.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    finally:
        if "RANK" not in os.environ:
            atexit._run_exitfuncs()  # multiprocessing ends a process without them


def _script(path: str, arguments: list[str], folder: str, output: str) -> None:
    os.chdir(folder)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    sys.path.insert(0, str(Path(path).parent))
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def script(folder: Path, path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own, which leaves its output in ``folder``."""
    words = list(map(str, arguments))
    output = folder / "output"
    job = start(folder, _script, str(path), words, str(Path.cwd()), str(output), **os.environ)
    [status] = job.wait(600)
    return subprocess.CompletedProcess([str(path), *words], status or 0, output.read_text(), job.text())


def train(words: list[str]) -> None:
    """What `python train/pretrain.py WORDS` does."""
    from recurrent_db.arguments import run_and_exit
    from recurrent_db.distributed.watchdog import report_lost

    run_and_exit(lambda: report_lost(lambda: trainer.train(*arguments(words))))


class Job:
    """``world`` processes that run ``function(*arguments)``, which a module of the tests holds, with torchrun's environment;
    ``restarts`` is how often it was started before. ``alone``: one process without that environment, and with variables
    of its own (None removes one)."""

    def __init__(
        self,
        folder: Path,
        world: int,
        function: Callable[..., None],
        *arguments: Any,
        restarts: int = 0,
        alone: dict[str, str | None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process-{rank}.log" for rank in range(world)]
        before, paths = os.environ.get("PYTHONPATH"), [str(ROOT / "tests"), str(ROOT)]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the server, which starts with the first process
        context.set_forkserver_preload(PRELOADED)
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            told: dict[str, str | None] = {name: str(value) for name, value in environment.items()}
            if alone is not None:
                told = {**told, **dict.fromkeys(name for name in told if name != "OMP_NUM_THREADS"), **alone}
            what = function.__module__, function.__name__, arguments, told, log
            process = context.Process(target=_main, args=what, daemon=alone is None)
            process.start()
            self.processes.append(process)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit statuses, of a killed one minus the signal's number; None of one that is still there, which is killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def text(self, rank: int = 0) -> str:
        """What a process has printed so far."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


def run(folder: Path, world: int, function: Callable[..., None], *arguments: Any, restarts: int = 0) -> Job:
    """A job that must end well."""
    job = Job(folder, world, function, *arguments, restarts=restarts)
    codes = job.wait()
    if any(codes):
        print("\n".join(f"--- process {rank}\n{job.text(rank)}" for rank in range(world)), file=sys.stderr)
        raise AssertionError(f"exit statuses {codes}")
    return job


def start(folder: Path, function: Callable[..., None], *arguments: Any, **variables: str | None) -> Job:
    """One process that runs ``function(*arguments)`` with these environment variables."""
    return Job(folder, 1, function, *arguments, alone=variables)
