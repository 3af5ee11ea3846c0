"""The code blocks of the documentation, and how a test runs them: see `test_docs.py`."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from recurrent_db import cli
from recurrent_db.config import load_config

NAVIGATION = re.findall(r"[-:] ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in NAVIGATION))
LANGUAGES = ("sh", "python", "toml", "json", "text")
REASONS = ("needs a GPU", "needs the network", "needs several machines", "takes minutes")
"""Why a block may stay unrun, in the comment before it: ``<!-- not run: REASON -->``. A block that takes minutes names the
test or make target that runs it: ``<!-- not run: takes minutes (make demo) -->``."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    code: str
    comment: str
    """Of the line before it, where that is an HTML comment."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def not_run(self) -> str:
        """The reason why no test runs it; empty where one does."""
        return found[1] if (found := re.fullmatch("not run: (.*)", self.comment)) else ""

    @property
    def run_by(self) -> str:
        """The other test that runs it; empty where `run_page` does."""
        return found[1] if (found := re.fullmatch("run by (.*)", self.comment)) else ""

    @property
    def runs_here(self) -> bool:
        return self.language in ("sh", "python", "toml") and not self.not_run and not self.run_by


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"(?:<!-- ([^\n]*?) -->\n\s*?)?^( *)```(\w*)[^\n`]*\n(.*?)^\2```\s*?$", re.MULTILINE | re.DOTALL)
    found = []
    for match in fence.finditer(text):
        comment, indent, language, code = match.groups()
        code = "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        found.append(Block(page, text.count("\n", 0, match.start(2)) + 1, language, code, comment or ""))
    return found


# -- shell commands ----------------------------------------------------------------------------------------------------

SMALL = {
    "train": {"--budget.steps": "2", "--eval.tokens": "256", "--eval.points": "1", "--run.device": "cpu",
              "--data.batch-size": "2", "--data.sequence-length": "32"},
    "depth_curve": {"--tokens": "256", "--draws": "2"},
    "lm_eval_cli": {"--limit": "2"},
    "sweep": {"--limit": "2"},
    "generation": {"--prompts": "4", "--prompt-tokens": "8", "--tokens": "8", "--resamples": "4", "--k": "1"},
    "decode": {"--tokens": "16", "--prompts": "1", "--rows": "1"},
    "images": {"--samples": "640", "--sampler-steps": "2"},
    "masked": {"--tokens": "256", "--steps": "2"},
    "train_tokenizer": {"--vocab-size": "512", "--max-documents": "40"},
    "prepare_data": {"--max-documents": "40", "--workers": "1"},
}  # fmt: skip
"""Options by command that make it small. They replace what a page says."""
TRAINING = ("pretrain", "train_judge", "train")


def smaller(command: str, words: list[str]) -> list[str]:
    """A command's words with a tiny budget and few iterations."""
    kind = "train" if command in TRAINING else command
    for option, value in SMALL.get(kind, {}).items():
        if kind == "train" and option == "--budget.steps":
            for given in [word for word in words if word.startswith("--budget.")]:
                at = words.index(given)
                del words[at : at + 2]
        spellings = {option, option.replace("-", "_").replace("__", "--", 1)}
        if places := [at for at, word in enumerate(words) if word in spellings]:
            words[places[0] + 1] = value
        elif kind != "images":  # classifiers and generators have options of their own
            words = [*words, option, value]
    if kind == "depth_curve" and "--k" in words:
        at = words.index("--k") + 1
        words[at] = ",".join(words[at].split(",")[:2])
    return words


def commands(code: str) -> Iterator[str]:
    """The commands of a block, one a line, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.strip().startswith("#"):
            yield line.strip()


class Runner:
    """Runs the blocks of one page, in order, in the folder ``home``.

    Commands of the project run in this process: importing torch anew for each would take most of the time.
    """

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home, self.patch = home, patch
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.there = {path for path in home.rglob("*") if not path.is_symlink()}
        patch.chdir(home)

    def run(self, block: Block) -> None:
        """Run a block. Raises AssertionError with the block's place and the command."""
        if block.language == "python":
            code = re.sub(r"--budget\.\w+ [\d.e]+", "--budget.steps 2 --eval.tokens 256", block.code)
            exec(compile(code, str(block), "exec"), self.names)
        elif block.language == "toml":
            (self.home / "block.toml").write_text(block.code, encoding="utf-8")
            load_config(self.home / "block.toml")
        else:
            for line in commands(block.code):
                self.command(line, f"{block}: {line}")

    def command(self, line: str, place: str) -> None:
        """Run a command line: a command of the project, maybe fed by printf and redirected, or anything else by bash."""
        given, _, fed = line.rpartition(" | ")
        fed, _, target = fed.partition(" > ")
        words = shlex.split(fed, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]) and words[1:]:
            name, _, value = words.pop(0).partition("=")
            self.patch.setenv(name, value)
        if words[0].startswith("train/launch/blocks.sh") and "--dry-run" not in words:
            return self._blocks(words, place)
        if words[0] == "python" and words[1:] and words[1].endswith(".py"):
            script, words = words[1], words[2:]
            name = Path(script).stem
        elif words[0] == "recurrent-db" and words[1:]:
            script, name, words = "", words[1], words[2:]
        else:
            self._bash(line, place)
            return None
        words = smaller(name, words)
        self._make_room(words)
        entered = subprocess.run(["bash", "-c", given], capture_output=True, check=True).stdout if given else b""
        argv = [script, *words] if script else ["recurrent-db", name, *words]
        threads = torch.get_num_threads()
        with self._streams(argv, entered) as (out, error):
            try:
                runpy.run_path(script, run_name="__main__") if script else cli.main()
            except SystemExit as stop:
                status = stop.code or 0
            else:
                status = 0
        torch.set_num_threads(threads)  # a command may choose its own number
        printed, said = (stream.buffer.getvalue().decode() for stream in (out, error))  # type: ignore[attr-defined]
        assert status == 0, f"{place}\nran {shlex.join(argv)}\n{printed[-2000:]}\n{said[-2000:]}"
        if target:
            Path(target.strip()).write_text(printed, encoding="utf-8")
        return None

    @contextlib.contextmanager
    def _streams(self, argv: list[str], entered: bytes) -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
        stdin = io.TextIOWrapper(io.BytesIO(entered), encoding="utf-8")
        out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), self.patch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "argv", argv)
            if argv[0].endswith(".py"):
                patch.syspath_prepend(str((self.home / argv[0]).resolve().parent))
            yield out, error

    def _make_room(self, words: list[str]) -> None:
        """Remove what the test has put where the page's own command writes."""
        for option, name in itertools.pairwise(words):
            path = self.home / name
            if option in ("--out", "--run.dir") and path in self.there and "--resume" not in words:
                self.there.discard(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _blocks(self, words: list[str], place: str) -> None:
        """The commands that ``blocks.sh`` would run, one after another."""
        said = self._bash(shlex.join([words[0], "--dry-run", *words[1:]]), place)
        _, _, would_run = said.partition("would run")
        for line in would_run.splitlines()[1:]:
            self.command(line.strip().replace(sys.executable, "python", 1), place)
        runs = Path(words[2])
        parts = [str(path) for path in sorted(runs.glob("block-*"))]
        self.command(shlex.join(["recurrent-db", "blocks", "join", *parts, str(runs / "joined")]), place)

    def _bash(self, line: str, place: str) -> str:
        """Run a line by bash; what it prints."""
        tools = self.home / ".tools"
        tools.mkdir(exist_ok=True)
        for name, call in (("python", ""), ("recurrent-db", "-m recurrent_db ")):
            (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call}"$@"\n')
            (tools / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{place}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout
