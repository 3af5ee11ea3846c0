"""Weights & Biases gets what metrics.jsonl gets, under one id across resumptions, and ends no run when it fails."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import MICRO, ROOT, micro_config, synthetic_data

from recurrent_db.checkpoint import list_checkpoints
from recurrent_db.metrics import MetricLog, read_metrics

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_data(tmp_path_factory.mktemp("synthetic") / "data")


def words(data: Path, run: Path, *more: object) -> list[str]:
    return [*MICRO, "--data.path", str(data), "--run.dir", str(run), *map(str, more)]


def start(data: Path, run: Path, *more: object) -> subprocess.Popen[str]:
    """The trainer with the real wandb, in a process of its own with nobody to ask and nothing configured."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "train/pretrain.py", *words(data, run, *more)],
        cwd=ROOT,
        env={**environment, "HOME": str(run.parent), "NETRC": str(run.parent / "netrc")},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    process = start(data, run, "--run.wandb", "offline", "--run.wandb_project", "loops", "--budget.steps", 40)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
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
    assert (started.project, started.display_name) == ("loops", "run")
    assert started.run_id == (run / "wandb_id").read_text()
    assert [r.exit.exit_code for r in records(path) if r.HasField("exit")] == [0]


def test_a_killed_and_resumed_run_is_whole_under_its_id(data: Path, tmp_path: Path) -> None:
    """wandb's file of a killed process lacks its last seconds; the next one starts with them."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    options = ["--run.wandb", "offline", "--run.log_every", 3, "--run.checkpoint_every", 10, "--eval.points", 0]
    process = start(data, run, *options, "--budget.steps", 100_000)
    wait_for(lambda: list_checkpoints(run), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))
    process = start(data, run, *options, "--budget.steps", killed_at + 20, "--resume")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    first, second = offline_files(run)
    assert first.name == second.name == f"run-{(run / 'wandb_id').read_text()}.wandb"
    assert [step for step, _ in history(second)] == list(range(1, killed_at + 21))
    assert history(second) == expected(run)
    assert (run / "wandb/latest-run").resolve() == second.parent.resolve()


def test_online_without_a_key_asks_nobody(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    process = start(data, run, "--run.wandb", "online", "--budget.steps", 3)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    (warning,) = warnings(stderr)
    assert "wandb login" in warning
    assert len(read_metrics(run / "metrics.jsonl")) == 3


def test_a_disk_that_wandb_cannot_write(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    run.mkdir()
    (run / "wandb").write_text("in the way of a folder")
    process = start(data, run, "--run.wandb", "offline", "--budget.steps", 3, "--resume")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert len(warnings(stderr)) == 1
    assert len(read_metrics(run / "metrics.jsonl")) == 3


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds wandb's process in /proc")
def test_wandbs_own_process_dies(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    process = start(data, run, "--run.wandb", "offline", "--run.log_every", 1, "--budget.seconds", 3)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) > 5, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (service,) = [int(child) for child in children if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(service, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert len(warnings(stderr)) == 1
    assert "Traceback" not in stderr
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert f"done: {len(steps)} steps" in stderr


# ---------------------------------------------------------------------------------------------------------------------
# A stand-in


class Wandb(SimpleNamespace):
    """What metrics.py uses of wandb, failing where told."""

    def __init__(self, fails: str = "", error: BaseException | None = None, step: int = 0) -> None:
        self.fails, self.error, self.step = fails, error, step
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
