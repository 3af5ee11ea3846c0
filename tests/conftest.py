"""What tests share: a small tokenizer, a small data directory, synthetic runs and their report, each made once."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from block_runs import train_frozen
from fake_runs import OBJECTIVES, fake_run
from helpers import synthetic_data
from quick_python import QuickPython

from recurrent_db.data import corpus, prepare
from recurrent_db.data.tokenizer import Tokenizer, train
from recurrent_db.report.page import write_report

# transformers copies the code of an exported folder before it runs it, and reads this once: a folder for each process, and
# not the user's home.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
CORPUS_BYTES = 300_000


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 300 KB of the standard library: every tenth file, so that the subset is not all of one package."""
    chosen: list[str] = []
    for document in list(corpus.stdlib_documents())[::10]:
        if len(document.text) < 30_000 and sum(map(len, chosen)) + len(document.text) <= CORPUS_BYTES:
            chosen.append(document.text)
    return [text for text in chosen if text]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Model file of a BPE tokenizer with 512 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train(texts, 512))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> Path:
    """Data directory of about 300 KB of source code: one source named "default", train and validation."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:03d}.py").write_bytes(text.encode())
    prepare([str(folder / "text")], tokenizer, folder / "shards", workers=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data directory of the synthetic language of `helpers`, a new one for each file of tests."""
    return synthetic_data(tmp_path_factory.mktemp("synthetic") / "data")


@pytest.fixture(scope="module")
def frozen_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of two blocks that were trained apart over a frozen embedding."""
    return train_frozen(data, tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the repository, which may hold benchmark files."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder 'shared' beside the repository: its benchmark files are not part of the project")
    return path


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of the repository in a process of its own: ``script("train/prepare_data.py", "--help")``."""

    def run(path: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        import many  # it imports the trainer, which fast tests have no need of

        return many.script(tmp_path_factory.mktemp("script"), ROOT / path, *arguments)

    return run


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An executable that stands for Python and has torch imported: for programs that start Python themselves."""
    server = QuickPython(tmp_path_factory.mktemp("python"), ROOT)
    yield str(server.executable)
    server.stop()


@pytest.fixture
def script_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `script`, but in this process: the same code without two seconds of imports."""

    def run(path: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / path), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(command[0], run_name="__main__")
        out, err = capfd.readouterr()
        code = stop.value.code
        return subprocess.CompletedProcess(command, code if isinstance(code, int) else int(code is not None), out, err)

    return run


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One complete run of each objective, with baselines beside them."""
    root = tmp_path_factory.mktemp("three")
    (root / "baselines.json").write_text(json.dumps({"unigram": 5.1, "bigram": 3.4, "corpus": "stdlib"}))
    return [fake_run(root / name, name, floor=2.2 + 0.2 * i, seed=i) for i, name in enumerate(OBJECTIVES)]


@pytest.fixture(scope="session")
def page(three_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of `three_runs`."""
    output = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    write_report(three_runs, output)
    return output.read_text(encoding="utf-8")
