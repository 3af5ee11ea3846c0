"""Weights & Biases gets what metrics.jsonl gets, under one id across resumptions, and ends no run when it fails."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import many
import pytest
from helpers import MICRO, micro_config

from recurrent_db.accounting.flops import Cost
from recurrent_db.store import metrics
from recurrent_db.store.folder import list_checkpoints
from recurrent_db.store.metrics import MetricLog, StepClock, read_metrics
from recurrent_db.store.train_state import TrainState
from recurrent_db.training import trainer

Run = Callable[..., subprocess.CompletedProcess[str]]


def words(data: Path, run: Path, *more: object) -> list[str]:
    return [*MICRO, "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def start(data: Path, run: Path, *more: object, **configured: str) -> many.Job:
    """The trainer with the real wandb, in a process of its own with nobody to ask and nothing else configured."""
    removed = dict.fromkeys(name for name in os.environ if name.startswith("WANDB_"))
    configured = {"HOME": str(run.parent), "NETRC": str(run.parent / "netrc"), **configured}
    logs = run.parent / f"log-{len(list(run.parent.glob('log-*')))}"
    return many.start(logs, many.train, words(data, run, *more), **{**removed, **configured})


def wait_for(condition: Callable[[], object], job: many.Job) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert job.processes[0].exitcode is None, job.text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def said_by(job: many.Job) -> str:
    """What a trainer has said, once it has ended well."""
    assert job.wait(300) == [0], job.text()
    return job.text()


def warnings(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("warning:")]


# ---------------------------------------------------------------------------------------------------------------------
# The real wandb, offline, and what it wrote


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: seven bytes of header, then a LevelDB log of protobuf messages.

    A log is blocks of 32 KiB; a chunk in it is a checksum (4 bytes), a length (2), a kind (1: whole, 2: first, 3:
    middle, 4: last part of a message) and the bytes. A block's last six bytes or fewer are padding.
    """
    from wandb.proto import wandb_internal_pb2

    content, at, message = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:
            at += left
            continue
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def offline_files(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


def history(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """wandb's step and our columns for each row that it has."""
    return [
        (r.history.step.num, {i.nested_key[0]: json.loads(i.value_json) for i in r.history.item
                              if not i.nested_key[0].startswith("_")})
        for r in records(path) if r.HasField("history")
    ]  # fmt: skip


def expected(run: Path) -> list[tuple[int, dict[str, Any]]]:
    return [
        (row["step"], {k: v for k, v in row.items() if v is not None}) for row in read_metrics(run / "metrics.jsonl")
    ]


def test_offline_rows_and_config_are_those_of_the_run(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    job = start(data, run, "--run.wandb", "offline", "--budget.steps", 40,
                    "--objective.name", "denoise")  # fmt: skip
    stderr = said_by(job)
    assert not warnings(stderr)
    assert "Traceback" not in stderr
    (path,) = offline_files(run)
    assert len(expected(run)) == 40
    assert any("eval/nll_k2" in row for _, row in expected(run))
    assert any(value is None for row in read_metrics(run / "metrics.jsonl") for value in row.values())  # left out there
    assert history(path) == expected(run)
    (started,) = (r.run for r in records(path) if r.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in started.config.update if item.key != "_wandb"}
    assert config == json.loads((run / "config.json").read_text())
    assert (started.project, started.display_name) == ("recurrent_db", "run")
    assert started.run_id == (run / "wandb_id").read_text()
    assert [r.exit.exit_code for r in records(path) if r.HasField("exit")] == [0]


def test_a_killed_and_resumed_run_is_whole_under_its_id(data: Path, tmp_path: Path) -> None:
    """wandb's file of a killed process lacks its last seconds; the next one starts with them."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    options = ["--run.wandb", "offline", "--run.log_every", 3, "--run.checkpoint_every", 10, "--eval.points", 0]
    job = start(data, run, *options, "--budget.steps", 100_000)
    wait_for(lambda: list_checkpoints(run), job)
    job.processes[0].kill()
    job.wait()
    killed_at = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))
    said_by(start(data, run, *options, "--budget.steps", killed_at + 20, "--resume"))
    first, second = offline_files(run)
    assert first.name == second.name == f"run-{(run / 'wandb_id').read_text()}.wandb"
    assert [step for step, _ in history(second)] == list(range(1, killed_at + 21))
    assert history(second) == expected(run)
    assert (run / "wandb/latest-run").resolve() == second.parent.resolve()


def test_online_without_a_key_asks_nobody(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    job = start(data, run, "--run.wandb", "online", "--budget.steps", 3)
    stderr = said_by(job)
    (warning,) = warnings(stderr)
    assert "wandb login" in warning
    assert len(read_metrics(run / "metrics.jsonl")) == 3


def test_a_disk_that_wandb_cannot_write(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    run.mkdir()
    (run / "wandb").write_text("in the way of a folder")
    job = start(data, run, "--run.wandb", "offline", "--budget.steps", 3, "--resume")
    stderr = said_by(job)
    assert len(warnings(stderr)) == 1
    assert len(read_metrics(run / "metrics.jsonl")) == 3


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds wandb's process in /proc")
def test_wandbs_own_process_dies(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    job = start(data, run, "--run.wandb", "offline", "--run.log_every", 1, "--budget.seconds", 3)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) > 5, job)
    pid = job.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (service,) = [int(child) for child in children if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(service, signal.SIGKILL)
    stderr = said_by(job)
    assert len(warnings(stderr)) == 1
    assert "Traceback" not in stderr
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert f"done: {len(steps)} steps" in stderr


# ---------------------------------------------------------------------------------------------------------------------
# The real wandb, online, to a server of a few lines


class Server(ThreadingHTTPServer):
    """Answers what wandb asks before and during a run, and keeps the rows that it is sent."""

    def __init__(self, has: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.has = has
        """Steps of an earlier part of the run that it has."""
        self.received: list[tuple[int, dict[str, Any]]] = []
        """Line of the run's history there, and the row."""

    def answer(self, query: str) -> dict[str, Any]:
        owner = {"id": "1", "name": "somebody"}
        last = json.dumps({"_step": self.has, "step": self.has})
        bucket = {
            "id": "1", "name": "run", "displayName": "run", "summaryMetrics": last, "historyLineCount": self.has,
            "historyTail": json.dumps([last]), "eventsTail": "[]", "eventsLineCount": 0, "logLineCount": 0, "tags": [],
            "config": "{}", "wandbConfig": json.dumps({"t": 1}), "project": {"id": "1", "name": "p", "entity": owner},
        }  # fmt: skip
        if "query RunResumeStatus" in query:
            return {"model": {"id": "1", "name": "p", "entity": owner, "bucket": bucket} if self.has else None}
        if "mutation UpsertBucket" in query:
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.has}}
        if "mutation CreateRunFiles" in query:
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}
        return {
            "viewer": {"id": "1", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": {"edges": []}}
        }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        content = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            answer = {"data": self.server.answer(json.loads(content)["query"])}
        elif self.path.endswith("/file_stream"):
            sent = json.loads(content).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.server.received += enumerate(map(json.loads, sent["content"]), sent["offset"])
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("has", [0, 5])
def test_online_a_resumed_run_sends_the_rows_that_the_server_lacks(data: Path, tmp_path: Path, has: int) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    trainer.train(micro_config(*words(data, run, "--budget.steps", 8)))
    with Server(has) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        job = start(data, run, "--run.wandb", "online", "--budget.steps", 12, "--resume",
                        WANDB_BASE_URL=where, WANDB_API_KEY="0" * 40)  # fmt: skip
        stderr = said_by(job)
        server.shutdown()
    assert not warnings(stderr)
    assert "monotonically" not in stderr
    sent = [(line, {k: v for k, v in row.items() if not k.startswith("_")}) for line, row in server.received]
    assert sent == [(step - 1, row) for step, row in expected(run) if step > has]
    assert [row["_step"] for _, row in server.received] == list(range(has + 1, 13))


# ---------------------------------------------------------------------------------------------------------------------
# A stand-in


class Wandb(SimpleNamespace):
    """What metrics.py uses of wandb, failing where told."""

    def __init__(self, fails: str = "", error: BaseException | None = None, step: int = 0) -> None:
        self.fails, self.error, self.starting_step = fails, error, step
        self.logged: list[int] = []
        self.given: dict[str, Any] = {}
        self.finished = False

    def at(self, place: str) -> None:
        if place == self.fails and self.error is not None:
            raise self.error

    def Settings(self, **given: Any) -> Any:
        return given

    def login(self, prompt: bool) -> bool:
        assert not prompt
        self.at("login")
        return True

    def init(self, **given: Any) -> Wandb:
        self.at("init")
        self.given = given
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        if step == 3:
            self.at("log")
        self.logged.append(step)

    def finish(self) -> None:
        self.at("finish")
        self.finished = True

    def teardown(self, code: int) -> None:
        self.at("teardown")


MESSAGE = "no\nhost\n" + "x" * 500


@pytest.mark.parametrize(
    ("fails", "error", "logged"),
    [
        ("login", RuntimeError(MESSAGE), []),
        ("init", RuntimeError(MESSAGE), []),
        ("init", SystemExit(1), []),
        ("init", KeyboardInterrupt(), []),
        ("init", BaseException(MESSAGE), []),
        ("log", ConnectionResetError(MESSAGE), [1, 2]),
        ("log", SystemExit(1), [1, 2]),
        ("log", OSError(28, "No space left on device"), [1, 2]),
        ("finish", TimeoutError(MESSAGE), [1, 2, 3, 4, 5]),
        ("finish", SystemExit(1), [1, 2, 3, 4, 5]),
    ],
)
def test_a_failing_wandb_costs_one_warning(
    script_here: Run,
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    tmp_path: Path,
    fails: str,
    error: BaseException,
    logged: list[int],
) -> None:
    stand_in = Wandb(fails, error)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run = tmp_path / "run"
    result = script_here("train/pretrain.py", *words(data, run, "--run.wandb", "online", "--budget.steps", 5))
    assert result.returncode == 0, result.stderr
    (warning,) = warnings(result.stderr)
    assert type(error).__name__ in warning
    assert len(warning) < 300
    assert len(read_metrics(run / "metrics.jsonl")) == 5
    assert stand_in.logged == logged


def test_wandb_is_not_installed(script_here: Run, monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    result = script_here("train/pretrain.py", *words(data, run, "--run.wandb", "offline", "--budget.steps", 5))
    assert result.returncode == 0, result.stderr
    assert len(warnings(result.stderr)) == 1
    assert len(read_metrics(run / "metrics.jsonl")) == 5


def test_a_failure_while_a_failure_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hopeless(Wandb):
        def at(self, place: str) -> None:
            if place in ("init", "teardown"):
                raise SystemExit(place)

    monkeypatch.setitem(sys.modules, "wandb", Hopeless())
    log = MetricLog(tmp_path, micro_config("--run.wandb", "offline"), 0)
    log.add({"step": 1})
    log.close()
    (warning,) = warnings(capsys.readouterr().err)
    assert "SystemExit: init" in warning
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_resumed_run_sends_what_wandb_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server (or, offline, the new folder) says which step it expects next; nothing before that is sent."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 13)))
    config = micro_config("--run.wandb", "online")
    ids = set()
    for expects, sent in ((0, [*range(1, 11), 11]), (6, [*range(6, 11), 11]), (11, [11]), (14, [])):
        stand_in = Wandb(step=expects)
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
        log = MetricLog(tmp_path, config, start_step=10)  # the checkpoint; rows 11 and 12 are from after it
        log.add({"step": 11})
        log.close()
        assert stand_in.logged == sent
        assert stand_in.finished
        ids.add((stand_in.given["id"], stand_in.given["resume"]))
    assert ids == {((tmp_path / "wandb_id").read_text(), "allow")}


class Meter:
    """A meter that has used one joule for each reading of the clock."""

    def __init__(self, joules: list[float | None]) -> None:
        self.answers = joules

    def joules(self) -> float | None:
        return self.answers.pop(0)


def test_time_and_energy_are_shared_out_by_flops_and_only_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 16.0, 100.0, 103.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    # Read where an interval starts (thrown away: evaluation, a checkpoint) and where it ends.
    clock, state = StepClock(1e3, Meter([99.0, 30.0, 99.0, 7.0])), TrainState()  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = [{}, {}, {}]
    cost = Cost(forward=1.0, backward_input=1.0, backward_weight=1.0, recomputed=1.0)
    clock.start()
    clock.add(rows[0], 10, cost)
    clock.start()
    clock.add(rows[1], 20, cost)
    clock.settle(state)
    clock.settle(state)  # nothing has happened since
    assert [rows[0]["seconds"], rows[1]["seconds"]] == [2.0, 6.0]
    assert [rows[0]["energy_joules"], rows[1]["energy_joules"]] == [10.0, 30.0]
    assert rows[1]["tokens_per_s"] == 5.0
    assert rows[1]["mfu"] == 3 * 20 / 4 / 1e3
    assert rows[1]["hfu"] == 4 * 20 / 4 / 1e3
    clock.start()
    clock.add(rows[2], 10, cost)
    clock.settle(state)
    assert (state.seconds, state.energy_joules) == (9.0, 37.0)
    assert rows[2]["energy_joules"] == 37.0
