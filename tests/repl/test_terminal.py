"""The REPL as a program: through a pipe, and at real terminals (a pseudo-terminal; tmux where it is installed)."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from repl_runs import WINDOW, Command, Loaded

from recurrent_db import generate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.model import LoopedLM
from recurrent_db.repl import console


@pytest.fixture
def command(quick_python: str) -> Command:
    """The words that start a session on a run."""
    return lambda run, *options: [quick_python, "-m", "recurrent_db", "repl", str(run), "--device", "cpu", *options]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    own = {"XDG_STATE_HOME": str(tmp_path / "state"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return {**kept, **own, **more}


def test_pipe(command: Command, runs: dict[str, Path], loaded: dict[str, Loaded], tmp_path: Path) -> None:
    long = "word " * 200
    lines = [
        b"def main(", b"", b"caf\xff", b"/nonsense", b"/k 4", b"def main(", b'"""', b"def f():", b"    return", b'"""',
        long.encode(), b"/trace", f"/save {tmp_path / 't.json'}".encode(), b"/k 1", b"the end",
    ]  # fmt: skip
    result = subprocess.run(
        command(runs["unrolled"], "--max-new-tokens", "16", "--k", "2"),
        input=b"\n".join(lines), capture_output=True, cwd=tmp_path, env=environment(tmp_path), timeout=300,
    )  # fmt: skip
    told = result.stderr.decode()
    assert result.returncode == 0, told
    assert "Traceback" not in told
    tokens = len(loaded["unrolled"][1].encode(long))
    assert told.splitlines() == [
        "the line is empty: type a prompt, or /help for the commands",
        "the input is not UTF-8, so it is ignored: byte 4 is 0xff",
        "unknown command /nonsense; /help lists the commands",
        "k = 4",
        f"the prompt has {tokens} tokens, so only its last {WINDOW}, the model's context, are used",
        f"saved 4 texts to {tmp_path / 't.json'}",
        "k = 1",
    ]
    saved = json.loads((tmp_path / "t.json").read_text())
    assert [(text["prompt"], text["k"]) for text in saved] == [
        ("def main(", 2), ("def main(", 4), ("def f():\n    return", 4), (long, 4),
    ]  # fmt: skip
    model, tokenizer = loaded["unrolled"]
    asked = [*((text["prompt"], text["k"]) for text in saved), ("the end", 1)]
    texts = [generate(model, tokenizer, prompt, k=k, max_new_tokens=16) for prompt, k in asked]
    assert [text["text"] for text in saved] == texts[:4]
    out = result.stdout.decode()
    assert "\x1b" not in re.sub("|".join(map(re.escape, texts)), "", out)
    parts = [text + "\n" * (not text.endswith("\n")) for text in texts]
    assert out.startswith("".join(parts[:4]) + "token 1, after ")
    assert out.endswith(parts[4])


@pytest.mark.parametrize("lines", [b"def main(\n/k 3\n", b"", b"def main(\n/max 4\n"], ids=["text", "waiting", "more"])
def test_ctrl_c_in_a_pipe_ends_the_session(
    command: Command, runs: dict[str, Path], tmp_path: Path, lines: bytes
) -> None:
    process = subprocess.Popen(
        command(runs["next_token"], "--max-new-tokens", "1000000"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"/max 3\nthe\n/max 1000000\n" + lines)
    process.stdin.flush()
    assert process.stdout.read(20 if lines else 1)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told.decode().splitlines()[-1] == "interrupted"
    assert b"stopped" not in told
    assert out.endswith(b"\n") or not lines


# -- terminals -----------------------------------------------------------------------------------------------------------


_LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program at a pseudo-terminal of its own, 100 columns wide."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *words],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=env,
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def _more(self, until: float, what: str) -> bool:
        """Read what is there, or wait for it; False when the program has ended."""
        if not select.select([self.master], [], [], max(0, until - time.monotonic()))[0]:
            raise AssertionError(f"{what} did not come: {self.seen[-2000:]!r}")
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # as Linux tells of an end
            piece = b""
        self.seen += piece
        return bool(piece)

    def wait(self, word: str, seconds: float = 120) -> str:
        """What is shown up to and with ``word``, from where the last wait ended."""
        until = time.monotonic() + seconds
        while word.encode() not in self.seen:
            assert self._more(until, repr(word)), f"it ended before {word!r}: {self.seen[-2000:]!r}"
        place = self.seen.index(word.encode()) + len(word.encode())
        shown, self.seen = self.seen[:place], self.seen[place:]
        return shown.decode(errors="replace")

    def end(self, seconds: float = 120) -> int:
        """Exit status, once it has ended by itself."""
        until = time.monotonic() + seconds
        while self._more(until, "its end"):
            pass
        os.close(self.master)
        return self.process.wait(seconds)


@pytest.fixture
def at_terminal(command: Command, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(run: Path, *options: str, **variables: str) -> Terminal:
        env = environment(tmp_path, PROMPT_TOOLKIT_NO_CPR="1", **variables)
        opened.append(Terminal(command(run, *options), env))
        return opened[-1]

    yield start
    for terminal in opened:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


def stop_in_the_middle(screen: Terminal, model: LoopedLM, tokenizer: Tokenizer, asks: str) -> None:
    """A text without end is stopped, and the program goes on. ``asks`` is what it shows at a prompt."""
    text = console.visible_controls(generate(model, tokenizer, "def main(", k=2, max_new_tokens=12)).rstrip("\ufffd")
    screen.type(b"/max 1000000\r")
    screen.wait("max_new_tokens = 1000000")
    screen.type(b"def main(\r")
    screen.wait(text.replace("\n", "\r\n"))
    screen.type(b"\x03")
    screen.wait("stopped after ")
    screen.wait(asks)
    screen.type(b"/max 8\r")
    screen.wait("max_new_tokens = 8")


def test_terminal(
    runs: dict[str, Path], loaded: dict[str, Loaded], tmp_path: Path, at_terminal: Callable[..., Terminal]
) -> None:
    pytest.importorskip("prompt_toolkit", reason="line editing comes with the extra `repl`, which is not installed")
    screen = at_terminal(runs["unrolled"], "--k", "2")
    screen.wait("context 64 tokens, cpu; k 2. /help lists the commands.")
    stop_in_the_middle(screen, *loaded["unrolled"], asks="\x1b[?2004h")
    screen.wait("\x1b[?2004h")
    screen.type(b"\x03")
    screen.wait("leave with /quit or Ctrl-D")
    screen.type(b"\x1b[200~def f():\r    return\x1b[201~\r")  # a paste of two lines, as terminals send it
    screen.wait("[8 tokens; ")
    screen.type(b"a\xffb\r")
    screen.wait("is not UTF-8")
    screen.type(b"\r")
    screen.wait("the line is empty")
    screen.type(b"/trace\r")
    assert "\x1b[2m   k  entropy" in screen.wait("most likely")
    screen.type(b"one\x1b\rtwo\r")  # Alt-Enter
    screen.wait("[8 tokens; ")
    screen.type(b"/compare 1 4\r")
    screen.type(f"/save {tmp_path / 't.json'}\r".encode())
    screen.type(b"\x04")  # all of these before the texts are there
    assert re.search(r"k = 1 +\| k = 4", re.sub(r"\x1b\[\d*m", "", screen.wait("saved 5 texts to"))) is not None
    assert screen.end() == 0
    saved = json.loads((tmp_path / "t.json").read_text())
    assert [text["prompt"] for text in saved] == ["def main(", "def f():\n    return", *["one\ntwo"] * 3]
    assert [text["ended"] for text in saved][:2] == ["stopped", "length"]
    whole = generate(*loaded["unrolled"], "def main(", k=2, max_new_tokens=saved[0]["tokens"])
    assert saved[0]["text"] == whole
    history = (tmp_path / "state/recurrent_db/history").read_text()
    assert "+def f():\n+    return\n" in history
    # The next session has the history: the last prompt but one, with K changed.
    screen = at_terminal(runs["unrolled"], "--k", "2", "--max-new-tokens", "3", NO_COLOR="1")
    screen.wait("lists the commands.")
    screen.type(b"\x1b[A" * 3)
    screen.wait("two")
    screen.type(b"\r")
    screen.wait("[3 tokens; ")
    screen.type(b"/trace\r")
    assert "\x1b[2m   k" not in screen.wait("most likely")
    screen.type(b"\x04")
    assert screen.end() == 0


def test_terminal_without_prompt_toolkit(
    runs: dict[str, Path], loaded: dict[str, Loaded], tmp_path: Path, at_terminal: Callable[..., Terminal]
) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/prompt_toolkit.py").write_text("raise ModuleNotFoundError('prompt_toolkit')\n")
    path = f"{tmp_path / 'absent'}{os.pathsep}{ROOT}"
    screen = at_terminal(runs["denoise"], "--k", "2", PYTHONPATH=path)
    screen.wait("prompt_toolkit is not installed, so there is no history: pip install 'recurrent-db[repl]'")
    screen.wait("> ")
    stop_in_the_middle(screen, *loaded["denoise"], asks="> ")
    screen.type(b'"""\rone\rtwo\r"""\r')
    screen.wait("[8 tokens; ")
    screen.type(b"a\xffb\r")
    screen.wait("is not UTF-8")
    screen.wait("> ")
    screen.type(b"\x04")
    assert screen.end() == 0


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_tmux(command: Command, runs: dict[str, Path], tmp_path: Path) -> None:
    """What a screen shows in the end, and Ctrl-C as its keyboard sends it."""
    (tmp_path / "tmux.conf").write_text("set -g history-limit 100000\n")
    socket = ["tmux", "-S", str(tmp_path / "socket"), "-f", str(tmp_path / "tmux.conf")]

    def tmux(*words: str) -> str:
        return subprocess.run([*socket, *words], capture_output=True, text=True, check=True, timeout=300).stdout

    def keys(*words: str) -> None:
        tmux("send-keys", "-t", "repl", *words)

    def wait(pattern: str, seconds: float = 300) -> str:
        end = time.monotonic() + seconds
        while re.search(pattern, screen := tmux("capture-pane", "-p", "-S", "-", "-t", "repl")) is None:
            assert time.monotonic() < end, f"{pattern!r} did not come: {screen[-3000:]}"
            time.sleep(0.1)
        return screen

    started = command(runs["next_token"], "--max-new-tokens", "1000000", "--seed", "5")
    env = [f"{name}={value}" for name, value in environment(tmp_path, TERM="screen").items()]
    status = tmp_path / "status"
    shell = ["sh", "-c", f'trap : INT; "$@"; echo $? > {status}.new; mv {status}.new {status}', "sh"]
    tmux("new-session", "-d", "-s", "repl", "-x", "100", "-y", "40", *shell, "env", *env, *started)
    try:
        wait("/help lists the commands")
        keys("import os", "Enter")
        wait(r"> import os *\n+.*\S")  # the text has begun
        keys("C-c")
        wait(r"stopped after \d+ tokens\n>")
        keys("/max 6", "Enter")
        wait("max_new_tokens = 6\n>")
        keys("/compare 1 4 16", "Enter")
        wait(r"\nk = 1 +\| k = 4 +\| k = 16 *\n")
        keys("C-d")
        until = time.monotonic() + 300
        while not status.exists():
            assert time.monotonic() < until, "it did not end"
            time.sleep(0.1)
        assert status.read_text() == "0\n"
    finally:
        subprocess.run([*socket, "kill-server"], capture_output=True, timeout=300)
