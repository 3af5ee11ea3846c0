"""The harness's model against an independent float64 one, its tasks against the official ones, and its command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import many
import pytest
import torch
from helpers import OBJECTIVES, ROOT, load_script, make_checkpoint, write_benchmarks

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'recurrent-db[eval]')")

import yaml  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from recurrent_db.arguments import run_and_exit  # noqa: E402
from recurrent_db.data import prepare  # noqa: E402
from recurrent_db.data.tokenizer import Tokenizer  # noqa: E402
from recurrent_db.errors import UserError  # noqa: E402
from recurrent_db.evaluation.heldout_task import heldout_items, heldout_passages, write_heldout_task  # noqa: E402
from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM  # noqa: E402
from recurrent_db.generation.options import GenerationOptions  # noqa: E402
from recurrent_db.rng import key  # noqa: E402

OFFICIAL = Path(lm_eval.__file__).parent / "tasks"
WINDOW = 48


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with an untrained checkpoint of each objective, under its name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in OBJECTIVES:
        make_checkpoint(folder / name, tokenizer, name, WINDOW)
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


# -- likelihood --------------------------------------------------------------------------------------------------------


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


# -- generation --------------------------------------------------------------------------------------------------------


def test_generation_stops_at_strings_and_lengths(
    runs: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How stop strings are found: test_generate.py."""
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    text = "one two\nthree \u65e5\u672c\u8a9e four\n\n\nfive"
    ids = tokenizer.encode(text)

    def said(
        model: Any, prompts: Any, options: Any, requests: Any, ends_text: Any, *_: Any
    ) -> Iterator[tuple[int, int]]:
        count = options.max_new_tokens
        return ((0, token) for token in itertools.takewhile(lambda token: not ends_text(0, token), ids[:count]))

    monkeypatch.setattr(sys.modules["recurrent_db.generation.generate"], "stream", said)

    def generate(**options: Any) -> str:
        return lm.generate_until(requests("generate_until", ("Q:", options)), disable_tqdm=True)[0]

    assert generate(until=[]) == text
    assert generate(until=["four", "three", "e \u65e5"]) == "one two\n"
    assert generate(until="\n\n") == text[: text.index("\n\n")]
    assert generate(until=[""], max_gen_toks=3) == tokenizer.decode(ids[:3])
    assert generate(until=["five"], max_new_tokens=2) == tokenizer.decode(ids[:2])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_generation_in_batches_is_generation_one_by_one(runs: Path, objective: str) -> None:
    """Prompts of all lengths, some beyond the window; options that differ; stop strings that end texts at their own time."""
    sampled = {"max_gen_toks": 9, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    prompts = ["", "import ", "def main(", "x" * 70, "one two three " * 20, "import "]
    asked = [(prompt, {**options, "until": stops}) for prompt in prompts
             for options, stops in ((sampled, ["e", "\n"]), (sampled, []), ({"max_gen_toks": 5}, " "))]  # fmt: skip
    texts = []
    for sizes in ({"batch_size": 1}, {}, {"batch_size": 4}):
        lm = RecurrentDBLM(str(runs / objective), k=2, **sizes)
        texts.append(lm.generate_until(requests("generate_until", *asked), disable_tqdm=True))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] != texts[0][15]  # the same prompt, sampled again
    ends = [text for text, (_, options) in zip(texts[0], asked, strict=True) if options["until"] == ["e", "\n"]]
    assert not any(stop in text for text in ends for stop in ("e", "\n"))
    assert len(set(map(len, texts[0]))) > 3


def test_generation_goes_on_with_fewer_texts_where_memory_is_short(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [(text, {"max_gen_toks": 3, "until": []}) for text in ("a", "import", "x = ", "def", "return 1", "if", "")]
    lm = RecurrentDBLM(str(runs / "denoise"), k=1)
    expected = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    generate, sizes, room = lm._generate, [], 2

    def tight(prompts: list[list[int]], *rest: Any) -> list[str]:
        sizes.append(len(prompts))
        if len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(prompts, *rest)

    monkeypatch.setattr(lm, "_generate", tight)
    assert lm.generate_until(requests("generate_until", *asked), disable_tqdm=True) == expected
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    room = 0
    with pytest.raises(UserError, match="one text does not fit"):
        lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)


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


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"num_beams": 3}, "num_beams = 3 is not supported"),
        ({"num_beams": True}, "num_beams = True is not supported"),
        ({5: 4}, "5 = 4 is not supported"),
        ({"no_repeat_ngram_size": 4}, "no_repeat_ngram_size = 4 is not supported"),
        ({"bad_words_ids": [[1]]}, "bad_words_ids"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"seed": 3}, "seed = 3 is not supported"),
        ({"temprature": 0.5}, "did you mean temperature"),
        ({"stop": ["x"]}, "supported: until"),
        ({"max_gen_toks": 2.5}, "max_gen_toks must be a whole number of 0 or more, got 2.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number"),
        ({"max_tokens": True}, "max_tokens must be a whole number"),
        ({"max_gen_toks": 4, "max_new_tokens": 5}, "max_gen_toks and max_new_tokens differ"),
        ({"max_length": 2}, "max_length = 2 leaves no room after a prompt of"),
        ({"max_length": "long"}, "max_length must be a whole number"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": -1, "do_sample": False}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"min_p": 7}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"do_sample": "maybe"}, "do_sample must be true or false, got 'maybe'"),
        ({"until": 5}, "until must be a text or a list of texts, got 5"),
    ],
)
def test_generation_options_that_cannot_be_kept_are_refused_by_name(
    runs: Path, options: dict[str, Any], expected: str
) -> None:
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    asked = requests("generate_until", ("import os", {"max_gen_toks": 1}), ("import os", options))
    asked[1].task_name = "mine"
    with pytest.raises(UserError) as error:
        lm.generate_until(asked, disable_tqdm=True)
    assert str(error.value).startswith("generation options of task mine: ")
    assert expected in str(error.value)


def test_every_supported_generation_option_is_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = RecurrentDBLM(str(runs / "next_token"), k=1)
    seen: list[GenerationOptions] = []
    monkeypatch.setattr(
        "recurrent_db.evaluation.lm_eval_model.complete",
        lambda model, tokenizer, prompts, options, keys, batch_size: seen.append(options) or [""] * len(prompts),
    )

    def kept(**options: Any) -> GenerationOptions:
        lm.generate_until(requests("generate_until", ("import os", options)), disable_tqdm=True)
        return seen.pop()

    prompt = len(lm.tok_encode("import os"))
    assert kept() == lm.options.changed(max_new_tokens=256, stop=[])
    assert kept(max_new_tokens="7").max_new_tokens == kept(max_tokens=7.0, max_completion_tokens=7).max_new_tokens == 7
    assert kept(max_length=prompt + 5).max_new_tokens == 5
    assert kept(max_length=prompt + 5, max_gen_toks=3).max_new_tokens == 3
    assert kept(max_length=999, max_gen_toks=999).max_new_tokens == 999 - prompt
    assert kept(do_sample=True).temperature == 1
    assert kept(temperature=0.7).temperature == 0.7
    assert kept(do_sample=False, temperature=0.7).temperature == 0  # as the harness documents
    filters = {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.3, "temperature": 2.0}
    assert kept(**filters) == lm.options.changed(max_new_tokens=256, stop=[], **filters)
    assert kept(until=["a", None]).stop == kept(until="a").stop == ["a"]
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "top_p": None, "top_k": 0}
    assert kept(**neutral) == kept()


def test_generation_by_another_sampler(runs: Path, tmp_path: Path) -> None:
    """Along the diagonal a sampled text is the same; an exit's is another, and kept answers are told apart by it."""
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "until": []}
    asked = requests("generate_until", ("import ", options), ("x", options))
    answers = tmp_path / "answers.jsonl"
    texts = [
        RecurrentDBLM(str(runs / "unrolled"), k=4, cache=str(answers), **words).generate_until(asked, disable_tqdm=True)
        for words in ({}, {"sampler": "diagonal:1"}, {"exit": "latent:1e9"}, {})
    ]
    assert texts[0] == texts[1] == texts[3] != texts[2]
    for words in ({"sampler": "diagonals"}, {"exit": "kl:x"}):
        with pytest.raises(UserError, match=r"(sampler|exit) must be"):
            RecurrentDBLM(str(runs / "unrolled"), **words)
    with pytest.raises(UserError, match="a plain loop"):
        RecurrentDBLM(str(runs / "denoise"), sampler="speculative")


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script as a module; what it does to the environment is undone."""
    environment = dict(os.environ)
    monkeypatch.syspath_prepend(ROOT / "eval")
    module = load_script("eval/lm_eval_cli.py")
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
        ("lambada", "lambada/lambada_standard.yaml"),
        ("lambada", "lambada/lambada_openai.yaml"),
    ],
)
def test_prompts_and_metrics_are_the_official_ones(ours: str, official: str) -> None:
    mine = yaml.safe_load((ROOT / "eval" / "tasks" / f"{ours}.yaml").read_text(encoding="utf-8"))
    theirs = yaml.safe_load((OFFICIAL / official).read_text(encoding="utf-8"))
    differ = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    # Only where the data come from: their file and splits, and for BLiMP which paradigms. A tag is a name for several.
    allowed = {"dataset_path", "dataset_name", "dataset_kwargs", "task"}
    assert differ <= allowed | ({"tag", "validation_split"} if ours == "lambada" else set())
    if "group" not in mine:
        assert {"doc_to_text", "doc_to_target", "metric_list"} <= mine.keys()


class Made(TemplateLM):
    """A model whose answers are made of the requests, so that every metric gets something to work on."""

    eot_token_id = 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    _loglikelihood_tokens = loglikelihood_rolling = generate_until = tok_encode  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(-float(key(*request.args) % 1000) / 100, key(*request.args) % 3 == 0) for request in requests]


@pytest.mark.parametrize(
    "ours, official",
    [
        ("arc_easy", "arc/arc_easy.yaml"),
        ("piqa", "piqa/piqa.yaml"),
        ("blimp_first", "blimp/_template_yaml"),
        ("lambada", "lambada/lambada_standard.yaml"),
        ("lambada", "lambada/lambada_openai.yaml"),
    ],
)
def test_same_requests_and_results_as_the_official_tasks(
    cli: ModuleType, tmp_path: Path, ours: str, official: str
) -> None:
    """The harness with its own task description on the same rows, but for the download; with an example before each."""
    write_benchmarks(tmp_path / "files")
    [mine] = cli.offline_tasks([ours], tmp_path / "files")
    theirs = yaml.safe_load((OFFICIAL / official).read_text(encoding="utf-8"))
    theirs = {name: value for name, value in theirs.items() if name not in ("dataset_name", "tag")}
    theirs.update({name: mine[name] for name in ("dataset_path", "dataset_kwargs")}, task="theirs")
    there = mine["dataset_kwargs"]["data_files"]
    for split in ("training_split", "validation_split", "test_split"):
        if theirs.get(split) not in there:
            theirs[split] = None
    with cli.task_folder([mine, theirs]) as folder:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        results, asked = [], []
        for name in (ours, "theirs"):
            lm = Made()
            done = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=manager, num_fewshot=1, bootstrap_iters=10)
            results.append(
                {name: value for name, value in done["results"][name].items() if name not in ("alias", "name")}
            )
            asked.append(lm.asked)
    assert asked[0] == asked[1]
    assert len(asked[0]) >= 3
    assert results[0] == results[1]
    assert any(name.startswith("acc,") for name in results[0])


@pytest.mark.parametrize("name", ["plain", "a[1]*?", "x::y", "zip::b[c]"])
def test_folders_of_tasks_that_look_like_patterns(cli: ModuleType, tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [data] is not installed")
    folder = tmp_path / name
    folder.mkdir()
    (folder / "lambada_test.jsonl").write_text('{"text": "a passage and its end"}\n')
    [task] = cli.offline_tasks(["lambada"], folder)
    rows = datasets.load_dataset("json", cache_dir=str(tmp_path / "cache"), **task["dataset_kwargs"])
    assert rows["test"]["text"][:] == ["a passage and its end"]


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


def test_heldout_passages(data: Path, texts: list[str]) -> None:
    passages = heldout_passages(data, 50)
    assert passages == heldout_passages(data, 50)
    assert passages != heldout_passages(data, 50, seed=1)
    assert len(passages) == 50
    for passage in passages:
        context, word = passage.text.rsplit(" ", 1)
        assert word.isalpha() and len(word) >= 4
        assert word in re.findall(r"\w+", context)
        assert any(re.search(re.escape(passage.text) + r"(?!\w)", text) for text in texts[2:8])
    path = write_heldout_task(data, "heldout_last_word", 7)
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == [
        p.text for p in heldout_passages(data, 7)
    ]


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
    assert path == data.resolve() / "heldout_cloze.jsonl"
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


def test_command_runs_heldout_cloze(runs: Path, data: Path, tmp_path: Path) -> None:
    words = [
        "--model", "recurrent_db", "--model_args", f"checkpoint={runs / 'denoise'},k=2", "--tasks", "heldout_cloze",
        "--data", str(data), "--limit", "6", "--output_path", str(tmp_path), "--log_samples",
    ]  # fmt: skip
    # A new interpreter: a library that was imported before would not be told to show no progress.
    command = [sys.executable, str(ROOT / "eval/lm_eval_cli.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "heldout_cloze" in done.stdout and "acc_norm" in done.stdout
    assert all(line.startswith("WARNING: ") for line in done.stderr.splitlines()), done.stderr
    [results_file] = tmp_path.glob("*denoise/results_*.json")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    assert 0 <= results["results"]["heldout_cloze"]["acc,none"] <= 1
    assert results["config"]["k"] == 2 and results["config"]["objective"] == "denoise"
    [samples] = tmp_path.glob("*denoise/samples_heldout_cloze_*.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 6


def test_command_runs_local_benchmarks(
    cli: ModuleType, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path
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
    kept = tmp_path / "answers"
    assert cli.main([*model, "--tasks", "lambada", "--batch_size", "auto:2", "--use_cache", str(kept), *where]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert len(kept.read_text().splitlines()) == 1 + 3  # not a database of pickles
    assert cli.main([*model, "--tasks", "heldout_last_word", "--limit", "5", "--data", str(data)]) == 0
    assert "heldout_last_word" in capsys.readouterr().out


def command(words: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "eval"))  # as for a script of that folder
    assert load_script("eval/lm_eval_cli.py").main(words) == 0


def test_two_processes_evaluate_like_one(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With examples before the questions, which the harness draws one after another; the files are written once."""
    write_benchmarks(tmp_path / "files", 7)
    samples = []
    for world in (1, 2):
        out = tmp_path / str(world)
        words = [
            "--model_args", f"checkpoint={runs / 'denoise'},k=2", "--tasks", "arc_easy,blimp,lambada",
            "--data", str(tmp_path / "files"), "--num_fewshot", "2", "--log_samples", "--output_path", str(out),
        ]  # fmt: skip
        if world == 1:
            command(words)
            said = capsys.readouterr().out
        else:
            job = many.run(tmp_path / "logs", world, command, words)
            said = job.text(0) + job.text(1)
        assert said.count("|blimp ") == 2  # among the tasks, and among the groups
        files = sorted(out.rglob("samples_*.jsonl"))
        assert len(files) == 4
        assert len(list(out.rglob("results_*.json"))) == 1
        rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
        samples.append({(row["prompt_hash"], row["doc_id"], json.dumps(row["arguments"])): row for row in rows})
    alone, together = samples
    assert alone.keys() == together.keys()
    assert len(alone) == 4 * 7
    for name, row in alone.items():
        for (ours, flag), (theirs, other) in zip(row["filtered_resps"], together[name]["filtered_resps"], strict=True):
            assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
            assert flag == other


def test_mistakes_are_one_line(
    cli: ModuleType, runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    write_benchmarks(files)
    (files / "piqa_validation.jsonl").write_text('{"goal": "x"}\n', encoding="utf-8")
    (files / "lambada_test.jsonl").write_text('{"text": "one two"}\n\n{"text":\n', encoding="utf-8")
    (files / "blimp" / "empty.jsonl").write_text("\n", encoding="utf-8")
    run = f"checkpoint={runs / 'next_token'}"
    arc = ["--model_args", run, "--tasks", "arc_easy", "--data", files]
    cases = [
        (["--model_args", run, "--tasks", "lambada", "--data", files], "its line 3 is not a JSON object"),
        (["--model_args", run, "--tasks", "blimp_empty", "--data", files], "has no rows"),
        ([*arc, "--limit", "-1"], "--limit must be above 0 and at most"),
        ([*arc, "--num_fewshot", "-1"], "--num_fewshot must be 0 or more"),
        (["--model_args", run, "--tasks", "heldout_cloze"], "needs --data"),
        (["--model_args", run, "--tasks", "heldout_cloze", "--data", files], "manifest.json"),
        (["--model_args", run, "--tasks", "heldout_cloze", "--data", tmp_path / "nowhere"], "no such folder"),
        (["--model_args", run, "--tasks", "arc_easy", "--data", data], "token shards"),
        (["--model_args", run, "--tasks", "arc_easy", "--data", tmp_path], "arc_easy_validation.jsonl"),
        (["--model_args", run, "--tasks", "piqa", "--data", files], "missing sol1"),
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
        (["--model_args", run, "--tasks", "arc_eazy", "--data", files], "arc_eazy; did you mean arc_easy?"),
        (["--model_args", run, "--tasks", "heldout_last_word"], "needs --data"),
        *(
            (["--model_args", f"checkpoint={runs / name},{wrong}", "--tasks", "arc_easy", "--data", files], expected)
            for name, wrong, expected in (
                ("next_token", "sigma=1.0", "a next_token checkpoint has no noise level"),
                ("unrolled", "sigma=1.0", "an unrolled checkpoint has no noise level"),
                ("denoise", "sigma=21", "at most its sigma_max = 20"),
                ("denoise", "sigma=0.02,k=2", "above this checkpoint's sigma_min = 0.02"),
                ("denoise", "sigma=0.019,k=1", "above this checkpoint's sigma_min = 0.02"),
                ("denoise", "sigma=much", "got 'much'"),
                ("denoise", "sigma=nan", "sigma must be"),
                ("denoise", "batch_size=automatic", "batch_size must be"),
                ("denoise", "prefix_reuse=perhaps", "true or false"),
                ("denoise", "dtype=float16", "dtype must be one of"),
                ("denoise", "draws=0", "draws must be"),
                ("denoise", f"cache={files / 'piqa_validation.jsonl'}", "is not an answer cache"),
                ("denoise", f"cache={files}", "cannot store answers in"),
            )
        ),
        (
            ["--model_args", f"{run},cache=x", "--use_cache", "y", "--tasks", "arc_easy", "--data", files],
            "given twice, as --use_cache and",
        ),
    ]
    for argv, expected in cases:
        with pytest.raises(SystemExit) as stop:
            run_and_exit(lambda argv=argv: cli.main(list(map(str, argv))))
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert expected in err
        assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--num_fewshot", "999"], "fewer examples than --num_fewshot"),
        (["--samples", '{"arc_easy": [999]}'], "Elements of --samples"),
    ],
)
def test_numbers_beyond_a_tasks_rows(
    cli: ModuleType, runs: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    write_benchmarks(tmp_path / "files")
    run = f"checkpoint={runs / 'next_token'},k=1"
    with pytest.raises(UserError, match=expected):
        cli.main(["--model_args", run, "--tasks", "arc_easy", "--data", str(tmp_path / "files"), *words])


def test_unknown_names_are_refused_before_the_harness_indexes_its_tasks(
    cli: ModuleType, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("task: my_own\n", encoding="utf-8")
    cli.check_names(["hellaswag", "ai2_arc", "mmlu_stem", "no_such_*", str(tmp_path), "my_own"], str(tmp_path))
    with pytest.raises(UserError, match=r"not found: my_own$"):
        cli.check_names(["hellaswag", "my_own"], None)
    write_benchmarks(tmp_path)

    def indexed(*given: Any, **named: Any) -> None:
        raise AssertionError("the harness reads all of its tasks")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", indexed)
    words = ["--model_args", f"checkpoint={runs / 'next_token'}", "--tasks", "piqa,lambadda"]
    for more in ([], ["--data", str(tmp_path)]):
        with pytest.raises(UserError, match=r"not found: lambadda.*did you mean lambada"):
            cli.main([*words, *more])


@pytest.mark.parametrize("words", [["lm_eval_cli.py", "--tasks", "piqa"], ["sweep.py", ".", "--data", "."]])
def test_without_the_harness_is_one_line(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('absent')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval" / words[0]), *words[1:]],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "recurrent-db[eval]" in done.stderr
