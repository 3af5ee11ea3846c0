"""Measure whether memory, open files and speed stay constant in a long run of a tiny model.

python benchmarks/reliability/endurance.py --data DIR --steps 20000 --json OUT

A separate process trains with evaluations, checkpoints and logging. It is observed ten times a second. The first tenth of
the steps is warm-up. For memory and open files, the median of the second tenth is compared with that of the last.

Speed needs more care, because the machine's own speed changes within minutes by more than the effect to be measured. The
old process is paused at the beginning of its last tenth until a young one, with the same run from the start, reaches its
second tenth. The two then run in turns of half a second. The result is the ratio of their steps per second of processor
time.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Annotated, Any

from benchmarks.reliability.reliability import write_rows
from recurrent_db.arguments import run_command
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.schema import PositiveInt, at_least

ROOT = Path(__file__).resolve().parents[2]
SHAPE = [
    "--model.d_model", "32", "--model.n_heads", "2", "--model.d_mlp", "48", "--model.max_seq_len", "32",
    "--model.d_condition", "16", "--data.sequence_length", "32", "--data.batch_size", "4", "--run.device", "cpu",
    "--run.threads", "1", "--eval.k", "1", "2", "--eval.tokens", "512", "--objective.unrolled.mean_depth", "4",
    "--objective.unrolled.truncation", "2", "--optim.lr", "1e-3", "--optim.ema_decay", "0.9",
]  # fmt: skip
"""Options for a model with about 50 thousand parameters."""


@dataclass
class Args:
    """Measure memory, open files and speed over many steps of a tiny model."""

    data: Path
    """Data directory for training, made by train/prepare_data.py."""
    steps: Annotated[int, at_least(500)] = 20_000
    """Number of optimizer steps; at least 500."""
    objective: str = "next_token"
    """Objective of the run."""
    evaluations: PositiveInt = 50
    """Number of evaluations, evenly spaced."""
    seed: int = 0
    """Seed of the run."""
    run: Path | None = None
    """Run directory to create and keep; a temporary one by default."""
    json: Path | None = None
    """File for the result."""
    table: bool = False
    """Also write the row into docs/measurements.md."""


def _look(pid: int) -> tuple[int, int, float]:
    """Private resident bytes (without pages of mapped files, which vary), number of open files, processor seconds."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = os.sysconf("SC_CLK_TCK")
    resident = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    return resident, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), (int(stat[11]) + int(stat[12])) / ticks


def _last_step(metrics: Path) -> int:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4096))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


class Trainer:
    """A training run in a separate process that can be paused and continued."""

    def __init__(self, args: Args, run: Path, log: Path) -> None:
        command = [sys.executable, "train/pretrain.py", *SHAPE, "--data.path", str(args.data.resolve()),
                   "--run.dir", str(run), "--budget.steps", str(args.steps), "--eval.points", str(args.evaluations),
                   "--seed", str(args.seed), "--objective.name", args.objective, "--run.log_every", "10",
                   "--run.checkpoint_every", str(max(10, args.steps // 40))]  # fmt: skip
        self.metrics, self.log = run / "metrics.jsonl", log.open("w+")
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=self.log)
        self.samples: list[tuple[int, int, int, float]] = []

    def look(self) -> int:
        """Record step, memory, open files and processor time. Returns the step."""
        if self.process.poll() is None:
            # A process that has just ended has no files in /proc.
            with contextlib.suppress(OSError, IndexError):
                self.samples.append((_last_step(self.metrics), *_look(self.process.pid)))
        return self.samples[-1][0] if self.samples else 0

    def go(self, step: int = sys.maxsize, seconds: float = math.inf, pause: float = 0.1) -> None:
        """Continue the run until a step, for a time or to its end, then pause it. Observes it after every ``pause`` seconds.

        Raises:
            UserError: the run ended with an error.
        """
        self.process.send_signal(signal.SIGCONT)
        end = time.monotonic() + seconds
        while self.process.poll() is None and self.look() < step and time.monotonic() < end:
            time.sleep(pause)
        if self.process.poll():
            self.log.seek(0)
            raise UserError(f"the trainer ended with status {self.process.returncode}: {self.log.read()[-300:]}")
        self.process.send_signal(signal.SIGSTOP)
        self.look()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def measure(args: Args, run: Path, folder: Path) -> dict[str, Any]:
    """Train, observe, and compare the end with the start. ``folder`` keeps the young run and both logs."""
    started, tenth = time.time(), args.steps / 10
    with contextlib.ExitStack() as stack:
        old = Trainer(args, run, folder / "old.log")
        stack.callback(old.close)
        old.go(args.steps * 9 // 10)
        young = Trainer(args, folder / "young", folder / "young.log")
        stack.callback(young.close)
        young.go(args.steps // 10)
        firsts, turns = (len(old.samples) - 1, len(young.samples) - 1), 0
        while all(trainer.process.poll() is None for trainer in (old, young)) and young.samples[-1][0] < 2 * tenth:
            for trainer in (old, young):
                trainer.go(seconds=0.5, pause=0.05)
            turns += 1
        in_turns = [trainer.samples[first:] for trainer, first in zip((old, young), firsts, strict=True)]
        old.go()
    samples = old.samples
    settled = [s for s in samples if tenth <= s[0] < args.steps]
    late = [s for s in settled if s[0] >= 9 * tenth]
    early = [s for s in settled if s[0] < 2 * tenth]
    if min(len(early), len(late)) < 5:
        raise UserError(f"{args.steps} steps are too few to be measured")
    memory = [statistics.median(s[1] for s in part) for part in (early, late)]
    files = [statistics.median_high(s[2] for s in part) for part in (early, late)]

    def speed(part: list[tuple[int, int, int, float]]) -> float:
        return (part[-1][0] - part[0][0]) / (part[-1][3] - part[0][3])

    old_rate, young_rate = map(speed, in_turns)
    return {
        "steps": args.steps,
        "objective": args.objective,
        "seed": args.seed,
        "command": "python " + " ".join(sys.argv),
        "samples": len(samples),
        "turns": turns,
        "wall_seconds": round(time.time() - started, 1),
        "memory_bytes_start": memory[0],
        "memory_bytes_end": memory[1],
        "memory_ratio": memory[1] / memory[0],
        "open_files_start": files[0],
        "open_files_end": files[1],
        "steps_per_cpu_second_young": young_rate,
        "steps_per_cpu_second_old": old_rate,
        "speed_ratio": old_rate / young_rate,
    }


def main(args: Args) -> None:
    if args.json:
        check_output(args.json)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, args.run or Path(folder) / "run", Path(folder))
    print(json.dumps(result, indent=1))
    if args.json:
        write_atomic(args.json, json.dumps(result, indent=1) + "\n")
    if args.table:
        said = f"memory x {result['memory_ratio']:.4f}, speed x {result['speed_ratio']:.3f}"
        said += f", open files {result['open_files_start']} to {result['open_files_end']}"
        write_rows({f"{args.steps:,} steps, end against start": (said, result["command"])})


if __name__ == "__main__":
    run_command(Args, main)
