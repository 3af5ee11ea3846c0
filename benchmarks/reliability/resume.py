"""Kill processes with SIGKILL at random moments, resume, and require the same files as without a kill, bit for bit.

python benchmarks/reliability/resume.py --moments 100 --json OUT

Moments are chosen in six places in turn:

- step: during an optimizer step, at a random time after the n-th step began;
- saving: at a file operation (create, fsync, chmod, rename) that writes a checkpoint;
- pruning: at a file operation that removes an old checkpoint;
- data: at a file operation of `prepare`;
- tokenizer: at a file operation that trains or saves a tokenizer;
- lm-eval: during a write to the answer cache, with half of the bytes written.

The process kills itself just before the operation, so that the seed determines the moment. The work is then started again as
a user would do, until it completes. Compared are a run's weights, averages, optimizer state, counters and metrics (without
times), a data directory's files, a tokenizer's file, and lm-eval's results. Processes are forked from one that has imported
all modules.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.reliability.endurance import SHAPE
from benchmarks.reliability.reliability import finish
from recurrent_db.arguments import run_command
from recurrent_db.commands.train import arguments
from recurrent_db.data import corpus, prepare
from recurrent_db.data import tokenizer as tokenizers
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.schema import PositiveInt
from recurrent_db.store.folder import find_checkpoint, list_checkpoints
from recurrent_db.training import trainer

ROOT = Path(__file__).resolve().parents[2]

PLACES = ("step", "saving", "pruning", "data", "tokenizer", "lm-eval")
OBJECTIVES = ("next_token", "unrolled", "one_step")
STEPS = 24
TIMES = {"peak_flops", "seconds", "tokens_per_s", "mfu", "hfu", "peak_memory_bytes", "optimizer_share",
         "memory/activations_bytes", "energy_joules"}  # fmt: skip
"""Columns that differ between equal runs. Activations are measured at a process's first step."""


@dataclass
class Args:
    """Kill -9 at random moments, resume, and compare with an undisturbed run."""

    moments: PositiveInt = 100
    """Number of moments."""
    seed: int = 0
    """Seed of the moments."""
    workers: PositiveInt = 2
    """Moments in parallel."""
    json: Path | None = None
    """File for the counts."""
    table: bool = False
    """Also write the row into docs/measurements.md."""


# ---------------------------------------------------------------------------------------------------------------------
# Killing


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file_operation(n: int, matches: Callable[[str, str], bool], counter: Path | None = None) -> None:
    """Kill this process just before the ``n``-th file operation (from 1) for which ``matches(event, path)`` is true. With
    ``counter`` no process is killed; every such operation appends a byte to that file instead."""
    lock, seen = threading.Lock(), [0]
    log = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if counter else None

    def note(event: str, path: str) -> None:
        if not matches(event, path):
            return
        with lock:
            seen[0] += 1
            if log is not None:
                os.write(log, b".")
            elif seen[0] == n:
                _die()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (changes or writes) and args and isinstance(args[0], str | bytes | os.PathLike):
            note(event, os.fsdecode(args[0]))

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        note("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    sys.addaudithook(hook)


def die_in_step(n: int, delay: float) -> None:
    """Kill this process ``delay`` seconds after its ``n``-th forward and backward pass began."""
    seen, build = [0], trainer.Rng

    def counted(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == n:
            threading.Timer(delay, _die).start()
        return build(*arguments)

    trainer.Rng = counted  # type: ignore[assignment, misc]


def die_in_write(n: int, name: str, counter: Path | None) -> None:
    """Kill this process during its ``n``-th os.write to a file with this name, after half of the bytes are written."""
    seen, write = [0], os.write

    def torn(descriptor: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
            seen[0] += 1
            if counter is not None:
                with counter.open("a") as file:
                    file.write(".")
            elif seen[0] == n:
                write(descriptor, data[: len(data) // 2])
                _die()
        return write(descriptor, data)

    os.write = torn  # type: ignore[assignment]


# ---------------------------------------------------------------------------------------------------------------------
# The work. Each function runs in its own process in ``folder``, and continues from the existing files.


@dataclass
class Moment:
    """Place and time of a kill; ``n`` = 0 means none."""

    place: str
    objective: str = "next_token"
    n: int = 0
    delay: float = 0.0

    def arm(self, counter: Path | None) -> None:
        if self.place == "step":
            if self.n:
                die_in_step(self.n, self.delay)
        elif self.place == "lm-eval":
            die_in_write(self.n, "answers.jsonl", counter)
        else:
            part = {"saving": ".writing-", "pruning": ".deleting-", "data": "shards", "tokenizer": "made.model"}[
                self.place
            ]
            old = self.place == "pruning"  # the removal of an old checkpoint begins with a rename
            last = f"step-{STEPS:08d}"

            def matches(event: str, path: str) -> bool:
                pruned = old and event == "os.rename" and ".writing-" not in path and "step-" in path
                return (part in path or pruned) and not (old and last in path)

            die_at_file_operation(self.n, matches, counter)


def _train(folder: Path, moment: Moment, common: Path, resume: bool) -> int:
    moment.arm(None if moment.n else folder / "count")
    words = [*SHAPE, "--data.path", str(common / "data"), "--run.dir", str(folder / "run"), "--budget.steps", str(STEPS),
             "--run.checkpoint_every", "4", "--run.log_every", "3", "--eval.points", "3", "--run.peak_flops", "1e10",
             "--objective.name", moment.objective]  # fmt: skip
    return trainer.train(*arguments([*words, *(["--resume"] if resume else [])]))


def _prepare(folder: Path, moment: Moment, common: Path, resume: bool) -> int:
    moment.arm(None if moment.n else folder / "count")
    if not (folder / "shards").exists():  # the folder is either complete or missing
        source, tokenizer = str(common / "text"), common / "data" / "tokenizer.model"
        prepare([source], tokenizer, folder / "shards", workers=1, shard_tokens=4000)
    return 0


def _tokenizer(folder: Path, moment: Moment, common: Path, resume: bool) -> int:
    moment.arm(None if moment.n else folder / "count")
    if not (folder / "made.model").exists():
        texts = [path.read_text(encoding="utf-8") for path in sorted((common / "text").iterdir())]
        Tokenizer.from_bytes(tokenizers.train(texts, 400)).save(folder / "made.model")
    return 0


def _lm_eval(folder: Path, moment: Moment, common: Path, resume: bool) -> int:
    from lm_eval.api.instance import Instance

    from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM

    moment.arm(None if moment.n else folder / "count")
    text = sorted((common / "text").iterdir())[0].read_text().split()
    pairs = [(" ".join(text[i : i + 5]), " " + text[i + 5]) for i in range(24)]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    lm = RecurrentDBLM(str(common / "run"), k=2, batch_size=2, device="cpu", cache=str(folder / "answers.jsonl"))
    results = lm.loglikelihood(asked, disable_tqdm=True)
    write_atomic(folder / "results.json", json.dumps(results))
    return 0


WORK = {
    "step": _train,
    "saving": _train,
    "pruning": _train,
    "data": _prepare,
    "tokenizer": _tokenizer,
    "lm-eval": _lm_eval,
}


def _child(folder: Path, moment: Moment, common: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        code = WORK[moment.place](folder, moment, common, resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


class Server:
    """Starts processes in which all modules are already imported."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = str(ROOT)
        self.context.set_forkserver_preload(["benchmarks.reliability.resume", "recurrent_db.evaluation.lm_eval_model"])
        self.lock = threading.Lock()

    def run(self, folder: Path, moment: Moment, common: Path, resume: bool) -> int:
        """The exit status. For a killed process it is minus the number of the signal."""
        from benchmarks.reliability import resume as this  # under its module name, which the server knows

        plain = this.Moment(moment.place, moment.objective, moment.n, moment.delay)
        process = self.context.Process(target=this._child, args=(folder, plain, common, resume))
        with self.lock:
            process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise RuntimeError("hangs")
        return process.exitcode


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(folder: Path, place: str) -> dict[str, Any]:
    """The files that the work has left, without times."""
    if place in ("data", "tokenizer"):
        root = folder / ("shards" if place == "data" else "made.model")
        return {p.name: _digest(p) for p in ([root] if root.is_file() else sorted(root.iterdir()))}
    if place == "lm-eval":
        return {"results": json.loads((folder / "results.json").read_text())}
    run = folder / "run"
    checkpoint = find_checkpoint(run, fall_back=False)
    found: dict[str, Any] = {p.name: _digest(p) for p in sorted(checkpoint.glob("*.safetensors"))}
    state = json.loads((checkpoint / "state.json").read_text())
    state["counters"] = {k: v for k, v in state["counters"].items() if k not in ("seconds", "energy_joules")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found |= {"state": state, "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in rows]}
    found["checkpoints"] = [p.name for p in list_checkpoints(run)]
    found["leftovers"] = [p.name for p in (run / "checkpoints").glob(".*")]
    return found


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    return next((f"{name} differs" for name in a.keys() | b.keys() if a.get(name) != b.get(name)), None)


def set_up(common: Path) -> None:
    """Create the inputs for all moments: text of the standard library, a tokenizer, shards and a checkpoint."""
    (common / "text").mkdir(parents=True)
    texts = [document.text for document in list(corpus.stdlib_documents())[::40] if 0 < len(document.text) < 20_000][
        :12
    ]
    for number, text in enumerate(texts):
        (common / "text" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_bytes(tokenizers.train(texts, 400))
    prepare([str(common / "text")], tokenizer, common / "data", workers=1)


def run(args: Args, folder: Path, numbers: Sequence[int] = ()) -> dict[str, Any]:
    """Try all moments, or those with the given numbers. Returns the counts and the failures."""
    started, server, common = time.time(), Server(), folder / "common"
    set_up(common)
    whole: dict[tuple[str, str], tuple[dict[str, Any], int]] = {}
    numbers = numbers or range(args.moments)
    wanted = sorted({_kind(number) for number in numbers})
    if any(place == "lm-eval" for place, _ in wanted):
        reference = folder / "whole-common"
        reference.mkdir()
        if server.run(reference, Moment("step"), common, False):
            raise UserError(f"the undisturbed run failed: {(reference / 'log').read_text()[-300:]}")
        shutil.copytree(reference / "run", common / "run")

    def undisturbed(kind: tuple[str, str]) -> None:
        place, objective = kind
        where = folder / f"whole-{place}-{objective}"
        where.mkdir()
        if server.run(where, Moment(place, objective), common, False):
            raise UserError(f"the undisturbed run failed: {(where / 'log').read_text()[-300:]}")
        count = len((where / "count").read_bytes()) if (where / "count").exists() else STEPS
        whole[kind] = outcome(where, place), count

    failures: list[dict[str, Any]] = []
    tried = dict.fromkeys(PLACES, 0)
    survived = dict.fromkeys(PLACES, 0)

    def one(number: int) -> None:
        place, objective = kind = _kind(number)
        rng = random.Random(f"{args.seed}/{number}")
        expected, count = whole[kind]
        moment = Moment(place, objective, rng.randint(1, count), rng.random() * 0.02)
        where = folder / f"moment-{number:04d}"
        where.mkdir()
        problem = None
        try:
            code = server.run(where, moment, common, False)
            if code != -signal.SIGKILL:
                problem = f"was not killed but ended with {code}"
            elif code := server.run(where, Moment(place, objective), common, True):
                problem = f"resuming ended with {code}: {(where / 'log').read_text()[-300:]}"
            else:
                problem = _difference(expected, outcome(where, place))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        tried[place] += 1
        survived[place] += problem is None
        if problem is not None:
            failures.append({"moment": number, "place": place, "objective": objective, "n": moment.n, "why": problem})
        else:
            shutil.rmtree(where)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(undisturbed, wanted))
        list(pool.map(one, numbers))
    return {
        "tried": sum(tried.values()),
        "survived": sum(survived.values()),
        "failures": failures,
        "by_place": {place: {"tried": tried[place], "survived": survived[place]} for place in PLACES},
        "seed": args.seed,
        "command": "python " + " ".join(sys.argv),
        "seconds": round(time.time() - started, 1),
    }


def _kind(number: int) -> tuple[str, str]:
    place = PLACES[number % len(PLACES)]
    return place, OBJECTIVES[number // len(PLACES) % 3] if WORK[place] is _train else OBJECTIVES[0]


def main(args: Args) -> int:
    if args.json:
        check_output(args.json)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    rows = {f"kill -9: {place}": (f"{c['survived']} / {c['tried']} survived", result["command"])
            for place, c in result["by_place"].items()}  # fmt: skip
    return finish(result, args.json, rows if args.table else None)


if __name__ == "__main__":
    run_command(Args, main)
