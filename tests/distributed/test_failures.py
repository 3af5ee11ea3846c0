"""Several processes: kills, lost nodes, signals and hangs, and what is left of the run after them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import many
import pytest
from dist_runs import assert_equal, everything, rows, train, words
from helpers import ROOT

from recurrent_db.commands.train import arguments
from recurrent_db.store.folder import fault, find_checkpoint, list_checkpoints
from recurrent_db.training import trainer

# Seconds: the start of two processes on a busy machine must fit, in which neither has a turn to tell of.
PATIENCE = 20
SHORT = ["--run.checkpoint_every", 5, "--run.log_every", 1, "--optim.ema_decay", 0.9, "--eval.points", 0]


def wait_for_rows(run: Path, more_than: int, job: many.Job | None = None) -> None:
    end = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(rows_so_far(run)) <= more_than:
        if job is not None and any(p.exitcode for p in job.processes):
            raise AssertionError([job.text(rank) for rank in range(len(job.processes))])
        assert time.monotonic() < end, "no progress"
        time.sleep(0.005)


def rows_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(("mode", "background", "moment"),
    [("fsdp", "true", "step"), ("fsdp", "false", "checkpoint"), ("ddp", "true", "checkpoint")])  # fmt: skip
def test_kill_9_of_one_of_two_processes(data: Path, tmp_path: Path, mode: str, background: str, moment: str) -> None:
    """Its fellow ends at once; started anew, as torchrun does it, the run ends with the bits of an undisturbed one."""
    options = ["--objective.name", "denoise", "--budget.steps", 14, "--parallel.mode", mode, *SHORT,
               "--parallel.async_checkpoints", background]  # fmt: skip
    whole = train(data, tmp_path / "whole", *options, world=2)
    run, rng = tmp_path / "run", random.Random(f"{mode} {moment}")
    job = many.Job(tmp_path / "logs", 2, many.train, words(data, run, *options))
    if moment == "step":
        wait_for_rows(run, 6, job)
        time.sleep(rng.random() / 20)
    else:
        end = time.monotonic() + 300
        while not list((run / "checkpoints").glob(".writing-step-0000001*")) and time.monotonic() < end:
            assert all(process.exitcode is None for process in job.processes), job.text(0)
    os.kill(job.processes[rng.randrange(2)].pid, signal.SIGKILL)
    assert sorted(job.wait(timeout=20)) == [-9, 1]
    assert any("lost contact with another process" in job.text(rank) for rank in range(2))
    assert find_checkpoint(run, fall_back=False).name in ("step-00000005", "step-00000010")
    many.run(tmp_path / "logs", 2, many.train, words(data, run, *options), restarts=1)
    assert_equal(everything(run), everything(whole))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]


def torchrun(*options: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, options)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of what torchrun has started, by rank."""
    found: dict[int, int] = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        try:
            told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [entry for entry in told if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0][5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


def half_written(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were left so: name and inode."""
    found = set()
    for path in (run / "checkpoints").glob(".writing-*"):
        with contextlib.suppress(OSError):
            found.add((path.name, path.stat().st_ino))
    return found


def survive(data: Path, folder: Path, mode: str, kills: int, steps: int, *more: object) -> tuple[int, int]:
    """Kill a process of torchrun's two again and again, in turn at a random moment and in the next checkpoint; compare with
    a run that nobody disturbed. Returns how many were killed, and how many of these left a half-written checkpoint."""
    options = ["--objective.name", "unrolled", "--budget.steps", steps, "--parallel.mode", mode, *SHORT, *more]
    whole = train(data, folder / "whole", *options, world=2)
    run, rng, done, halves = folder / "run", random.Random(mode), 0, 0
    with socket_free() as port:
        command = torchrun("--max-restarts", kills + 1, "--master-port", port)
    log = (folder / "torchrun.log").open("wb")
    command += ["train/pretrain.py", *words(data, run, *options)]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment())
    try:
        while done < kills and launcher.poll() is None:
            # Two more checkpoints; then in turn any moment, and the beginning of the next checkpoint.
            before = len(rows_so_far(run)) if done else 0
            wait_for_step(run, min(before + 6, steps - 8), launcher)
            there = workers(launcher) if launcher.poll() is None else []
            known = half_written(run)
            if done % 2:
                end = time.monotonic() + 20
                while launcher.poll() is None and time.monotonic() < end and not half_written(run) - known:
                    time.sleep(0.001)
            else:
                time.sleep(rng.random() * 0.3)
            if len(there) == 2:
                os.kill(there[rng.randrange(2)], signal.SIGKILL)
                done += 1
                gone = time.monotonic() + 300
                while launcher.poll() is None and time.monotonic() < gone and set(workers(launcher)) & set(there):
                    time.sleep(0.01)
                halves += bool(half_written(run) - known)
        assert launcher.wait(timeout=120) == 0, (folder / "torchrun.log").read_text()[-3000:]
    finally:
        launcher.kill()
        log.close()
    assert_equal(everything(run), everything(whole))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]
    return done, halves


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    """Until the processes that run now have made a step, and the run has come to ``step``."""
    end, file = time.monotonic() + 300, run / "metrics.jsonl"
    first = file.stat().st_mtime_ns if file.exists() else 0
    while launcher.poll() is None and time.monotonic() < end:
        ready = file.exists() and file.stat().st_mtime_ns > first and len(workers(launcher)) == 2
        if ready and len(rows_so_far(run)) >= step:
            return
        time.sleep(0.01)


class socket_free:
    """A port that was free a moment ago."""

    def __enter__(self) -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
def test_torchrun_restarts_what_was_killed(data: Path, tmp_path: Path) -> None:
    assert survive(data, tmp_path, "fsdp", kills=1, steps=20)[0] == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_node_that_is_lost_comes_back(data: Path, tmp_path: Path, mode: str) -> None:
    """Two launchers, as on two machines. One is killed together with its process, and started anew; the other goes on."""
    options = ["--objective.name", "one_step", "--budget.steps", 40, "--parallel.mode", mode, *SHORT]
    whole = train(data, tmp_path / "whole", *options, world=2)
    run = tmp_path / "run"
    with socket_free() as port:
        told = {**environment(), "HEAD": f"localhost:{port}", "NNODES": "2", "NPROC": "1", "PYTHON": sys.executable}
    command = ["bash", "train/launch/multinode.sh", *map(str, words(data, run, *options))]
    nodes: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        log = (tmp_path / f"node-{len(nodes)}.log").open("wb")
        nodes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=told))

    try:
        start()
        end = time.monotonic() + 300
        while time.monotonic() < end:  # until the first keeps the store
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                break
            time.sleep(0.05)
        start()
        end = time.monotonic() + 300
        while not list_checkpoints(run) and time.monotonic() < end:
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.01)
        [worker] = workers(nodes[1])
        for process in (nodes[1].pid, worker):
            os.kill(process, signal.SIGKILL)
        nodes[1].wait(timeout=60)
        start()
        ended = [nodes[number].wait(timeout=180) for number in (0, 2)]
    finally:
        for node in nodes:
            node.kill()
    first, _, anew = ((tmp_path / f"node-{number}.log").read_text() for number in range(3))
    assert ended == [0, 0], (first[-2000:], anew[-2000:])
    assert "resuming at step" in first + anew
    assert_equal(everything(run), everything(whole))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_twenty_kills_at_random_moments(data: Path, tmp_path: Path, mode: str) -> None:
    done, halves = survive(data, tmp_path, mode, kills=10, steps=150)
    print(f"{done} killed, {halves} of them in a checkpoint")
    assert done == 10
    assert halves >= 3


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_sigterm_to_one_process_ends_all_of_them_well(data: Path, tmp_path: Path, mode: str) -> None:
    options = ["--objective.name", "next_token", "--parallel.mode", mode, *SHORT, "--run.checkpoint_every", 10_000]
    run = tmp_path / "run"
    job = many.Job(tmp_path / "logs", 2, many.train, words(data, run, *options, "--budget.steps", 10_000))
    wait_for_rows(run, 3, job)
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.wait(timeout=60) == [0, 0], [job.text(rank) for rank in range(2)]
    assert "stopped by signal 15 at step" in job.text(0)
    assert job.text(1) == ""
    [saved] = list_checkpoints(run)
    assert fault(saved) is None
    assert int(saved.name[5:]) == len(rows(run))


def test_a_process_that_hangs_is_named(data: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["--objective.name", "next_token", *SHORT, "--parallel.timeout", PATIENCE]
    options += ["--run.checkpoint_every", 10_000]  # or it may be heard of while it writes one, between two steps
    job = many.Job(tmp_path / "logs", 2, many.train, words(data, run, *options, "--budget.steps", 10_000))
    wait_for_rows(run, 3, job)
    time.sleep(PATIENCE / 2)  # it tells the others every quarter of that time what it is at
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    job.processes[0].join(120)
    assert job.processes[0].exitcode == 1
    message = [line for line in job.text(0).splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert f"no progress for {PATIENCE} seconds" in message[0]
    assert "no answer from process 1 on " in message[0]
    assert "last report: at step" in message[0]
    job.wait(timeout=0)


def stuck(words: list[str]) -> None:
    """The trainer, where the first process never comes out of its third step's loss."""
    original = trainer.Rng

    def rng(seed: int, step: int) -> Any:
        while step == 2 and os.environ["RANK"] == "0":
            time.sleep(0.1)
        return original(seed, step)

    trainer.Rng = rng
    trainer.train(*arguments(words))


def test_a_process_that_the_others_wait_for_is_named(data: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["--objective.name", "next_token", *SHORT, "--parallel.timeout", PATIENCE]
    job = many.Job(tmp_path / "logs", 2, stuck, words(data, run, *options, "--budget.steps", 20))
    assert job.wait(timeout=120) == [1, 1], [job.text(rank) for rank in range(2)]
    told = "".join(job.text(rank) for rank in range(2))
    assert told.count(f"error: no progress for {PATIENCE} seconds") == 1
    assert "all wait for process 0 on " in told
