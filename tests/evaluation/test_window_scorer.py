"""The harness model's scores against a second implementation, and against themselves: batched, packed, kept, shared out."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from helpers import OBJECTIVES, make_checkpoint

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'recurrent-db[eval]')")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM
from recurrent_db.evaluation.window_scorer import Costs, Window, WindowScorer, group_windows
from recurrent_db.rng import EVALUATION_STEP, Rng, key
from recurrent_db.store.loading import load

WINDOW = 48


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with an untrained checkpoint of each objective, under its name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in OBJECTIVES:
        make_checkpoint(folder / name, tokenizer, name, WINDOW)
    return folder


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def loglikelihood(lm: RecurrentDBLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


@pytest.fixture(scope="module")
def pairs(texts: list[str]) -> list[tuple[str, str]]:
    """200 requests: questions with their choices, empty contexts, text beyond the window, characters of several tokens."""
    rng = random.Random(0)

    def piece(most: int) -> str:
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - most))
        return text[start : start + rng.randrange(1, most)]

    chosen = [
        ("short", " " + "long continuation " * 20),
        ("", "return " * 40),
        ("a" * 300, " b"),
        ("context", ""),
        ("", ""),
        ("\n\n", "class A:"),
        ("naïve ", "日本語 \U0001f468\u200d\U0001f469"),
        ("é", "\u0301\U0001f308"),
        ("日", "本"),
        ("\U0001f468", "\u200d\U0001f469 and \U0001f308"),
        ("e\u0301 ", " \u65e5"),
        ("trailing blanks  ", "x"),
    ]
    while len(chosen) < 200:
        kind, context = len(chosen) % 5, piece(60)
        if kind == 0:
            chosen.append(("", piece(40)))
        elif kind == 1:
            chosen.append((context, piece(40)))
        else:  # choices, some of which begin alike
            chosen += [(context, " " + choice) for choice in (piece(20), piece(20), context[:9], context[:9] + "s")]
    return chosen[:200]


# -- a second implementation -------------------------------------------------------------------------------------------


class Naive:
    """Log-likelihoods in float64: one request and one draw at a time, every formula written out again."""

    def __init__(self, run: Path, k: int, sigma: float | None = None, draws: int = 1) -> None:
        self.model, self.tokenizer = load(run, "cpu")
        self.recurrence = self.model.recurrence
        self.model.double()
        self.k, self.sigma, self.draws, self.objective = k, sigma, draws, run.name

    def noise(self, request: int, stream: str, draw: int, normal: bool) -> torch.Tensor:
        rng, name = Rng(0, EVALUATION_STEP), f"{stream}/draw{draw}/page0"
        shape = (WINDOW, self.model.config.d_model)
        drawn = (
            rng.normal([request], shape, name) if normal else rng.uniform([request], shape, name, dtype=torch.float32)
        )
        return drawn.double()

    @torch.no_grad()
    def logits(self, ids: list[int], request: int, draw: int) -> torch.Tensor:
        """Logits of the token after each of ``ids``, (T, V)."""
        model, n = self.model, len(ids)
        e = model.encode(torch.tensor([ids]))
        if self.objective != "denoise":
            state = torch.zeros_like(e)
            if self.objective == "unrolled":
                u = self.noise(request, "state", draw, normal=False)[:, :n].float()
                tail = 0.5 * math.erfc(3 / math.sqrt(2))  # the normal distribution below three standard deviations
                state = math.sqrt(2 / 5) * torch.special.ndtri(tail + u * (1 - 2 * tail)).double()
            for _ in range(self.k):
                state = model.iterate(state, e)
            return model.logits(model.decode(state))[0]
        low, top = 0.02, self.sigma or 20.0
        phi = [0.5 * (1 + math.erf((math.log(s) + 0.4) / math.sqrt(2))) for s in (low, top)]
        levels = [top]
        for step in range(1, self.k):  # equal probability between the levels, under log-normal(-0.4, 1)
            q = phi[1] + (phi[0] - phi[1]) * step / (self.k - 1)
            levels.append(math.exp(-0.4 + torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).item()))
        rows = torch.nn.functional.normalize(model.embedding.weight, dim=-1)
        sd = 1 / math.sqrt(model.config.d_model)
        z = top * self.noise(request, "noise", draw, normal=True)[:, :n]
        for sigma, following in itertools.pairwise([*levels, 0.0]):
            view = z / math.sqrt(sigma**2 + sd**2) / (1 + sigma**2)
            c_noise = torch.full((1, 1), math.log(sigma) / 4, dtype=torch.float32)
            out = model.iterate(view, e, 1, c_noise)
            estimate = (sd**2 * z + sigma * sd * math.sqrt(sigma**2 + sd**2) * out) / (sigma**2 + sd**2)
            logits = model.logits(model.decode(estimate / sd))
            z = following / sigma * z + (1 - following / sigma) * logits.softmax(-1) @ rows
        return logits[0]

    def score(self, context: list[int], continuation: list[int], request: int) -> tuple[float, bool]:
        ids = (context + continuation)[-(WINDOW + 1) :]
        count = min(len(continuation), WINDOW)
        if not count:
            return 0.0, True
        draws = [self.logits(ids[:-1], request, draw).softmax(-1)[-count:] for draw in range(self.draws)]
        mixture = sum(draws) / self.draws
        targets = torch.tensor(ids[-count:])
        log_p = mixture.log().gather(-1, targets[:, None]).sum().item()
        return log_p, bool((mixture.argmax(-1) == targets).all())

    def pair(self, context: str, continuation: str) -> tuple[float, bool]:
        whole, head = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context.rstrip())
        while whole[: len(head)] != head:
            head.pop()
        start = head or [self.tokenizer.eos_id]
        return self.score(start, whole[len(head) :], key("loglikelihood", *start))


def agree(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    """Within 1e-4 nats, or what fp32 leaves of sums of hundreds; and the same flags."""
    for (log_p, greedy), (expected, flag) in zip(ours, theirs, strict=True):
        assert log_p == pytest.approx(expected, abs=1e-4, rel=5e-7)
        assert greedy == flag


@pytest.mark.parametrize(
    "objective, k, sigma, draws",
    [("next_token", 1, None, 1), ("unrolled", 3, None, 2), ("denoise", 1, None, 1), ("denoise", 3, None, 2),
     ("denoise", 1, 0.5, 1), ("denoise", 3, 2.0, 1)],
)  # fmt: skip
def test_matches_a_second_implementation(
    runs: Path, pairs: list[tuple[str, str]], objective: str, k: int, sigma: float | None, draws: int
) -> None:
    naive = Naive(runs / objective, k, sigma, draws)
    expected = [naive.pair(*pair) for pair in pairs]
    arguments = {"checkpoint": str(runs / objective), "k": k, "sigma": sigma, "draws": draws}
    agree(loglikelihood(RecurrentDBLM(**arguments), pairs), expected)
    agree(loglikelihood(RecurrentDBLM(**arguments, prefix_reuse=False, batch_size=7), pairs), expected)
    assert len({greedy for _, greedy in expected}) == 2
    assert any(len(naive.tokenizer.encode(continuation)) > WINDOW for _, continuation in pairs)


def test_rolling_is_the_sum_of_its_windows(runs: Path, tokenizer: Tokenizer) -> None:
    text = "for name in sorted(names):\n    print(name, \u65e5)\n" * 6
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * WINDOW
    windows = [
        make_disjoint_window(pair)
        for pair in get_rolling_token_windows(
            token_list=ids, prefix_token=tokenizer.eos_id, max_seq_len=WINDOW, context_len=1
        )
    ]
    assert [token for _, continuation in windows for token in continuation] == ids
    for objective, k in (("next_token", 1), ("denoise", 2)):
        naive = Naive(runs / objective, k)
        expected = sum(naive.score(c, t, key("rolling", *c, *t))[0] for c, t in windows)
        lm = RecurrentDBLM(str(runs / objective), k=k)
        scored = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",), ("x",)), disable_tqdm=True)
        assert scored[:2] == pytest.approx([expected, 0.0], rel=5e-7)
        assert all(type(value) is float for value in scored)


# -- batches and rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_order_padding_and_rows_change_nothing(
    runs: Path, pairs: list[tuple[str, str]], objective: str
) -> None:
    arguments = {"checkpoint": str(runs / objective), "k": 3, "draws": 2}
    one = RecurrentDBLM(**arguments, batch_size=1, prefix_reuse="false")
    some = pairs[:60]
    alone = [loglikelihood(one, [pair])[0] for pair in some]
    shuffled = random.Random(0).sample(range(len(some)), len(some))
    for other in (
        {"batch_size": 7, "prefix_reuse": False}, {"batch_size": "auto", "max_batch_size": 5}, {"batch_size": "auto:4"},
        {"batch_size": 1}, {"batch_size": "3", "prefix_reuse": "True"},
    ):  # fmt: skip
        many = loglikelihood(RecurrentDBLM(**arguments, **other), [some[i] for i in shuffled])
        agree(many, [alone[i] for i in shuffled])
    reseeded = loglikelihood(RecurrentDBLM(**arguments, seed=1), some[20:21])[0]
    assert (reseeded[0] == pytest.approx(alone[20][0], abs=1e-6)) == (not one.model.recurrence.stochastic)


def windows_of(*inputs: tuple[int, ...], request: int = 0) -> list[Window]:
    return [Window(tokens, tokens[-1:], request) for tokens in inputs]


def test_groups_share_what_pays(runs: Path) -> None:
    costs = Costs(token=100.0, pair=1.0, longest=64)
    question = tuple(range(20))
    choices = windows_of(*((*question, 30 + i, 40) for i in range(4)))
    others = windows_of(tuple(range(50, 70)), (50, 1, *range(70, 88)))
    groups = group_windows([*choices, *others], costs)
    assert sorted(len(group.windows) for group in groups) == [1, 1, 4]
    [tree] = [group.tree for group in groups if len(group.windows) == 4]
    assert len(tree.tokens) == 20 + 4 * 2
    # Each window is in one group, whatever the order; no row is longer than it may be; nothing shared where it may not be.
    rng = random.Random(0)
    many = list(dict.fromkeys(windows_of(*(tuple(rng.choices((1, 2), k=rng.randrange(1, 12))) for _ in range(300)))))
    for shuffled in (many, rng.sample(many, len(many))):
        groups = group_windows(shuffled, costs)
        assert sorted((w for g in groups for w in g.windows), key=repr) == sorted(many, key=repr)
        assert max(len(group.tree.tokens) for group in groups) <= costs.longest
        for group in groups:
            for window, path in zip(group.windows, group.tree.paths, strict=True):
                assert tuple(group.tree.tokens[i] for i in path) == window.inputs
    assert sum(len(g.tree.tokens) for g in groups) < sum(len(w.inputs) for w in many) / 2
    assert all(len(group.windows) == 1 for group in group_windows(many, None))
    noise = [*windows_of(question), *windows_of(question, request=1)]
    assert len(group_windows(noise, costs)) == 2
    assert len(group_windows(noise, costs, noisy=False)) == 1


def test_shared_beginnings_are_paid_once(runs: Path) -> None:
    """FLOPs and tokens run, of questions with four choices."""
    pairs = [
        (f"Question {i}: what is it that follows this rather long text?\nAnswer:", f" {c}")
        for i in range(5)
        for c in "abcd"
    ]
    costs, run = [], []
    for reuse in (True, False):
        lm = RecurrentDBLM(str(runs / "denoise"), k=3, prefix_reuse=reuse)
        encode, seen = lm.model.encode, []
        lm.model.encode = lambda tokens, *more, e=encode, s=seen: (s.append(tokens.numel()), e(tokens, *more))[1]
        loglikelihood(lm, pairs)
        costs.append(lm.scorer.flops)
        run.append(sum(seen))
    assert 2.5 < costs[1] / costs[0] < 4
    assert 2.5 < run[1] / run[0] <= 4


def test_out_of_memory_halves_the_batch(
    runs: Path, pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = loglikelihood(RecurrentDBLM(str(runs / "unrolled"), k=2), pairs)
    run, sizes = WindowScorer._run, []
    room = 100

    def tight(self: WindowScorer, batch: list[Any]) -> Any:
        tokens = len(batch) * max(len(group.tree.tokens) for group in batch)
        if tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(tokens)
        return run(self, batch)

    monkeypatch.setattr(WindowScorer, "_run", tight)
    for batch_size in ("auto", 64):
        sizes.clear()
        lm = RecurrentDBLM(str(runs / "unrolled"), k=2, batch_size=batch_size)
        agree(loglikelihood(lm, pairs), expected)
        assert max(sizes) > room / 3
    assert len([record for record in caplog.records if "out of GPU memory" in record.message]) == 2
    room = 3
    with pytest.raises(UserError, match=r"one sequence of .* does not fit"):
        loglikelihood(RecurrentDBLM(str(runs / "unrolled"), k=2), pairs)


# -- kept answers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each batch that is really run has."""
    run, counts = WindowScorer._run, []

    def counting(self: WindowScorer, batch: list[Any]) -> Any:
        counts.append(sum(len(group.windows) for group in batch))
        return run(self, batch)

    monkeypatch.setattr(WindowScorer, "_run", counting)
    return counts


def test_answers_survive_a_kill(runs: Path, pairs: list[tuple[str, str]], tmp_path: Path, counted: list[int]) -> None:
    file = tmp_path / "deep" / "answers.jsonl"

    def lm(**other: Any) -> RecurrentDBLM:
        return RecurrentDBLM(**{"checkpoint": str(runs / "denoise"), "k": 2, "cache": str(file), **other})

    expected = loglikelihood(lm(cache=None), pairs)
    everything = sum(counted)
    counted.clear()
    victim = lm(batch_size=4)
    run = victim.scorer._run

    def killed(batch: list[Any]) -> Any:
        if len(counted) == 5:
            raise KeyboardInterrupt
        return run(batch)

    victim.scorer._run = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loglikelihood(victim, pairs)
    done = sum(counted)
    assert 0 < done < everything
    file.write_bytes(file.read_bytes()[:-20])  # the last line was cut short
    counted.clear()
    agree(loglikelihood(lm(), pairs), expected)
    assert sum(counted) == everything - done + 1
    counted.clear()
    again = loglikelihood(lm(prefix_reuse=False, batch_size=3), pairs)
    assert not counted
    agree(again, expected)
    # Whatever else changes an answer has answers of its own, in the same file.
    for other in ({"k": 3}, {"seed": 1}, {"draws": 2}, {"sigma": 1.0}, {"dtype": "bfloat16"}):
        counted.clear()
        loglikelihood(lm(**other), pairs[:20])
        assert counted, other
    model = lm()
    counted.clear()
    model.choose(3)
    loglikelihood(model, pairs[:20])
    assert not counted
    model.untrain()
    loglikelihood(model, pairs[:20])
    assert counted


def test_a_copy_of_a_checkpoint_has_the_same_answers(
    runs: Path, pairs: list[tuple[str, str]], tmp_path: Path, counted: list[int], tokenizer: Tokenizer
) -> None:
    import shutil

    file = str(tmp_path / "answers.jsonl")
    first = loglikelihood(RecurrentDBLM(str(runs / "unrolled"), cache=file), pairs[:20])
    shutil.copytree(runs / "unrolled", tmp_path / "elsewhere")
    counted.clear()
    assert loglikelihood(RecurrentDBLM(str(tmp_path / "elsewhere"), cache=file), pairs[:20]) == first
    assert not counted
    make_checkpoint(tmp_path / "other", tokenizer, "unrolled", WINDOW, "--optim.lr", "1e-5")
    loglikelihood(RecurrentDBLM(str(tmp_path / "other"), cache=file), pairs[:20])
    assert counted


def test_texts_are_kept(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [("import ", {"max_gen_toks": 5}), ("x", {"max_gen_toks": 5, "do_sample": True, "temperature": 1.5})] * 2
    lm = RecurrentDBLM(str(runs / "denoise"), k=2, cache=str(tmp_path / "a.jsonl"))
    first = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    lm = RecurrentDBLM(str(runs / "denoise"), k=2, cache=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(lm.model, "encode", None)
    assert lm.generate_until(requests("generate_until", *asked), disable_tqdm=True) == first


# -- several processes -------------------------------------------------------------------------------------------------


def answer(folder: str, model: dict[str, Any], asked: dict[str, list[Any]]) -> None:
    """Write a model's answers to requests of several kinds into a file named after the process."""
    lm = RecurrentDBLM(**model)
    result = {
        kind: getattr(lm, kind)(requests(kind, *map(tuple, args)), disable_tqdm=True) for kind, args in asked.items()
    }
    result["world"] = lm.processes.world
    Path(folder, f"{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(result))


def test_two_processes_answer_like_one(runs: Path, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    sampled = {"max_gen_toks": 4, "do_sample": True, "temperature": 1.5}
    asked = {
        "loglikelihood": pairs[:41],
        "loglikelihood_rolling": [["import this\n" * 40], [""], ["x = 1"]],
        "generate_until": [["x", sampled], ["import ", {"max_gen_toks": 4}], ["x", sampled], ["x", sampled]],
    }
    (tmp_path / "out").mkdir()
    what = str(tmp_path / "out"), {"checkpoint": str(runs / "denoise"), "k": 2, "cache": None}, asked
    answer(*what)
    many.run(tmp_path / "logs", 2, answer, *what)
    alone, first, second = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert (alone.pop("world"), first.pop("world"), second.pop("world")) == (1, 2, 2)
    assert first == second
    agree(first["loglikelihood"], alone["loglikelihood"])
    assert first["loglikelihood_rolling"] == pytest.approx(alone["loglikelihood_rolling"], rel=5e-7)
    assert first["generate_until"] == alone["generate_until"]
