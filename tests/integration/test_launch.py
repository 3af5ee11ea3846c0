"""The launchers: their dry runs, a real run of one process, and what the Slurm script does with signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, synthetic_data

LAUNCH = ROOT / "train/launch"
TINY = str(ROOT / "train/configs/tiny.toml")
SCRIPTS = ("torchrun.sh", "multinode.sh", "slurm.sbatch")


def environment(**more: str) -> dict[str, str]:
    slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**slurm, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def launch(script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], env=environment(**more), capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_bash_reads_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize(
    ("script", "variables", "gpus", "words"),
    [
        ("torchrun.sh", {"NPROC": "2"}, 2, ["--standalone", "--nproc-per-node 2", "--max-restarts 3"]),
        ("multinode.sh", {"NNODES": "2", "HEAD": "node0:29500", "NPROC": "4"}, 8,
         ["--nnodes 2", "--rdzv-backend c10d", "--rdzv-endpoint node0:29500", "--resume"]),
        ("slurm.sbatch", {"NODES": "1", "GPUS_PER_NODE": "8"}, 8, ["srun", "RANK=\\$SLURM_PROCID", "--resume"]),
    ],
)  # fmt: skip
def test_a_dry_run_prints_plan_and_command_and_starts_nothing(
    script: str, variables: dict[str, str], gpus: int, words: list[str], tmp_path: Path, quick_python: str
) -> None:
    run = tmp_path / "run"
    options = ["--run.dir", str(run), "--data.path", "nowhere", "--budget.tokens", "1e9"]
    done = launch(script, "--dry-run", TINY, *options, GPU="H200", PYTHON=quick_python, **variables)
    assert done.returncode == 0, done.stderr
    assert f"on {gpus} x H200" in done.stdout
    for told in ("peak memory, GB per GPU", "model FLOPs", "tokens/s", "budget", "would run:"):
        assert told in done.stdout
    command = done.stdout.split("would run:")[1]
    for word in [*words, "train/pretrain.py", str(run)]:
        assert word in command
    assert not run.exists()


def test_a_dry_run_of_blocks_prints_a_command_for_each_and_starts_nothing(tmp_path: Path, quick_python: str) -> None:
    done = launch(
        "blocks.sh", "--dry-run", str(ROOT / "train/configs/gpt-blocks.toml"), str(tmp_path / "runs"), "--seed", "3",
        PYTHON=quick_python,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if "pretrain.py" in line]
    assert [re.findall(r"--blocks.only (\d)", line) for line in commands] == [["1"], ["2"], ["3"], ["4"]]
    assert ["--init.from" in line for line in commands] == [False, True, True, True]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        ("torchrun.sh", [], {}, "usage"),
        ("torchrun.sh", [TINY], {"NPROC": "0"}, "NPROC must be"),
        ("torchrun.sh", ["--dry-run", TINY], {"NPROC": "1", "GPU": "H2000"}, "did you mean H200"),
        ("multinode.sh", [TINY], {"NNODES": "2"}, "HEAD must be"),
        ("multinode.sh", [TINY], {"HEAD": "a:1"}, "NNODES must be"),
        ("slurm.sbatch", [TINY, "--overwrite"], {}, "--overwrite"),
        ("slurm.sbatch", [TINY], {}, "not inside a Slurm job"),
    ],
)
def test_mistakes_are_one_line(
    script: str, words: list[str], variables: dict[str, str], message: str, quick_python: str
) -> None:
    done = launch(script, *words, PYTHON=quick_python, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_one_process_trains(tmp_path: Path, quick_python: str) -> None:
    synthetic_data(tmp_path / "data")
    options = ["--data.path", str(tmp_path / "data"), "--run.dir", str(tmp_path / "run"), "--budget.steps", "2"]
    options += ["--eval.points", "0", "--run.device", "cpu", "--data.batch-size", "2", "--data.sequence-length", "32"]
    done = launch("torchrun.sh", TINY, *options, NPROC="1", MAX_RESTARTS="0", PYTHON_EXEC=quick_python)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert list((tmp_path / "run/checkpoints").glob("step-*2"))


FAKES = {
    # A trainer that saves when it is told to stop, as srun's tasks do.
    "srun": 'trap \'echo saved >> "$LOG"; exit "$SAVED_STATUS"\' TERM\necho started >> "$LOG"\n'
    '[[ $QUICK == yes ]] && exit "$SAVED_STATUS"\nfor _ in $(seq 600); do sleep 0.05; done\n',
    "scontrol": 'if [[ $1 == show ]]; then echo node7; else echo "$*" >> "$LOG"; fi\n',
}


def slurm_job(tmp_path: Path, **more: str) -> tuple[subprocess.Popen[str], Path]:
    """The batch script with a false Slurm on PATH; what happens is written to a log."""
    for name, body in FAKES.items():
        path = tmp_path / name
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(0o755)
    log = tmp_path / "log"
    given = {"LOG": str(log), "SAVED_STATUS": "0", "QUICK": "no", "PATH": f"{tmp_path}:{os.environ['PATH']}", **more}
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), TINY]
    return subprocess.Popen(
        command, env=environment(**given, **job), stderr=subprocess.PIPE, text=True, start_new_session=True
    ), log


def wait_for(log: Path, word: str) -> None:
    end = time.monotonic() + 300
    while not (log.exists() and word in log.read_text()):
        assert time.monotonic() < end, f"no {word!r} in {log}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("saved_status", ["0", "1"])
def test_slurm_saves_and_requeues(tmp_path: Path, number: signal.Signals, saved_status: str) -> None:
    job, log = slurm_job(tmp_path, SAVED_STATUS=saved_status)
    wait_for(log, "started")
    os.kill(job.pid, number)  # to the batch script alone, as --signal=B: does
    _, errors = job.communicate(timeout=300)
    assert log.read_text().splitlines() == ["started", "saved", "requeue 41"]
    assert job.returncode == 0, errors
    assert ("exited with status 1" in errors) == (saved_status == "1")


@pytest.mark.parametrize("status", ["0", "3"])
def test_slurm_does_not_requeue_what_ended_by_itself(tmp_path: Path, status: str) -> None:
    job, log = slurm_job(tmp_path, QUICK="yes", SAVED_STATUS=status)
    job.communicate(timeout=300)
    assert job.returncode == int(status)
    assert log.read_text().splitlines() == ["started"]
