"""The harness's model against an independent float64 one, its tasks against the official ones, and its command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'recurrent-db[eval]')")

import yaml  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from recurrent_db.checkpoint import TrainState, save_checkpoint  # noqa: E402
from recurrent_db.commandline import guard  # noqa: E402
from recurrent_db.config import Config, ModelConfig, resolve  # noqa: E402
from recurrent_db.data import prepare  # noqa: E402
from recurrent_db.errors import UserError  # noqa: E402
from recurrent_db.heldout_task import FILE, heldout_items, write_heldout_task  # noqa: E402
from recurrent_db.likelihood import score_positions, token_log_probabilities  # noqa: E402
from recurrent_db.lm_eval_model import RecurrentDBLM  # noqa: E402
from recurrent_db.loading import load  # noqa: E402
from recurrent_db.model.looped import build_model  # noqa: E402
from recurrent_db.recurrence import NoiseSource  # noqa: E402
from recurrent_db.rng import EVALUATION_STEP, Rng  # noqa: E402
from recurrent_db.tokenizer import Tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OFFICIAL = Path(lm_eval.__file__).parent / "tasks"
WINDOW = 48
OBJECTIVES = ("next_token", "unrolled", "denoise")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with an untrained checkpoint of each objective, under its name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in OBJECTIVES:
        shape = ModelConfig(tokenizer.vocab_size, 32, 2, 1, 1, 1, 64, WINDOW)
        config = Config(model=shape)
        config.objective.name, config.data.sequence_length = name, WINDOW
        resolve(config)
        model = build_model(shape, seed=0)
        for parameter in model.parameters():  # away from the initialisation, where the noise hardly matters
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        save_checkpoint(
            folder / name, config, tokenizer, model, torch.optim.AdamW(model.parameters()), None, TrainState(), {}
        )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> Path:
    """A data directory with six held-out documents."""
    folder = tmp_path_factory.mktemp("heldout")
    for part, chosen in (("train", texts[:2]), ("val", texts[2:8])):
        (folder / part).mkdir()
        for number, text in enumerate(chosen):
            (folder / part / f"{number}.py").write_bytes(text.encode())
    prepare([str(folder / "train")], tokenizer, folder / "shards", val_sources=[str(folder / "val")], workers=1)
    return folder / "shards"


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


PAIRS = [
    ("def main(", "argv=None):"),
    ("", "import os"),
    ("The capital ", "of France"),
    ("x = 1\n", "y = 2"),
    ("\n\n", "class A:"),
    ("naïve ", "日本語 \U0001f468\u200d\U0001f469"),
    ("é", "\u0301\U0001f308"),
    ("a" * 300, " b"),
    ("short", " " + "long continuation " * 20),
    ("", "return " * 40),
    ("context", ""),
    ("def main(", "argv=None):"),
]


def naive(run: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The pair's score without batching or padding in float64: one forward pass for each token."""
    model, _ = load(run, "cpu")
    model.double()
    ids = (context + continuation)[-(WINDOW + 1) :]
    total, greedy = 0.0, True
    for place in range(max(1, len(ids) - len(continuation)), len(ids)):
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:place]]), 1)[0, -1].log_softmax(-1)
        total += log_p[ids[place]].item()
        greedy &= log_p.argmax().item() == ids[place]
    return total, greedy


# -- likelihood --------------------------------------------------------------------------------------------------------


def test_matches_an_independent_implementation(runs: Path, tokenizer: Tokenizer) -> None:
    lm = RecurrentDBLM(str(runs / "next_token"), k=1, batch_size=5)
    results = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(PAIRS, results, strict=True):
        whole = tokenizer.encode(context + continuation)
        head = tokenizer.encode(context.rstrip())
        assert whole[: len(head)] == head, "these pairs have no token across the border"
        expected = naive(runs / "next_token", head or [tokenizer.eos_id], whole[len(head) :])
        assert log_p == pytest.approx(expected[0], abs=1e-3, rel=1e-5)
        assert greedy == expected[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batching_order_and_padding_change_nothing(runs: Path, objective: str) -> None:
    arguments = {"checkpoint": str(runs / objective), "k": 3, "draws": 2}
    one = RecurrentDBLM(**arguments, batch_size=1)
    alone = [one.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in PAIRS]
    shuffled = random.Random(0).sample(range(len(PAIRS)), len(PAIRS))
    for sizes in ({"batch_size": 7}, {"batch_size": "auto", "max_batch_size": 5}, {"batch_size": "auto:4"}):
        many = RecurrentDBLM(**arguments, **sizes)
        batched = many.loglikelihood(requests("loglikelihood", *(PAIRS[i] for i in shuffled)), disable_tqdm=True)
        for index, (log_p, greedy) in zip(shuffled, batched, strict=True):
            assert log_p == pytest.approx(alone[index][0], abs=1e-4, rel=5e-6)
            assert greedy == alone[index][1]
    other = RecurrentDBLM(**arguments, seed=1).loglikelihood(requests("loglikelihood", PAIRS[0]), disable_tqdm=True)
    assert (other[0] == pytest.approx(alone[0], abs=1e-6)) == (not one.model.recurrence.stochastic)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_score_positions_is_token_log_probabilities(
    runs: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recurrent_db.likelihood._LOGITS_AT_ONCE", 5000)  # several parts
    model, _ = load(runs / objective, "cpu")
    vocab, draws, k, rng = model.config.vocab_size, 3, 2, Rng(0, EVALUATION_STEP)
    tokens = torch.randint(vocab, (3, 11), generator=torch.Generator().manual_seed(0))
    targets, rows = torch.randint(vocab, (3, 11)), torch.arange(3).repeat_interleave(11)
    ids = torch.tensor([5, 6, 7])
    with torch.no_grad():
        # Half of the targets are the mixture's own argmax, computed over the whole vocabulary.
        hidden = [
            next(
                iter(
                    model.recurrence.hidden(
                        model, tokens, model.encode(tokens), [k], NoiseSource(rng, ids, WINDOW, draw)
                    )
                )
            )[1]
            for draw in range(draws)
        ]
        best = sum(model.logits(h).softmax(-1) for h in hidden).argmax(-1)
        targets[:, ::2] = best[:, ::2]
        expected = token_log_probabilities(model, tokens, targets, [k], rng, ids, draws)[k]
        log_p, greedy = score_positions(
            model, tokens, rows, torch.arange(11).repeat(3), targets.flatten(), k, rng, ids, draws
        )
    torch.testing.assert_close(log_p.view(3, 11), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy.view(3, 11), targets == best)


def test_greedy_flag(runs: Path, tokenizer: Tokenizer) -> None:
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    context = tokenizer.encode("import ")
    continuation: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            continuation.append(int(lm.model(torch.tensor([context + continuation]), 1)[0, -1].argmax()))
    wrong = [*continuation[:-1], (continuation[-1] + 1) % lm.model.config.vocab_size]
    pairs = [(("", ""), context, continuation), (("", ""), context, wrong)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


def test_no_byte_of_a_continuation_is_lost(runs: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    straddled = 0
    for text in (texts[0][:200], "e\u0301 \u65e5\u672c\u8a9e \U0001f308 x  y\n\n z ", " \n a"):
        for border in range(1, len(text) + 1):
            context, continuation = text[:border], text[border:]
            head, tail = lm._encode_pair(context, continuation)
            assert head
            scored = [] if head == [tokenizer.eos_id] else head
            assert tokenizer.decode_bytes(scored + tail) == text.encode()
            assert tokenizer.decode_bytes(tail).endswith(continuation.encode())
            straddled += len(scored) < len(tokenizer.encode(context.rstrip()))
    assert straddled, "the case that TemplateLM gets wrong did not occur"


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
    expected = sum(naive(runs / "next_token", *window)[0] for window in windows)
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    scored = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",), ("x",)), disable_tqdm=True)
    assert scored[:2] == pytest.approx([expected, 0.0], rel=1e-5)
    assert all(type(value) is float for value in scored)


# -- generation --------------------------------------------------------------------------------------------------------


def test_generation_stops_at_strings_and_lengths(
    runs: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How stop strings are found: test_generate.py."""
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    text = "one two\nthree \u65e5\u672c\u8a9e four\n\n\nfive"
    ids = tokenizer.encode(text)

    def said(model: Any, prompts: Any, k: int, count: int, *rest: Any) -> Iterator[tuple[int, int]]:
        over = rest[-1]
        return ((0, token) for token in itertools.takewhile(lambda token: not over(0, token), ids[:count]))

    monkeypatch.setattr(sys.modules["recurrent_db.generate"], "stream", said)

    def generate(**options: Any) -> str:
        return lm.generate_until(requests("generate_until", ("Q:", options)), disable_tqdm=True)[0]

    assert generate(until=[]) == text
    assert generate(until=["four", "three", "e \u65e5"]) == "one two\n"
    assert generate(until="\n\n") == text[: text.index("\n\n")]
    assert generate(until=[""], max_gen_toks=3) == tokenizer.decode(ids[:3])
    assert generate(until=["five"], max_new_tokens=2) == tokenizer.decode(ids[:2])


def test_generation_is_greedy_unless_asked(runs: Path, tokenizer: Tokenizer) -> None:
    lm = RecurrentDBLM(str(runs / "denoise"), k=2)
    greedy, sampled = {"max_gen_toks": 6}, {"max_gen_toks": 6, "do_sample": True, "temperature": 1.5}
    asked = [("import " * 60, greedy), ("x", sampled), ("import " * 60, greedy), ("x", sampled), ("", greedy)]
    first = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert first == lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert first[0] == first[2]
    assert first[1] != first[3], "repeats of a sampled request must differ"
    tight = {**sampled, "top_k": 1}
    assert lm.generate_until(requests("generate_until", ("", tight)), disable_tqdm=True)[0] == first[4]
    with pytest.raises(UserError, match="top_p"):
        lm.generate_until(requests("generate_until", ("x", {**sampled, "top_p": 2.0})), disable_tqdm=True)


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script as a module; what it does to the environment is undone."""
    environment = dict(os.environ)
    spec = importlib.util.spec_from_file_location("lm_eval_cli", ROOT / "eval" / "lm_eval_cli.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield module
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize(
    "ours, official",
    [
        ("arc_easy", "arc/arc_easy.yaml"),
        ("piqa", "piqa/piqa.yaml"),
        ("blimp", "blimp/_template_yaml"),
        ("blimp_group", "blimp/_blimp.yaml"),
    ],
)
def test_prompts_and_metrics_are_the_official_ones(ours: str, official: str) -> None:
    mine = yaml.safe_load((ROOT / "eval" / "tasks" / f"{ours}.yaml").read_text(encoding="utf-8"))
    theirs = yaml.safe_load((OFFICIAL / official).read_text(encoding="utf-8"))
    differ = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    # Only where the data come from: their file, and for BLiMP which paradigms.
    assert differ <= {"dataset_path", "dataset_name", "dataset_kwargs", "task"}
    if "group" not in mine:
        assert {"doc_to_text", "doc_to_target", "doc_to_choice", "metric_list"} <= mine.keys()


def test_shared_benchmarks_make_the_harness_prompts(cli: ModuleType, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "benchmarks"
    if not folder.is_dir():
        pytest.skip("no benchmark files in the folder 'shared'")
    for task in cli.offline_tasks(["arc_easy", "piqa", "blimp_causative"], folder):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False).load(
        ["arc_easy", "piqa", "blimp_causative"]
    )
    made = {}
    for name, task in tasks["tasks"].items():
        doc = next(iter(task.eval_docs))
        made[name] = (len(task.eval_docs), task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc))
    count, text, choices, answer = made["arc_easy"]
    assert (count, answer) == (570, 0)
    assert text == "Question: Which technology was developed most recently?\nAnswer:"
    assert choices == ["cellular telephone", "television", "refrigerator", "airplane"]
    count, text, choices, answer = made["piqa"]
    assert (count, len(choices), answer) == (1838, 2, 0)
    assert text.startswith("Question: How do I ready a guinea pig cage") and text.endswith("\nAnswer:")
    assert made["blimp_causative"] == (1000, "", ["Aaron breaks the glass.", "Aaron appeared the glass."], 0)


def test_heldout_items(data: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = heldout_items(data, 50)
    assert items == heldout_items(data, 50)
    assert [dataclasses.asdict(item) for item in items] != [
        dataclasses.asdict(i) for i in heldout_items(data, 50, seed=1)
    ]
    assert len(items) == 50
    assert {item.label for item in items} == {0, 1, 2, 3}
    held_out = texts[2:8]
    for item in items:
        assert item.context.endswith("\n")
        truth = item.choices[item.label]
        sources = [text for text in held_out if item.context + truth in text]
        assert sources
        assert len({choice.strip() for choice in item.choices}) == 4
        for choice in item.choices:
            assert any(choice in text for text in held_out)
    path = write_heldout_task(data)
    assert path == data.resolve() / FILE
    before = path.stat().st_mtime_ns
    assert write_heldout_task(data).stat().st_mtime_ns == before
    path.unlink()
    path.mkdir()  # stands for a folder that cannot be written
    try:
        elsewhere = write_heldout_task(data)
        assert elsewhere.parent != data and len(elsewhere.read_text().splitlines()) == len(heldout_items(data))
    finally:
        path.rmdir()


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_runs_heldout_cloze(
    script: Callable[..., subprocess.CompletedProcess[str]], runs: Path, data: Path, tmp_path: Path
) -> None:
    done = script(
        "eval/lm_eval_cli.py", "--model", "recurrent_db", "--model_args", f"checkpoint={runs / 'denoise'},k=2",
        "--tasks", "heldout_cloze", "--data", data, "--limit", 6, "--output_path", tmp_path, "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "heldout_cloze" in done.stdout and "acc_norm" in done.stdout
    assert all(line.startswith("WARNING: ") for line in done.stderr.splitlines()), done.stderr
    [results_file] = tmp_path.glob("*denoise/results_*.json")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    assert 0 <= results["results"]["heldout_cloze"]["acc,none"] <= 1
    assert results["config"]["k"] == 2 and results["config"]["objective"] == "denoise"
    [samples] = tmp_path.glob("*denoise/samples_heldout_cloze_*.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 6


def write_benchmarks(folder: Path) -> None:
    """Three rows of each benchmark's shape, made up."""
    (folder / "blimp").mkdir(parents=True)
    rows = {
        "arc_easy_validation": {
            "question": "Which is a colour?",
            "choices": {"text": ["red", "seven", "loud"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        "piqa_validation": {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the jam.", "label": 0},
        "blimp/first": {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."},
        "blimp/second": {"sentence_good": "She saw herself.", "sentence_bad": "She saw himself."},
    }
    for name, row in rows.items():
        lines = [json.dumps({**row, "id": number}) + "\n" for number in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def test_command_runs_local_benchmarks(
    cli: ModuleType, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_benchmarks(tmp_path / "files")
    model = ["--model_args", f"checkpoint={runs / 'unrolled'},k=2", "device=cpu"]
    where = ["--data", str(tmp_path / "files")]
    assert cli.main([*model, "--tasks", "arc_easy,piqa", "blimp", "--num_fewshot", "1", *where]) == 0
    out = capsys.readouterr().out
    for name in ("arc_easy", "piqa", "blimp_first", "blimp_second", "|blimp"):
        assert name in out
    assert cli.main([*model, "--tasks", "blimp_f*", *where]) == 0
    out = capsys.readouterr().out
    assert "blimp_first" in out and "blimp_second" not in out


def test_mistakes_are_one_line(
    cli: ModuleType, runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    write_benchmarks(files)
    (files / "piqa_validation.jsonl").write_text('{"goal": "x"}\n', encoding="utf-8")
    run = f"checkpoint={runs / 'next_token'}"
    cases = [
        (["--model_args", run, "--tasks", "heldout_cloze"], "needs --data"),
        (["--model_args", run, "--tasks", "heldout_cloze", "--data", files], "manifest.json"),
        (["--model_args", run, "--tasks", "heldout_cloze", "--data", tmp_path / "nowhere"], "no such folder"),
        (["--model_args", run, "--tasks", "arc_easy", "--data", data], "token shards"),
        (["--model_args", run, "--tasks", "arc_easy", "--data", tmp_path], "arc_easy_validation.jsonl"),
        (["--model_args", run, "--tasks", "piqa", "--data", files], "lack sol1"),
        (["--model_args", run, "--tasks", "blimp_third", "--data", files], "blimp/third.jsonl"),
        (["--model_args", run, "--data", files], "no task"),
        (["--tasks", "arc_easy", "--data", files], "checkpoint=RUN"),
        (["--model_args", f"checkpoint={tmp_path}", "--tasks", "arc_easy", "--data", files], "no checkpoint"),
        (["--model_args", f"{run},k=0", "--tasks", "arc_easy", "--data", files, "--limit", "1"], "k must be"),
        (["--model_args", f"{run},kk=2", "--tasks", "arc_easy", "--data", files], "unknown model argument 'kk'"),
        (["--model_args", f"{run},max_length=999", "--tasks", "arc_easy", "--data", files], "window of 48"),
        (["--model_args", run, "--tasks", "arc_easy", "--data", files, "--bogus"], "unrecognized arguments: --bogus"),
        (["--model_args", run, "--tasks", "arc_easy", "--data", files, "--log_samples"], "--output_path"),
        (["--model_args", run, "--tasks", "arc_easy", "--data"], "--data"),
    ]
    for argv, expected in cases:
        with pytest.raises(SystemExit) as stop:
            guard(lambda argv=argv: cli.main(list(map(str, argv))))
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert expected in err
        assert len(err.splitlines()) == 1, err


def test_without_the_harness_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('absent')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval" / "lm_eval_cli.py"), "--tasks", "piqa"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "recurrent-db[eval]" in done.stderr
