"""Inject faults of storage and of numbers, and count those that are detected, named and recovered from.

python benchmarks/reliability/faults.py --json OUT

Storage faults: a full disk, a read-only folder, an incomplete write, one flipped bit in or the absence of each file of a
checkpoint and of a data directory, and a second trainer in one run directory. The full and the read-only disk are a tmpfs of
8 MiB. If none can be mounted, the failing system call is injected, and the row says so. Number faults: NaN and infinity in
loss, gradient, weight and optimizer state, once or permanently, and a spike of the loss.

A storage fault is survived if it ends in one line that names the file or folder, no existing file has changed, and the run
continues afterwards. A number fault is survived if every checkpoint is finite and the run completes. If the fault is
permanent, the run must instead end with a diagnosis that names the tensor.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from benchmarks.reliability.endurance import SHAPE
from benchmarks.reliability.reliability import finish
from benchmarks.reliability.resume import set_up
from recurrent_db.arguments import run_command
from recurrent_db.commands.train import arguments
from recurrent_db.data import open_data
from recurrent_db.data.shards import load_tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, locked
from recurrent_db.store import checkpoint as checkpoint_files
from recurrent_db.store.folder import find_checkpoint, list_checkpoints
from recurrent_db.training import guard, trainer


@dataclass
class Args:
    """Inject faults and count those that are survived."""

    seed: int = 0
    """Seed of the flipped bits."""
    json: Path | None = None
    """File for the counts."""
    table: bool = False
    """Also write the rows into docs/measurements.md."""


class Missed(Exception):
    """A fault that was not survived, with the reason."""


def need(ok: bool, why: str) -> None:
    if not ok:
        raise Missed(why)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file except the lock."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refusal(action: Callable[[], Any], *names: str) -> str:
    """Run an action that must be refused. Returns its error line, which must contain one of ``names``."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            action()
    except UserError as error:
        line = str(error)
        need(not names or any(name in line for name in names), f"the message names none of {names}: {line}")
        return line
    raise Missed("not detected")


class Bench:
    """Trains a tiny model in this process."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        set_up(folder / "common")
        self.data = folder / "common" / "data"

    def train(self, run: Path, *more: object, resume: str = "", steps: int = 12) -> str:
        """Train, and return the output on standard error."""
        words = [*SHAPE, "--data.path", str(self.data), "--run.dir", str(run), "--budget.steps", str(steps), "--eval.points",
                 "0", "--run.checkpoint_every", "4", "--run.log_every", "2", "--objective.name", "next_token",
                 "--run.peak_flops", "1e10", *map(str, more)]  # fmt: skip
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            trainer.train(arguments(words)[0], resume)
        return said.getvalue()

    def run(self, name: str, steps: int = 12) -> Path:
        """A copy of a finished run of ``steps`` steps. With 12 steps it has checkpoints at 8 and 12."""
        whole, copy = self.folder / f"whole-{steps}", self.folder / name
        if not whole.exists():
            self.train(whole, steps=steps)
        shutil.copytree(whole, copy)
        return copy


# ---------------------------------------------------------------------------------------------------------------------
# Storage


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """Mount a tmpfs at ``folder``. Yields False if none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(bench: Bench) -> str:
    with small_disk(bench.folder / "disk", "8m") as mounted:
        run = bench.folder / "disk" / "run"
        bench.train(run, steps=4)
        before = contents(run / "checkpoints")
        if mounted:
            free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
            (bench.folder / "disk" / "ballast").write_bytes(bytes(max(0, free - 200_000)))
            refusal(lambda: bench.train(run, resume="newest"), str(run))
            (bench.folder / "disk" / "ballast").unlink()
        else:
            full = mock.patch.object(checkpoint_files, "save_file", side_effect=OSError(28, "No space left on device"))
            with full:
                refusal(lambda: bench.train(run, resume="newest"), str(run))
        need(contents(run / "checkpoints") == before, "checkpoints changed")
        bench.train(run, resume="newest")
        need(find_checkpoint(run).name == "step-00000012", "did not continue")
        return "tmpfs of 8 MiB" if mounted else "injected: no tmpfs could be mounted"


def read_only(bench: Bench) -> str:
    with small_disk(bench.folder / "readonly", "8m") as mounted:
        disk = bench.folder / "readonly"
        run = disk / "run"
        bench.train(run, steps=8)
        before = contents(run)
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            refusal(lambda: bench.train(run, resume="newest"), str(run))
            refusal(lambda: bench.train(disk / "another"), "another")
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        else:
            run.chmod(0o500)
            refusal(lambda: bench.train(run, resume="newest"), str(run))
            run.chmod(0o700)
        need(contents(run) == before, "files changed")
        bench.train(run, resume="newest")
        return "tmpfs remounted read-only" if mounted else "permissions"


def cut_short(bench: Bench) -> str:
    """A limit on the file size ends a write in the middle, like a quota."""
    import resource

    run = bench.run("cut", 8)
    before = contents(run / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refusal(lambda: bench.train(run, resume="newest"), str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    need(contents(run / "checkpoints") == before, "checkpoints changed")
    bench.train(run, resume="newest")
    return "RLIMIT_FSIZE of 100,000 bytes"


def damaged_checkpoint(bench: Bench, name: str, how: str) -> str:
    run = bench.run(f"{how}-{name}")
    target = list_checkpoints(run)[-1] / name
    spoil(target, how, bench.rng)
    before = contents(run)
    refusal(lambda: bench.train(run, resume="newest"), name, target.parent.name)
    need(contents(run) == before, "something was written")
    said = bench.train(run, resume="last-good")
    need("resuming at step 8" in said and "is damaged" in said, "did not use the previous checkpoint")
    want, got = (find_checkpoint(r, fall_back=False) / "model.safetensors" for r in (bench.folder / "whole-12", run))
    need(want.read_bytes() == got.read_bytes(), "different weights at the end")
    shutil.rmtree(run)
    return ""


def spoil(target: Path, how: str, rng: random.Random) -> None:
    if how == "missing":
        target.unlink()
        return
    raw = bytearray(target.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    target.write_bytes(raw)


def damaged_data(bench: Bench, name: str, how: str) -> str:
    data = bench.folder / f"data-{how}"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(bench.data, data)
    spoil(data / name, how, bench.rng)

    def read() -> None:
        load_tokenizer(data)
        for split in ("train", "validation"):
            open_data(data, split, verify=True)

    refusal(read, str(data))
    refusal(lambda: bench.train(bench.folder / "none", "--data.path", data), str(data))
    need(not (bench.folder / "none").exists(), "a run directory was made")
    return ""


def two_trainers(bench: Bench) -> str:
    run = bench.run("two")
    before = contents(run)
    with locked(run):
        for resume in ("newest", "last-good"):
            refusal(lambda resume=resume: bench.train(run, resume=resume, steps=20), "in use by")  # type: ignore[misc]
    need(contents(run) == before, "something was written")
    bench.train(run, resume="newest", steps=16)
    return "flock"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def poison(bench: Bench, where: str, value: float, for_good: bool) -> str:
    """Set a number to ``value`` at step 6, or at step 6 and all later steps."""
    run = bench.folder / f"numbers-{where}-{value}-{for_good}"
    build, step_unless = trainer.build_objective, trainer.step_unless
    hit = {"steps": 0}

    def due(rng: Any) -> bool:
        due = rng.step >= 6 if for_good else rng.step == 6 and not hit["steps"]
        hit["steps"] += due
        return due

    def broken(config: Any) -> Any:
        inner = build(config)
        call = type(inner).__call__

        class Broken(type(inner)):  # type: ignore[misc]
            def __call__(self, model: Any, batch: Any, rng: Any, progress: float) -> Any:
                bad = due(rng)
                if bad and where == "weight":
                    with torch.no_grad():
                        model.core.blocks[0].attn.qkv.weight[0, 0] = value
                loss, metrics = call(self, model, batch, rng, progress)
                if bad and where == "loss":
                    loss = loss * value
                if bad and where == "gradient":
                    loss = loss + _BadGradient.apply(model.final_norm.weight, value)
                return loss, metrics

        inner.__class__ = Broken
        return inner

    def step(skip: Any, optimizer: Any) -> None:
        step_unless(skip, optimizer)
        if where == "optimizer state":
            hit["calls"] = hit.get("calls", 0) + 1
            if hit["calls"] == 7 or (for_good and hit["calls"] > 7):
                next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = value

    options, patience = ["--optim.ema_decay", 0.5], mock.patch.multiple(guard, MOST_SKIPPED=3, ROLLBACKS=1)
    with patience, mock.patch.multiple(trainer, build_objective=broken, step_unless=step):
        if for_good:
            line = refusal(lambda: bench.train(run, *options, steps=16))
            names = {"loss": "loss", "gradient": "gradient", "weight": "core.blocks.0.attn.qkv.weight",
                     "optimizer state": "optimizer state"}  # fmt: skip
            need("stopped at step" in line and names[where] in line, f"no diagnosis: {line}")
            need((run / "diagnosis.jsonl").exists(), "no diagnosis.jsonl")
        else:
            bench.train(run, *options, steps=16)
    need(hit["steps"] > 0 or hit.get("calls", 0) >= 7, "never injected")
    for checkpoint in list_checkpoints(run):
        for file in checkpoint.glob("*.safetensors"):
            tensors = load_file(file)
            need(all(bool(torch.isfinite(t).all()) for t in tensors.values()), f"{file.name} is not finite")
    if not for_good:
        need(find_checkpoint(run).name == "step-00000016", "did not end")
    return ""


class _BadGradient(torch.autograd.Function):
    """A loss of 0 whose gradient is ``value`` everywhere."""

    @staticmethod
    def forward(context: Any, weight: torch.Tensor, value: float) -> torch.Tensor:
        context.value, context.shape = value, weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return gradient.new_full(context.shape, context.value), None


def spike(bench: Bench) -> str:
    run, build = bench.folder / "spike", trainer.build_objective

    def broken(config: Any) -> Any:
        inner = build(config)
        call = type(inner).__call__

        class Broken(type(inner)):  # type: ignore[misc]
            def __call__(self, model: Any, batch: Any, rng: Any, progress: float) -> Any:
                loss, metrics = call(self, model, batch, rng, progress)
                return loss * (10.0 if rng.step == 60 else 1.0), metrics

        inner.__class__ = Broken
        return inner

    with mock.patch.object(trainer, "build_objective", broken):
        bench.train(run, "--guard.spike", 8, steps=64)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spikes = [row["spikes"] for row in rows]
    need(spikes == [0] * 60 + [1] * 4, f"spikes counted: {spikes[58:]}")
    return ""


# ---------------------------------------------------------------------------------------------------------------------


def faults(bench: Bench) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """All faults: (kind, name, action)."""
    yield "full disk", "while a checkpoint is written", lambda: full_disk(bench)
    yield "read-only folder", "of a run", lambda: read_only(bench)
    yield "write cut short", "of a checkpoint", lambda: cut_short(bench)
    yield "two trainers", "on one run directory", lambda: two_trainers(bench)
    bench.run("first")
    files = sorted(p.name for p in list_checkpoints(bench.folder / "first")[-1].iterdir())
    for how in ("flipped bit", "missing"):
        for name in files:
            yield f"{how}, checkpoint", name, lambda name=name, how=how: damaged_checkpoint(bench, name, how)  # type: ignore[misc]
        for name in sorted(p.name for p in bench.data.iterdir()):
            yield f"{how}, data", name, lambda name=name, how=how: damaged_data(bench, name, how)  # type: ignore[misc]
    for where in ("loss", "gradient", "weight", "optimizer state"):
        for value in (math.nan, math.inf):
            for for_good in (False, True):
                yield (
                    f"NaN or infinity: {where}",
                    f"{value}{' for good' if for_good else ''}",
                    lambda where=where, value=value, for_good=for_good: poison(bench, where, value, for_good),  # type: ignore[misc]
                )
    yield "loss spike", "tenfold, skipped", lambda: spike(bench)


def run(args: Args, folder: Path) -> dict[str, Any]:
    """Inject all faults. Returns the counts and the missed faults."""
    bench = Bench(folder, args.seed)
    by_kind: dict[str, dict[str, Any]] = {}
    failures = []
    for kind, name, action in faults(bench):
        counts = by_kind.setdefault(kind, {"injected": 0, "detected": 0, "how": ""})
        counts["injected"] += 1
        try:
            counts["how"] = action() or counts["how"]
            counts["detected"] += 1
        except Missed as missed:
            failures.append({"kind": kind, "name": name, "why": str(missed)})
        except Exception as error:
            failures.append({"kind": kind, "name": name, "why": f"{type(error).__name__}: {error}"})
    totals = {key: sum(counts[key] for counts in by_kind.values()) for key in ("injected", "detected")}
    return {
        **totals,
        "failures": failures,
        "by_kind": by_kind,
        "seed": args.seed,
        "command": "python " + " ".join(sys.argv),
    }


def main(args: Args) -> int:
    torch.set_num_threads(1)
    if args.json:
        check_output(args.json)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    rows = {kind: (f"{c['detected']} / {c['injected']} detected{' (' + c['how'] + ')' if c['how'] else ''}",
                   result["command"]) for kind, c in result["by_kind"].items()}  # fmt: skip
    return finish(result, args.json, rows if args.table else None)


if __name__ == "__main__":
    run_command(Args, main)
