"""Several processes for a test: each runs one function, with what torchrun would tell it, but forked from a server that
has imported everything, which takes a twentieth of the time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import ROOT

from recurrent_db.commands.train import arguments
from recurrent_db.training import trainer

PRELOADED = ["many", "recurrent_db.store.sharded", "recurrent_db.objectives", "torch.distributed.fsdp", "torch._dynamo"]


def _main(module: str, name: str, arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    import torch

    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    getattr(importlib.import_module(module), name)(*arguments)


def train(words: list[str]) -> None:
    """What `python train/pretrain.py WORDS` does."""
    from recurrent_db.arguments import run_and_exit
    from recurrent_db.distributed.watchdog import report_lost

    run_and_exit(lambda: report_lost(lambda: trainer.train(*arguments(words))))


class Job:
    """``world`` processes that run ``function(*arguments)``, which a module of the tests holds, with torchrun's environment;
    ``restarts`` is how often it was started before."""

    def __init__(
        self, folder: Path, world: int, function: Callable[..., None], *arguments: Any, restarts: int = 0
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
            told = {name: str(value) for name, value in environment.items()}
            what = function.__module__, function.__name__, arguments, told, log
            process = context.Process(target=_main, args=what, daemon=True)
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
