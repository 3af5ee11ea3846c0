"""Fuzz the code that reads untrusted files and text: python benchmarks/reliability/fuzz.py --cases 1000000

Each target of `fuzz_targets` gets its share of the cases and runs in its own process. A case must end in a result or in one
printable error line (`UserError`), within limits of processor time and memory. If a process dies or hangs, its current case
has failed. Case n of a target is a function of (seed, target, n), so each failure can be repeated by one command:
``--target T --first N --cases 1``.

Engines: ``seeded`` uses Python's generator. ``hypothesis`` and ``atheris`` control the same generators through bytes:
hypothesis shrinks failing cases, and atheris searches for bytes that reach new code (`pip install atheris`).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from recurrent_db.accounting.hardware import git_commit
from recurrent_db.arguments import MOST_LINE, one_line, run_command
from recurrent_db.errors import UserError
from recurrent_db.files import read_json, write_atomic
from recurrent_db.schema import Count, PositiveInt

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
"""Limit of processor time for a case, in seconds. The slowest intended case takes a tenth of it."""
MEMORY = 1 << 30
"""Limit for the growth of a process's address space after its first case begins, in bytes."""
STANDSTILL = 300.0
"""Seconds without a finished case after which a process counts as hanging; four times as many before the first case."""
SHARES = {
    "config": 0.25, "overrides": 0.001, "manifest": 0.05, "shards": 0.03, "checkpoint": 0.006, "safetensors": 0.14,
    "tokenizer": 0.15, "import": 0.006, "corpus": 0.127, "tables": 0.008, "repl": 0.006, "lm_eval": 0.006, "answers": 0.15,
    "run_files": 0.02, "images": 0.03, "image_data": 0.02,
}  # fmt: skip
"""Share of all cases for each target; slow targets get fewer. The shares sum to one."""


class TooLong(BaseException):
    """A case has used up its processor time. Not an `Exception`, so that no code under test can catch it by mistake."""


class TimeIsUp(Exception):
    """Stops hypothesis, which has no time limit of its own."""


@dataclass
class Outcome:
    """Results of a target's cases."""

    target: str
    cases: int = 0
    refused: int = 0
    """Number of cases that ended in a `UserError`. The others were accepted."""
    seconds: float = 0.0
    slowest: float = 0.0
    """Largest processor time of a case, in seconds."""
    memory: int = 0
    """Growth of the process's peak memory during the cases, in bytes."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """One entry per place and kind of failure: the first case, the number of cases, and the end of the traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# One case


@contextlib.contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """Limit the growth of the process's address space to ``memory`` bytes, and the processor time of each `run_case`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def run_case(target: Any, rng: random.Random, outcome: Outcome, number: int) -> None:
    """Run a case and record its result in ``outcome``."""
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.case(rng)
    except UserError as error:
        outcome.refused += 1
        line = one_line(str(error))
        if not line or len(line) > MOST_LINE or not line.isprintable():
            signal.setitimer(signal.ITIMER_PROF, 0)
            _note(outcome, error, number, f"a mistake's line of {len(line)} characters: {line[:200]!r}")
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _note(outcome, error, number, f"{type(error).__name__}: {str(error)[:300]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    outcome.cases += 1
    outcome.slowest = max(outcome.slowest, time.process_time() - started)


def _note(outcome: Outcome, error: BaseException, number: int, what: str) -> None:
    """Record a failure, once for each place in the library and kind."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "recurrent_db" in f.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {type(error).__name__}"
    for failure in outcome.failures:
        if failure["place"] == place:
            failure["cases"] += 1
            return
    trace = "".join(traceback.format_list(frames[-6:]))
    outcome.failures.append({"place": place, "case": number, "cases": 1, "what": what, "trace": trace})


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Engines: each runs cases first, first + 1, ... until `cases` are done or the processor time is used up


Progress = Callable[[int], None]


def _nothing(number: int) -> None:
    pass


WAITING = 6
"""Limit of a target's wall time, as a multiple of its processor time. A busy disk or machine can delay it."""


def timer(seconds: float) -> Callable[[], bool]:
    """A function that tells whether ``seconds`` of this process's processor time are over."""
    end, latest = time.process_time() + seconds, time.monotonic() + WAITING * seconds
    return lambda: time.process_time() > end or time.monotonic() > latest


def seeded(
    target: Any,
    outcome: Outcome,
    seed: int,
    first: int,
    cases: int,
    seconds: float = float("inf"),
    progress: Progress = _nothing,
) -> None:
    over = timer(seconds)
    for number in range(first, first + cases):
        if over():
            break
        progress(number)
        run_case(target, random.Random(f"{seed}/{outcome.target}/{number}"), outcome, number)


def by_hypothesis(target: Any, outcome: Outcome, seed: int, cases: int, seconds: float = float("inf")) -> None:
    """Run cases from bytes that hypothesis chooses, until time is over. The first failing case is shrunk and recorded."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seed_of
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky

    from benchmarks.reliability.fuzz_inputs import Bytes

    over = timer(seconds)
    phases = (Phase.generate, Phase.target, Phase.shrink)

    @seed_of(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        if over():
            if shrunk:
                return  # no case fails, so there is nothing to shrink
            raise TimeIsUp
        here = Outcome(outcome.target)
        run_case(target, Bytes(data), here, 0)
        outcome.cases, outcome.refused = outcome.cases + 1, outcome.refused + here.refused
        outcome.slowest = max(outcome.slowest, here.slowest)
        if here.failures:
            shrunk[:] = [{**here.failures[0], "case": data.hex()}]
            raise AssertionError(here.failures[0]["place"])

    shrunk: list[dict[str, Any]] = []
    # `shrunk` holds the failing case, even if it is not fully shrunk. An interrupted shrinking raises Flaky.
    with contextlib.suppress(AssertionError, TimeIsUp, Flaky):
        run()
    outcome.failures += shrunk


def by_atheris(target: Any, outcome: Outcome, seed: int, cases: int) -> None:
    """Run cases from bytes that libFuzzer chooses to reach new branches of the library. libFuzzer ends the process itself,
    so the outcome is printed from inside."""
    try:
        import atheris
    except ImportError:
        raise UserError("the engine atheris is not installed: pip install atheris") from None
    from benchmarks.reliability.fuzz_inputs import Bytes

    started = time.monotonic()

    def run(data: bytes) -> None:
        run_case(target, Bytes(data), outcome, outcome.cases)
        if outcome.cases >= cases or outcome.failures:
            outcome.seconds = time.monotonic() - started
            for failure in outcome.failures:
                failure["case"] = data.hex()
            print(json.dumps(vars(outcome)), flush=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", "-max_len=400", "-verbosity=0", "-rss_limit_mb=0"], run)
    atheris.Fuzz()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class FuzzArgs:
    """Try hostile input on all code that reads untrusted files or text. The exit status is 1 if a case ends in anything but
    a result or a `UserError`."""

    cases: PositiveInt = 10_000
    """Number of cases, over all targets (more for fast ones) or for the one target."""
    target: str = "all"
    """One target, or all. --target list prints their names."""
    engine: Literal["seeded", "hypothesis", "atheris"] = "seeded"
    """Source of the cases."""
    seed: int = 0
    """Seed of the cases."""
    first: Count = 0
    """Number of the first case."""
    jobs: PositiveInt = 1
    """Targets in parallel."""
    json: bool = False
    """Print JSON instead of a table."""
    out: Path | None = None
    """Also write the JSON to this file."""
    load: list[Path] = field(default_factory=list)
    """Run nothing; combine these files from earlier --out options."""
    markdown: Path | None = None
    """Markdown file whose part between the fuzzing marks becomes the table, such as docs/measurements.md."""
    folder: Path | None = None
    """Internal: run the cases in this process, which may write to this folder."""


def work(args: FuzzArgs) -> int:
    """Worker: run the cases of one target in this process. ``folder``/outcome.json holds the outcome so far."""
    assert args.folder is not None
    if args.engine == "atheris":
        try:
            import atheris
        except ImportError:
            raise UserError("the engine atheris is not installed: pip install atheris") from None
        with atheris.instrument_imports(include=["recurrent_db"]):
            from benchmarks.reliability.fuzz_targets import TARGETS
    else:
        from benchmarks.reliability.fuzz_targets import TARGETS
    import torch

    torch.set_num_threads(1)
    faulthandler.enable()
    outcome = Outcome(args.target)
    target = TARGETS[args.target](args.folder)
    seeded(target, Outcome(args.target), args.seed + 1, 0, 3)  # so that imports and caches do not count for the cases
    started, before, last = time.monotonic(), peak(), time.monotonic()

    def keep() -> None:
        outcome.seconds, outcome.memory = time.monotonic() - started, peak() - before
        path = args.folder.with_name(f"{args.target}.json")  # type: ignore[union-attr]
        path.with_suffix(".tmp").write_text(json.dumps(vars(outcome)))
        path.with_suffix(".tmp").replace(path)

    def progress(number: int) -> None:
        nonlocal last
        os.pwrite(counter, number.to_bytes(8, "little"), 0)
        if time.monotonic() > last + 1:
            keep()
            last = time.monotonic()

    counter = os.open(args.folder.with_name(f"{args.target}.at"), os.O_RDWR | os.O_CREAT)
    with bounded():
        if args.engine == "seeded":
            seeded(target, outcome, args.seed, args.first, args.cases, progress=progress)
        elif args.engine == "hypothesis":
            by_hypothesis(target, outcome, args.seed, args.cases)
        else:
            by_atheris(target, outcome, args.seed, args.cases)
    keep()
    return 0


@dataclass
class Worker:
    """Watches a target's process. If it dies, its current case has failed, and a new process continues after that case."""

    args: FuzzArgs
    target: str
    cases: int
    folder: Path
    done: list[Outcome] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    first: int = 0
    moved: float = 0.0
    at: int = -1
    deaths: int = 0

    def start(self, first: int) -> None:
        self.first, self.at, self.moved = first, -1, time.monotonic()
        left = self.args.first + self.cases - first
        scratch = self.folder / self.target
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in ("json", "at"):
            (self.folder / f"{self.target}.{name}").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--target", self.target, "--cases", str(left), "--first", str(first), "--seed",
                   str(self.args.seed), "--engine", self.args.engine, "--folder", str(scratch)]  # fmt: skip
        self.log = (self.folder / f"{self.target}.log").open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)

    def _number(self) -> int:
        path = self.folder / f"{self.target}.at"
        return int.from_bytes(path.read_bytes()[:8], "little") if path.exists() and path.stat().st_size else -1

    def poll(self) -> bool:
        """Whether the target is finished."""
        assert self.process is not None
        status, number = self.process.poll(), self._number()
        if number != self.at:
            self.at, self.moved = number, time.monotonic()
        patience = STANDSTILL if self.at >= 0 else 4 * STANDSTILL
        stuck = self.args.engine == "seeded" and time.monotonic() > self.moved + patience
        if status is None and not stuck:
            return False
        if stuck:
            self.process.kill()
        printed = self.process.communicate()[0]
        self.log.close()
        path = self.folder / f"{self.target}.json"
        words = printed.strip().splitlines()
        if path.exists():
            self.done.append(Outcome(**json.loads(path.read_text())))
        elif self.args.engine == "atheris" and status == 0 and words:
            self.done.append(Outcome(**json.loads(words[-1])))
        if status == 0:
            return True
        said = (self.folder / f"{self.target}.log").read_text(errors="replace").strip()
        if self.at < 0:
            raise UserError(
                f"the process of target {self.target} did not start: {said.splitlines()[-1] if said else status}"
            )
        what = f"no case finished in {STANDSTILL:.0f} s" if stuck else f"the process died (status {status})"
        failure = {"place": "process", "case": self.at, "cases": 1, "what": what, "trace": said[-2000:]}
        self.done.append(Outcome(self.target, cases=1, failures=[failure]))
        self.deaths += 1
        if self.deaths < 20 and self.at + 1 < self.args.first + self.cases:
            self.start(self.at + 1)
            return False
        return True

    def outcome(self) -> Outcome:
        """The outcome of all processes of the target. The last second of a process that died is not counted."""
        return together(self.target, self.done)


def together(target: str, parts: list[Outcome]) -> Outcome:
    """Combine several outcomes of a target."""
    whole = Outcome(target)
    for part in parts:
        whole.cases, whole.refused = whole.cases + part.cases, whole.refused + part.refused
        whole.seconds, whole.slowest = whole.seconds + part.seconds, max(whole.slowest, part.slowest)
        whole.memory = max(whole.memory, part.memory)
        whole.failures += part.failures
    return whole


def shares(cases: int) -> dict[str, int]:
    """Number of cases by target, at least one each, ``cases`` in total if there are that many."""
    counts = {name: max(1, int(share * cases)) for name, share in SHARES.items()}
    counts["config"] += max(0, cases - sum(counts.values()))
    return counts


def run_all(args: FuzzArgs) -> list[Outcome]:
    """Run the cases of ``args`` in separate processes. Returns the outcomes by target."""
    counts = shares(args.cases) if args.target == "all" else {args.target: args.cases}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        waiting = [Worker(args, name, count, Path(folder)) for name, count in counts.items()]
        running: list[Worker] = []
        finished: list[Worker] = []
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    running.append(waiting.pop(0))
                    running[-1].start(args.first)
                time.sleep(0.1)
                for worker in list(running):
                    if worker.poll():
                        running.remove(worker)
                        finished.append(worker)
                        one = worker.outcome()
                        kinds = f"{len(one.failures)} kinds of failure"
                        print(f"{one.target}: {one.cases:,} cases in {one.seconds:.0f} s, {kinds}", file=sys.stderr)
        finally:
            for worker in running:
                if worker.process is not None:
                    worker.process.kill()
        by_name = {worker.target: worker.outcome() for worker in finished}
    return [by_name[name] for name in counts]


def failed(outcome: Outcome) -> int:
    return sum(failure["cases"] for failure in outcome.failures)


def table(outcomes: list[Outcome]) -> str:
    """Markdown table of inputs tried and failures by target."""
    lines = [
        "| target | inputs tried | refused in one line | failures | cases/s | slowest case (s) | memory gained (MiB) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in outcomes:
        lines.append(
            f"| {one.target} | {one.cases:,} | {one.refused:,} | {failed(one)} | {one.cases / max(one.seconds, 1e-9):,.0f} |"
            f" {one.slowest:.2f} | {one.memory / 2**20:.0f} |"
        )
    tried, refused = sum(one.cases for one in outcomes), sum(one.refused for one in outcomes)
    lines.append(f"| all | {tried:,} | {refused:,} | {sum(map(failed, outcomes))} | | | |")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, as Linux reports it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else "an unknown processor"


BEGIN, END = "<!-- fuzzing: begin -->", "<!-- fuzzing: end -->"


def rewritten(page: str, report: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Put the table and its conditions between the marks of a page. Raises `UserError` if the marks are missing."""
    before, begin, rest = page.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--markdown: the file has no lines {BEGIN} and {END}")
    how = (
        f"{report['date']}, `{' '.join(report['command'])}` (engine {report['engine']}, Python"
        f" {report['python']}, commit {report['commit']}), {report['machine']}:\n"
        f"**{report['tried']:,} inputs tried, {report['failures']} failures.**"
    )
    return f"{before}{begin}{how}\n\n{table(outcomes)}\n{end}{after}"


def _loaded(paths: list[Path]) -> dict[str, Any]:
    """Combine earlier reports. The date and machine are the newest report's; targets in several reports are added up."""
    reports: list[dict[str, Any]] = []
    parts: dict[str, list[Outcome]] = {}
    for path in paths:
        try:
            reports.append(read_json(path))
            for one in reports[-1]["targets"]:
                parts.setdefault(one["target"], []).append(Outcome(**one))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--load: {path} is not a report of this command ({error})") from None
    targets = [vars(together(name, parts[name])) for name in SHARES if name in parts]
    whole = max(reports, key=lambda report: str(report.get("date")))
    for name in ("tried", "failures"):
        whole = {**whole, name: sum(report[name] for report in reports)}
    commands = [" ".join(report["command"]) for report in reports]
    return {
        **whole,
        "command": [*commands[0].split(), *(f"; {command}" for command in commands[1:])],
        "targets": targets,
    }


def main(args: FuzzArgs) -> int:
    if args.folder is not None:
        return work(args)
    if args.target == "list":
        print("\n".join(SHARES))
        return 0
    if args.target != "all" and args.target not in SHARES:
        raise UserError(f"unknown target {args.target!r}; choose from all, {', '.join(SHARES)}")
    if args.markdown is not None and not args.markdown.is_file():
        raise UserError(f"--markdown: {args.markdown} does not exist")
    if args.load:
        report = _loaded(args.load)
        outcomes = [Outcome(**one) for one in report["targets"]]
    else:
        outcomes = run_all(args)
        report = _report(args, outcomes)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.markdown is not None:
        write_atomic(args.markdown, rewritten(args.markdown.read_text(encoding="utf-8"), report, outcomes))
    print(json.dumps(report, indent=1) if args.json else table(outcomes))
    if not args.json:
        for one in outcomes:
            for failure in one.failures:
                where = f"{one.target}, case {failure['case']} ({failure['cases']} alike)"
                print(f"\n{where}: {failure['what']}\n{failure['trace']}")
    return 1 if report["failures"] else 0


def _report(args: FuzzArgs, outcomes: list[Outcome]) -> dict[str, Any]:
    target = [] if args.target == "all" else ["--target", args.target]
    return {
        "command": [
            "python",
            "benchmarks/reliability/fuzz.py",
            "--cases",
            str(args.cases),
            "--seed",
            str(args.seed),
            *target,
        ],
        "seed": args.seed,
        "engine": args.engine,
        "python": sys.version.split()[0],
        "machine": f"{processor()}, {os.cpu_count()} processors, load {os.getloadavg()[1]:.1f} at the end",
        "commit": git_commit(ROOT),
        "date": time.strftime("%Y-%m-%d"),
        "tried": sum(one.cases for one in outcomes),
        "failures": sum(map(failed, outcomes)),
        "bounds": {"seconds": SECONDS, "memory_bytes": MEMORY, "line_characters": MOST_LINE},
        "targets": [vars(one) for one in outcomes],
    }


if __name__ == "__main__":
    run_command(FuzzArgs, main)
