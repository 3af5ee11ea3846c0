"""Measure training beside other busy processes, with and without the package's wait policy.

python benchmarks/speed/busy.py [--seconds 5] [--rounds 3] [--json OUT]

After each operation, OpenMP's threads wait for the next one. By default they spin. On a shared core, a spinning thread keeps
the thread that it waits for from running. `recurrent_db` sets OMP_WAIT_POLICY=PASSIVE, so that waiting threads sleep.

Each row trains `train/configs/tiny.toml` on random tokens with ``--threads`` threads, first on the machine as it is, then
beside ``--busy`` processes that only use a core. The ratio compares the times of a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch  # before recurrent_db, so that only the environment sets the wait policy of a measured process
from tqdm import tqdm

from recurrent_db.arguments import run_command
from recurrent_db.config import load_config
from recurrent_db.data import Batch
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.rng import Rng
from recurrent_db.schema import Positive, PositiveInt

CONFIG = Path(__file__).parents[2] / "train/configs/tiny.toml"
VOCABULARY = 2048
POLICY = "OMP_WAIT_POLICY"
POLICIES = {"the runtime's own": None, "passive": "PASSIVE"}


@dataclass
class Args:
    """Compare training on an idle and a busy machine, with and without the package's wait policy."""

    seconds: Positive = 5.0
    """Training time of each measurement, in seconds."""
    rounds: PositiveInt = 3
    """Measurements of each row, taken in turns. The median is reported."""
    threads: PositiveInt = 2
    """Threads of the training process."""
    busy: PositiveInt = 2
    """Number of other busy processes."""
    json: Path | None = None
    """File for the rows."""


@dataclass
class Row:
    """One wait policy. Times are seconds per step, the median over rounds."""

    policy: str
    idle_seconds: float
    busy_seconds: float
    ratio: float
    """Time with busy processes divided by time without."""


def seconds_per_step(seconds: float, threads: int) -> float:
    """Mean time of a training step over about ``seconds``, in this process."""
    torch.set_num_threads(threads)
    config = load_config(CONFIG)
    config.model.vocab_size = VOCABULARY
    model, objective = build_model(config.model, seed=0), build_objective(config)
    optimizer = build_optimizer(model, config.optim)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]), torch.arange(shape[0]))

    def step() -> None:
        objective(model, batch, Rng(0, 0), 0.5)[
            0
        ].backward()  # the same random numbers, so that all steps do equal work
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not steps:
        step()
        steps += 1
    return passed / steps


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run ``count`` processes that use one core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(args: Args, policy: str | None) -> float:
    """`seconds_per_step` in a new process with the given wait policy; None sets no policy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    code = f"import busy; print(busy.seconds_per_step({args.seconds}, {args.threads}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment | ({POLICY: policy} if policy else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(result.stdout)


def compare(args: Args) -> list[Row]:
    """Measure one row for each policy."""
    found: dict[tuple[str, int], list[float]] = {}
    cases = [(name, beside) for _ in range(args.rounds) for name in POLICIES for beside in (0, args.busy)]
    for name, beside in tqdm(cases, disable=None):
        with busy_processes(beside):
            found.setdefault((name, beside), []).append(measured(args, POLICIES[name]))
    rows = []
    for name in POLICIES:
        idle, busy = (statistics.median(found[name, beside]) for beside in (0, args.busy))
        rows.append(Row(name, idle, busy, busy / idle))
    return rows


def main(args: Args) -> int:
    if args.json is not None:
        check_output(args.json)
    load = os.getloadavg()[0]
    rows = compare(args)
    print(
        f"{args.threads} threads on {os.cpu_count()} cores, torch {torch.__version__}; load average at the start {load:.1f}"
    )
    print(f"{'wait policy':<20}{'idle ms':>10}{f'beside {args.busy} ms':>14}{'busy/idle':>12}")
    for row in rows:
        print(f"{row.policy:<20}{1e3 * row.idle_seconds:>10.1f}{1e3 * row.busy_seconds:>14.1f}{row.ratio:>12.2f}")
    if args.json is not None:
        write_atomic(args.json, json.dumps({"load": load, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
