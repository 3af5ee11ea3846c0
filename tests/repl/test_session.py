"""A session in this process: its figures against independent passes, its texts, its answers to mistakes."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import OBJECTIVES, make_checkpoint
from repl_runs import WINDOW, Loaded
from torch import Tensor

from recurrent_db import generate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.denoise.noise import GRIDS
from recurrent_db.generation.decoder import Decoder, EndsText
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sequential import SequentialDecoder
from recurrent_db.model import LoopedLM
from recurrent_db.recurrence.loop import truncated_normal
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.repl.console import (
    Interrupts,
    width_of,
)
from recurrent_db.repl.session import Session
from recurrent_db.repl.trace import trace
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.loading import load


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


# -- figures against independent passes ----------------------------------------------------------------------------------


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


# -- texts ---------------------------------------------------------------------------------------------------------------


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


def test_ctrl_c_is_heard_once_and_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recurrent_db.repl.console.is_terminal", lambda stream: True)
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
        interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_pipe_is_heard_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recurrent_db.repl.console.is_terminal", lambda stream: False)
    interrupts = Interrupts()
    interrupts.check()
    with interrupts.installed(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


# -- mistakes ------------------------------------------------------------------------------------------------------------


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
