"""The REPL: in this process, through a pipe, and at real terminals (a pseudo-terminal; tmux where it is installed)."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
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
import torch
from helpers import OBJECTIVES, ROOT, make_checkpoint
from torch import Tensor

from recurrent_db import UserError, cli, generate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.denoise.noise import GRIDS
from recurrent_db.generation.decoder import Decoder, EndsText
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sequential import SequentialDecoder
from recurrent_db.model import LoopedLM
from recurrent_db.recurrence.loop import truncated_normal
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.repl import console
from recurrent_db.repl.console import (
    Interrupts,
    PlainLines,
    Utf8Writer,
    decode_line,
    side_by_side,
    state_file,
    width_of,
)
from recurrent_db.repl.session import Session
from recurrent_db.repl.trace import trace
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.loading import load

WINDOW = 64
Loaded = tuple[LoopedLM, Tokenizer]
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: make_checkpoint(root / name, tokenizer, name, WINDOW) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def loaded(runs: dict[str, Path]) -> dict[str, Loaded]:
    return {name: load(run, "cpu") for name, run in runs.items()}


@pytest.fixture
def session(loaded: dict[str, Loaded]) -> Session:
    return Session(*loaded["unrolled"], GenerationOptions(k=2, max_new_tokens=12))


class FakeTerminal:
    """Standard output that says it is a terminal, and keeps each write."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def fake_terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    fake = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", fake)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return fake


# -- figures against independent passes ---------------------------------------------------------------------------------


def read_outs(model: LoopedLM, ids: list[int], k: int, seed: int) -> Tensor:
    """Probabilities after each iteration at the last position, (K, V), by the mathematics of docs/method.md."""
    rng, tokens_BT, width = Rng(seed, EVALUATION_STEP), torch.tensor([ids]), model.config.d_model
    e_BTD = model.encode(tokens_BT)
    walk, rows = model.recurrence, []
    if not isinstance(walk, DenoiseWalk):
        state_BTD = torch.zeros_like(e_BTD)
        if walk.stochastic:
            u = rng.uniform([0], (WINDOW, width), "state/draw0/page0", dtype=torch.float32)
            state_BTD = truncated_normal(u, math.sqrt(2 / 5))[:, : len(ids)]
        for _ in range(k):
            state_BTD = model.core(state_BTD, e_BTD, model.rope(len(ids)), model.visible(len(ids)))
            rows.append(model.logits(model.decode(state_BTD))[0, -1].double().softmax(-1))
        return torch.stack(rows)
    sigmas = [*GRIDS[walk.config.grid](walk.density, k), None]
    sd, s_y = 1 / math.sqrt(width), 1.0
    table_VD = s_y * torch.nn.functional.normalize(model.embedding.weight, dim=-1)
    z_BTD = sigmas[0] * rng.normal([0], (WINDOW, width), "noise/draw0/page0")[:, : len(ids)]
    for sigma, following in itertools.pairwise(sigmas):
        root = math.sqrt(sigma**2 + sd**2)
        view_BTD = z_BTD / root * s_y**2 / (s_y**2 + sigma**2)
        c_noise = torch.full((1, 1), math.log(sigma) / 4)
        d_BTD = sd**2 / root**2 * z_BTD + sigma * sd / root * model.iterate(view_BTD, e_BTD, 1, c_noise)
        logits_BTV = model.logits(model.decode(d_BTD / sd))
        rows.append(logits_BTV[0, -1].double().softmax(-1))
        if following is not None:
            ratio = following / sigma
            z_BTD = ratio * z_BTD + (1 - ratio) * (logits_BTV.softmax(-1) @ table_VD)
    return torch.stack(rows)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trace_prints_what_an_independent_pass_gives(
    objective: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(runs[objective], "cpu")
    model.final_norm.weight.data *= 4  # sure enough of itself that three decimals say something
    session = Session(model, tokenizer, GenerationOptions(k=4, temperature=0, max_new_tokens=5, seed=3))
    session.answer("def main(")
    capsys.readouterr()
    session.answer("/trace 3")
    told = capsys.readouterr().out
    ids = tokenizer.encode("def main(")
    blocks = told.split("token ")[1:]
    assert len(blocks) == 3
    for index, block in enumerate(blocks):
        with torch.no_grad():
            expected_KV = read_outs(model, ids + session.replies[0].ids[:index], 4, seed=3)
        entropy_K = -(expected_KV * expected_KV.log()).sum(-1)
        rows = block.splitlines()[2:]
        assert len(rows) == 4
        assert re.search(r" [01]\.\d{3}\*", rows[3]) is not None  # greedy: the likeliest was drawn
        assert rows[3].index("*") < 50
        assert expected_KV[3].max() > 0.05
        for i, row in enumerate(rows):
            row = row[4 + 9 * (objective == "denoise") :]  # k, and sigma
            figures = [float(word) for word in re.findall(r"(?<=\s)\d+\.\d{3}(?=[\s*]|$)", row)]
            moved = (expected_KV[i] * (expected_KV[i] / expected_KV[i - 1]).log()).sum()
            best = expected_KV[i].topk(3).values
            wanted = [entropy_K[i], *([moved] if i else []), *best]
            assert figures[: len(wanted)] == pytest.approx(torch.stack(wanted).tolist(), abs=6e-4), row


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prompt", [5, WINDOW, WINDOW + 9])
def test_trace_reads_what_generation_drew_from(objective: str, prompt: int, loaded: dict[str, Loaded]) -> None:
    """To where the text has grown out of the window more than once."""
    model, _ = loaded[objective]
    options = GenerationOptions(k=3, max_new_tokens=WINDOW + 8, seed=1)
    prompt_ids = [7 + i % 50 for i in range(prompt)]
    ids, log_p = list(prompt_ids), []
    for _, token in stream(model, [prompt_ids], options):
        ids.append(token)
    again = SequentialDecoder(model, [prompt_ids], options)
    for token in ids[prompt:]:
        log_p.append(again.logits()[0].double().log_softmax(-1))
        again.batch.append(0, token)
    result = trace(model, ids[:-1], prompt, 3, seed=1)
    torch.testing.assert_close(result.log_p_NKV[:, -1], torch.stack(log_p), atol=2e-4, rtol=0)


def test_heun_is_traced_at_its_levels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run = make_checkpoint(tmp_path / "heun", tokenizer, "denoise", WINDOW, "--objective.denoise.sampler", "heun")
    model, _ = load(run, "cpu")
    result = trace(model, [5, 6, 7], 3, 4)
    [(_, token)] = stream(model, [[5, 6, 7]], GenerationOptions(k=4, max_new_tokens=1, temperature=0))
    assert result.log_p_NKV.shape == (1, 4, tokenizer.vocab_size)
    assert int(result.log_p_NKV[0, -1].argmax()) == token
    with torch.no_grad():
        first = read_outs(model, [5, 6, 7], 1, seed=0)
    torch.testing.assert_close(result.log_p_NKV[0, 0].exp(), first[0], atol=1e-5, rtol=0)


def test_stats(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.answer("def main(")
    capsys.readouterr()
    session.answer("/stats")
    made, row = session.replies[0], capsys.readouterr().out.splitlines()[1].split()
    assert row[:3] == ["2", "12", str(len(made.prompt_ids))]
    config = session.model.config
    layers = config.n_prelude + 2 * config.n_core + config.n_coda
    assert made.cache_bytes == (len(made.prompt_ids) + 12) * 2 * layers * config.d_model * 4
    assert f"{made.cache_bytes / 1024:.4g} KiB" in " ".join(row)
    assert f"{made.flops:.3e}" in row
    assert made.tokens_per_second == pytest.approx(11 / (made.seconds - made.first_seconds))


def test_fast_samplers_and_exits(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    """The same greedy text as one token after another; what was drafted and how deep it went is told."""
    for line in (
        "/k 8",
        "/temp 0",
        "def main(",
        "/sampler speculative:2:4",
        "def main(",
        "/sampler diagonal",
        "def main(",
    ):
        session.answer(line)
    plain, fast, diagonal = session.replies
    assert plain.ids == fast.ids == diagonal.ids
    assert plain.acceptance is None
    assert fast.acceptance is not None
    assert 0 <= fast.acceptance <= 1
    assert (plain.mean_k, fast.mean_k) == (8, 8)
    assert plain.flops > 0
    assert diagonal.flops > 0
    capsys.readouterr()
    session.answer("/stats")
    assert f"{diagonal.flops:.3e}" in capsys.readouterr().out
    session.answer("/adaptive kl:10")
    assert "exits and warm starts need the sequential sampler" in capsys.readouterr().err
    for line in ("/sampler sequential", "/adaptive kl:10", "def main("):
        session.answer(line)
    assert session.replies[-1].mean_k == 2  # the first two read-outs are near enough for any threshold of ten nats
    assert session.replies[-1].to_json()["mean_k"] == 2
    session.answer("/cache last")  # what cannot go together is refused when it is set, and nothing changes
    assert "needs the sequential sampler without exit" in capsys.readouterr().err
    assert session.options.cache_policy == "full"
    for line in ("/temp 1", "/adaptive off", "def main(", "/warm on", "def main("):
        session.answer(line)
    cold, warm = session.replies[-2:]
    assert cold.ids != warm.ids


# -- texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_texts_are_the_librarys(objective: str, loaded: dict[str, Loaded], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded[objective]
    options = GenerationOptions(k=2, temperature=0.8, top_k=50, top_p=0.9, seed=7, max_new_tokens=20)
    session = Session(model, tokenizer, options)
    alone = {k: generate(model, tokenizer, "class A", options, k=k) for k in (1, 2, 4)}
    for _ in range(2):
        session.answer("class A")
        assert capsys.readouterr().out == alone[2] + "\n" * (not alone[2].endswith("\n"))
    session.answer("/compare 4,1 1")
    heads = [f"k = {k}\n{alone[k]}" + "\n" * (not alone[k].endswith("\n")) for k in (4, 1)]
    assert capsys.readouterr().out == "".join(heads)
    assert [r.options.k for r in session.last] == [4, 1]
    session.answer("/seed 8")
    session.answer("class A")
    assert session.replies[-1].text != alone[2]


def test_columns_at_a_terminal(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    session.answer("def f")
    terminal.writes.clear()
    session.answer("/compare 1 4 16")
    lines = "".join(terminal.writes).splitlines()
    assert re.sub(r"\x1b\[\d*m", "", lines[0]).split() == ["k", "=", "1", "|", "k", "=", "4", "|", "k", "=", "16"]
    assert lines[1] == " | ".join(["-" * 31] * 3)
    assert all(width_of(re.sub(r"\x1b\[\d*m", "", line)) <= 100 for line in lines)
    monkeypatch.setenv("COLUMNS", "50")  # too narrow for three
    terminal.writes.clear()
    session.answer("/compare 1 4 16")
    assert " | " not in "".join(terminal.writes)


def test_colours(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = fake_terminal(monkeypatch)
    session.answer("def f")
    for variable, coloured in (("", True), ("NO_COLOR", False)):
        if variable:
            monkeypatch.setenv(variable, "1")
        terminal.writes.clear()
        session.answer("/trace")
        assert ("\x1b[" in "".join(terminal.writes)) == coloured


def test_tokens_come_one_by_one_and_characters_whole(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of byte tokens: each write is whole characters, and each token that completes one is written at once."""
    terminal, text = fake_terminal(monkeypatch), "aß€😀\x1b[31mz"
    pieces = [session.tokenizer.decode_bytes([i]) for i in range(session.tokenizer.vocab_size)]
    ids = [pieces.index(bytes([byte])) for byte in text.encode() + b"\xf0\x9f"]
    written: list[str] = []

    def spell(*_: object) -> Iterator[tuple[int, int]]:
        for token in ids:
            yield 0, token
            written.append("".join(terminal.writes))

    monkeypatch.setattr(Decoder, "stream", spell)
    terminal.writes.clear()
    session.answer("x")
    shown = "aß€😀␛[31mz"  # what would command the terminal is a picture
    assert "".join(terminal.writes).startswith(shown + "\ufffd\n")  # half of a character, when the text has ended
    assert written[0] == "a"
    assert written[1:3] == ["a", "aß"]
    assert all(shown.startswith(part) for part in written)
    assert session.replies[-1].text == text + "\ufffd"


def test_a_document_that_ends(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(decoder: Decoder, ends_text: EndsText) -> Iterator[tuple[int, int]]:
        yield 0, 40
        assert ends_text(0, session.tokenizer.eos_id)

    monkeypatch.setattr(Decoder, "stream", ends)
    session.answer("x")
    assert (session.replies[-1].ended, session.replies[-1].ids) == ("document", [40])


def test_stopping(session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object) -> Iterator[tuple[int, int]]:
        yield from ((0, 40), (0, 41))
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", stopped)
    session.answer("x")
    assert (session.replies[-1].ended, session.replies[-1].ids) == ("stopped", [40, 41])
    assert "stopped after 2 tokens" in capsys.readouterr().err
    session.answer("/compare 1 2 4")
    assert "k = 1 (stopped)" in capsys.readouterr().out
    assert len(session.last) == 1


def test_ctrl_c_is_heard_once_and_only_where_it_may() -> None:
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    with interrupts.installed():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with interrupts.allowed():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "the line is empty"),
        ("  \t", "the line is empty"),
        ("/sead 3", "unknown command /sead; did you mean /seed?"),
        ("/xyzzy", "unknown command /xyzzy; /help lists the commands"),
        ("/k", "k = 2"),
        ("/k 0", "k must be 1 or more, got 0"),
        ("/k many", "/k takes a whole number, got 'many'"),
        ("/k 1 2", "/k takes a whole number, got '1 2'"),
        ("/temp nan", "temperature must be 0 or more, got nan"),
        ("/temp -1", "temperature must be 0 or more"),
        ("/top_p 0", "top_p must be above 0"),
        ("/top_k -2", "top_k must be 0 (all) or more"),
        ("/min_p 2", "min_p must be between 0 and 1"),
        ("/max 0", "max_new_tokens must be 1 or more, got 0"),
        ("/seed 1.5", "/seed takes a whole number, got '1.5'"),
        ("/sampler magic", "the sampler must be sequential, speculative[:DRAFT_K"),
        ("/sampler diagonal:x", "the sampler must be sequential, speculative"),
        ("/warm maybe", "warm_start must be on or off"),
        ("/adaptive often", "exit must be kl, entropy or latent"),
        ("/cache some", "the cache policy must be full, last or modulo-S"),
        ("/compare", "/compare takes two or more values of K"),
        ("/compare 1 2", "type a prompt first"),
        ("/trace", "type a prompt first"),
        ("/trace 0", "/trace takes 1 token or more"),
        ("/stats", "type a prompt first"),
        ("/save", "/save takes the name of a file"),
        ("/save x", "there is no text to save yet"),
        ("/quit now", "/quit takes no argument, got 'now'"),
    ],
)
def test_mistakes_are_a_line(line: str, word: str, session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    before = session.options
    session.answer(line)
    told = capsys.readouterr()
    assert told.out == ""
    assert word in told.err
    assert told.err.count("\n") == 1
    assert (session.options, session.done) == (before, False)


def test_too_much_is_refused(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.answer("/k 1000000000")
    session.answer("def f")
    told = capsys.readouterr().err
    assert "the cache of" in told
    assert "choose a lower /k" in told
    assert session.replies == []
    session.answer("/k 2")
    session.answer("def f")
    session.answer("/compare 1 1000000000")
    assert "choose a lower /k" in capsys.readouterr().err
    assert len(session.replies) == 1
    session.answer("/k 1000000")
    session.answer("/trace")
    assert "too many to trace at once" in capsys.readouterr().err
    session.answer("/k 2")
    session.answer("/trace 99")
    told = capsys.readouterr()
    assert "so only 13 can be traced" in told.err
    assert told.out.count("entropy") == 13


def test_what_the_machine_cannot_do_is_a_line(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> Iterator[tuple[int, int]]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(Decoder, "stream", fails)
    session.answer("x")
    assert capsys.readouterr().err.splitlines()[-1] == "failed: DefaultCPUAllocator: can't allocate memory"


def test_commands_and_prompts_are_told_apart(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("/usr/bin/env python", "// a comment", "/ 2", "/k 3\nand more", "a /k 3"):
        session.answer(prompt)
        assert session.replies[-1].prompt == prompt
    session.answer("/K 5\n/temperature 0.5\n")
    assert (session.options.k, session.options.temperature) == (5, 0.5)
    session.answer("/help")
    told = capsys.readouterr().out
    for word in ("k", "temp", "top_p", "top_k", "min_p", "max", "seed", "sampler", "compare", "trace", "stats", "save"):
        assert f"/{word} " in told
    session.answer("/sampler")
    assert capsys.readouterr().out.startswith("* sequential ")
    session.answer("/exit")
    assert session.done


def test_save(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session.answer("def é(\n  x")
    session.answer("/k 3")
    session.answer("b")
    for name in ("a name.txt", "t.json", "t.json"):  # its own file is written again
        session.answer(f"/save {tmp_path / 'new' / name}")
    first, second = json.loads((tmp_path / "new/t.json").read_text())
    assert (first["prompt"], first["k"], first["text"]) == ("def é(\n  x", 2, session.replies[0].text)
    assert (second["k"], second["tokens"], second["ended"], second["seed"]) == (3, 12, "length", 0)
    text = (tmp_path / "new/a name.txt").read_text()
    assert "[1] k 2, temperature 1, " in text
    assert f"[prompt]\nb\n[text]\n{second['text']}\n" in text
    other = tmp_path / "precious"
    other.write_text("mine")
    for path, word in ((other, "already exists"), (tmp_path, "already exists"), ("/proc/no/file", "cannot write"),
                       ("a\x00b", "cannot write"), ("~nobody-of-that-name/x", "cannot write")):  # fmt: skip
        capsys.readouterr()
        session.answer(f"/save {path}")
        assert word in capsys.readouterr().err
    assert other.read_text() == "mine"


# -- lines and text -----------------------------------------------------------------------------------------------------


def test_lines_that_are_not_utf8() -> None:
    assert decode_line("añ😀") == "añ😀"
    for raw, place in ((b"ab\xff", "byte 3 is 0xff"), (b"\xe2\x82", "byte 1 is 0xe2")):
        with pytest.raises(UserError, match=place):
            decode_line(raw.decode("utf-8", errors="surrogateescape"))
    with pytest.raises(UserError, match="half of a character"):
        decode_line("\ud83d")


def test_writer_of_every_cut(capsys: pytest.CaptureFixture[str]) -> None:
    raw = "é€😀".encode()
    for cut in range(len(raw) + 1):
        writer = Utf8Writer()
        writer.add(raw[:cut])
        assert "\ufffd" not in capsys.readouterr().out
        writer.add(raw[cut:])
        writer.end()
        assert capsys.readouterr().out.endswith("\n")


def test_columns_hold_wide_and_narrow_characters() -> None:
    made = side_by_side(["left", "right"], ["日本語日本語", "e\u0301\tx\nlast"], 13).splitlines()
    assert [line.rstrip() for line in made] == [
        "left  | right", "----- | -----", "日本  | e\u0301   x", "語日  | last", "本語  |",
    ]  # fmt: skip
    assert console.visible_controls("\x1b[2J\x07\x7f\x9b\n\t") == "␛[2J␇␡\ufffd\n\t"


def test_state_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = state_file("history")
    assert path == tmp_path / "state/recurrent_db/history"
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_file("history") == tmp_path / ".local/state/recurrent_db/history"


def test_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        console.open_lines([])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--k", "-1"], "k must be 1 or more"),
        (["--sampler", "fast"], "the sampler must be sequential"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1 or more"),
        (["--top-q", "1"], "--top-p"),
        ([], "nowhere"),
    ],
)
def test_mistakes_of_the_command(options: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        cli.run(["repl", "nowhere", *options])


# -- a pipe -------------------------------------------------------------------------------------------------------------


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


def test_ctrl_c_while_a_pipe_is_answered(command: Command, runs: dict[str, Path], tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(runs["next_token"], "--max-new-tokens", "1000000"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"def main(\n/k 3\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(b"/quit\nnever read", timeout=120)
    assert process.returncode == 0
    assert re.fullmatch(r"stopped after \d+ tokens\nk = 3\n", told.decode())


# -- terminals ----------------------------------------------------------------------------------------------------------

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


def test_plain_lines_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", '"""', "two", '  """', '"""', "three"])

    def told(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        monkeypatch.setattr("builtins.input", told)
        reader = PlainLines()
        assert [reader.read(), reader.read(), reader.read()] == ["one", "two", "three"]
        with pytest.raises(EOFError):
            reader.read()
