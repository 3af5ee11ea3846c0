"""Batches ahead of their step: the same ones, errors and ends included, and faster than any step reads them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MICRO, ROOT

from recurrent_db.config import load_config
from recurrent_db.data import Batch, Loader, TokenData, open_data, prefetch
from recurrent_db.errors import UserError
from recurrent_db.training import loader_task, trainer

CPU = torch.device("cpu")


@pytest.fixture
def loader(data: Path) -> Loader:
    return Loader(open_data(data, "train"), 32, 4)


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("prefetch")]


class Recorder(Loader):
    """A loader that notes the steps asked of it and fails at one."""

    def __init__(self, loader: Loader, bad_step: int | None = None) -> None:
        vars(self).update(vars(loader))
        self.asked: list[int] = []
        self.bad_step = bad_step

    def micro_batches(self, step: int, micro_batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        self.asked.append(step)
        if step == self.bad_step:
            raise UserError("shard 7 is gone")
        return super().micro_batches(step, micro_batch_size, rank, world)


@pytest.mark.parametrize("thread", [True, False, None])
def test_the_batches_are_the_loaders_in_order(loader: Loader, thread: bool | None) -> None:
    ahead = prefetch(loader, 5, 3, CPU, thread)
    for step in range(5, 12):
        got, expected = list(next(ahead)), list(loader.micro_batches(step, 3))
        assert [len(micro) for micro in got] == [len(micro) for micro in expected] == [3, 1]
        for one, other in zip(got, expected, strict=True):
            for name, tensor in vars(one).items():
                assert torch.equal(tensor, getattr(other, name))
    assert len(threads()) == bool(thread)
    del ahead
    assert not threads()


def test_two_steps_are_prepared_and_no_more(loader: Loader) -> None:
    recorder = Recorder(loader)
    ahead = prefetch(recorder, 0, 4, CPU, True)
    for step in range(3):
        list(next(ahead))
        deadline = time.monotonic() + 300
        while len(recorder.asked) < step + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert recorder.asked == list(range(step + 3))


@pytest.mark.parametrize("thread", [True, False])
def test_an_error_comes_with_its_step_and_its_type(loader: Loader, thread: bool) -> None:
    ahead = prefetch(Recorder(loader, bad_step=2), 0, 4, CPU, thread)
    assert [len(list(next(ahead))) for _ in range(2)] == [1, 1]
    with pytest.raises(UserError, match="shard 7 is gone"):
        list(next(ahead))
    assert not threads()


def test_a_gpus_batches_come_from_pinned_memory(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls what, where there is no GPU."""
    calls: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., Batch]:
        def call(batch: Batch, *_: object) -> Batch:
            calls.append((name, threading.current_thread() is threading.main_thread()))
            return batch

        return call

    monkeypatch.setattr(Batch, "pin", note("pin"))
    monkeypatch.setattr(Batch, "to", note("copy"))
    list(next(prefetch(loader, 0, 2, torch.device("cuda"))))
    assert [call for call in calls if call[0] == "copy"] == [("copy", True)] * 2
    assert {call for call in calls if call[0] == "pin"} == {("pin", False)}


def test_a_copy_makes_nobody_wait(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the device goes without waiting; what is read on the CPU stays there."""
    plain, waits = torch.Tensor.to, []

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        waits.append(not kwargs.get("non_blocking", False))
        return plain(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = loader.batch(0).to("meta")
    assert waits == [False, False]
    assert moved.tokens_BT.is_meta
    assert moved.targets_BT.is_meta
    assert moved.doc_ids_BT.device == moved.sample_index_B.device == CPU


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_no_thread_outlives_the_program(data: Path, end: str) -> None:
    program = f"""
import os, signal, torch
from recurrent_db.data import Loader, open_data, prefetch
ahead = prefetch(Loader(open_data({str(data)!r}, "train"), 32, 4), 0, 2, torch.device("cpu"), True)
next(ahead)
{end}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    interrupted = "SIGINT" in end
    assert (result.returncode != 0) == interrupted
    assert not result.stderr or interrupted


def train(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, thread: bool) -> int:
    monkeypatch.setattr(loader_task, "prefetch", lambda *arguments, **more: prefetch(*arguments, thread=thread, **more))
    words = ["--data.path", data, "--run.dir", run, "--budget.steps", 6, "--data.micro_batch_size", 3]
    return int(trainer.train(load_config(None, [*MICRO, *map(str, words)])))


def test_a_run_is_the_same_with_the_thread(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for thread in (True, False):
        train(data, tmp_path / str(thread), monkeypatch, thread)
    weights = [next((tmp_path / str(t) / "checkpoints").iterdir()) / "model.safetensors" for t in (True, False)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not threads()


@pytest.mark.parametrize("thread", [True, False])
def test_a_shard_cut_short_during_the_run_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: bool
) -> None:
    """Also where a thread is just reading it: past the end of a memory map, it would kill the process with SIGBUS."""
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    ahead = prefetch(Loader(open_data(broken, "train", verify=True), 32, 4), 0, 4, CPU, thread)
    list(next(ahead))
    shard = next(broken.glob("train-*.bin"))
    os.truncate(shard, 64)
    with pytest.raises(UserError, match=rf"{shard.name}: truncated while in use: 64 bytes of \d+ are left"):
        for _ in range(4):
            list(next(ahead))


def test_a_shard_that_vanishes_during_the_run_is_read_on(data: Path, tmp_path: Path) -> None:
    """Its bytes last as long as they are mapped."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    ahead, kept = (Loader(open_data(folder, "train"), 32, 4) for folder in (copy, data))
    shutil.rmtree(copy)
    assert torch.equal(ahead.batch(3).tokens_BT, kept.batch(3).tokens_BT)


def test_damaged_ids_are_one_line() -> None:
    ids = np.arange(100, dtype=np.uint16)
    with pytest.raises(UserError, match=r"damaged: token id 9[0-9] outside the vocabulary of 50"):
        Loader(TokenData.from_arrays({"a": ids}, 50, 2), 99, 1).batch(0)
