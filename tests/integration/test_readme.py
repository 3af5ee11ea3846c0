"""The README's commands are run as they stand, with a smaller vocabulary and budget."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent_db.config import Config
from recurrent_db.schema import keys

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {"8192": "512", "2e7": "4e3", "1,2,4,8,16,32": "1,2"}


def commands(section: str) -> list[list[str]]:
    """The commands of the first code block under a heading, each as words."""
    block = re.search(rf"## {section}\n.*?```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


def test_a_run_of_ones_own(tmp_path: Path, texts: list[str]) -> None:
    pytest.importorskip("lm_eval", reason="one of the README's commands runs lm-eval, which is not installed")
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number}.txt").write_bytes(text.encode())
    for folder in ("recurrent_db", "train", "eval", "tokenizers"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = commands("Your own run")
    assert len(run) == 6
    for words in run:
        words = [SMALLER.get(word, word) for word in words]
        words = {"python": [sys.executable], "recurrent-db": [sys.executable, "-m", "recurrent_db"]}[words[0]] + words[
            1:
        ]
        if "heldout_cloze" in words:
            words += ["--limit", "5"]
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{shlex.join(words)}: {result.stderr}"
    assert (tmp_path / "report.html").exists()


DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("recurrent_db", "train", "eval", "tokenizers", "benchmarks", "tests", "docs")
SUFFIXES = (".py", ".sh", ".sbatch", ".toml", ".md")
OTHERS = (".json", ".safetensors")
"""What a run leaves."""


def repository() -> set[str]:
    """Every file and folder of the repository, and every end of its path: a/b/c.py, b/c.py, c.py."""
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    ends = {"/".join(path.parts[start:]) for path in paths for start in range(len(path.parts))}
    return ends | {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    words = re.findall(r"(?<![\w/.-])[a-z_][\w./-]*[\w/]", text)
    words = [word for word in words if not re.search(r"[A-Z]{2}", word)]  # a/NAME.py is a placeholder
    named = {word for word in words if word.endswith(SUFFIXES) or (word.endswith("/") and word.startswith(FOLDERS))}
    known = repository()
    missing = {word for word in named if word.rstrip("/") not in known}
    assert {word for word in missing if not word.startswith("benchmarks/results/")} == set()  # what benchmarks write
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not link.startswith("http") and not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_a_document_names_is_there(document: Path) -> None:
    """Dotted keys of the configuration."""
    known = set(keys(Config))
    sections = {key.split(".")[0] for key in known if "." in key}
    options = re.findall(
        rf"(?:--|`)((?:{'|'.join(sections)})(?:\.[\w-]+)+)(?![\w(])", document.read_text(encoding="utf-8")
    )
    named = {option.replace("-", "_") for option in options if not option.endswith((*SUFFIXES, *OTHERS))}
    groups = {key.rpartition(".")[0] for key in known} | {"model.silent_state"}  # what the objective sets
    assert {name for name in named if name not in known | groups} == set()
