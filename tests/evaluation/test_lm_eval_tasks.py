"""Mistakes in task files of the lm-eval harness: one line that names file, field and row, before the model runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT, load_script, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'recurrent-db[eval]')")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from recurrent_db.arguments import run_and_exit  # noqa: E402
from recurrent_db.data.tokenizer import Tokenizer  # noqa: E402
from recurrent_db.errors import UserError  # noqa: E402
from recurrent_db.evaluation.accuracy import credit  # noqa: E402
from recurrent_db.evaluation.lm_eval_tasks import checked_tasks, user_errors  # noqa: E402

ROWS: list[dict[str, Any]] = [
    {"ask": "Snow is", "answers": ["white", "green"], "right": 0, "word": "cold"},
    {"ask": "Grass is", "answers": ["white", "green"], "right": 1, "word": "tall"},
    {"ask": "Coal is", "answers": ["black", "red"], "right": 0, "word": "hot"},
]
METRIC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
CHOOSE = {
    "task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "metric_list": [METRIC],
    "doc_to_text": "{{ask}}", "doc_to_choice": "{{answers}}", "doc_to_target": "{{right}}",
}  # fmt: skip
WORD = {**CHOOSE, "output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": " {{word}}"}
WRITE = {
    **WORD, "output_type": "generate_until", "metric_list": [{**METRIC, "metric": "exact_match"}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
}  # fmt: skip
FUNCTIONS = """
def no_docs(docs):
    return docs.shuffled()

def no_result(doc, results):
    return {"acc": doc["wrong"]}
"""


class Stub(LM):
    """A model that counts its requests and answers all of them alike."""

    asked = 0

    def _answers(self, requests: list[Instance], answer: Any) -> list[Any]:
        self.asked += len(requests)
        return [answer] * len(requests)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._answers(requests, (-1.0, False))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._answers(requests, -1.0)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self._answers(requests, "text")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write_task(folder: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write a task and its data. ``!function`` values become the tags that the harness knows."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "functions.py").write_text(FUNCTIONS)
    whole = {"dataset_kwargs": {"data_files": {"test": str(data)}}, **config}
    text = json.dumps({name: value for name, value in whole.items() if value is not None})
    path = folder / "mine.yaml"
    path.write_text(text.replace('"!function ', "!function ").replace('functions.no_docs"', "functions.no_docs")
                    .replace('functions.no_result"', "functions.no_result"))  # fmt: skip
    return path


def evaluate(folder: Path, lm: Stub) -> dict[str, Any]:
    with user_errors(ValueError, KeyError), checked_tasks():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        done = lm_eval.simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
        results: dict[str, Any] = (done["results"] | done.get("groups", {}))["mine"]
        return results


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **(values if index == number else {})} for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("config", [CHOOSE, WORD, WRITE])
def test_good_tasks_run(tmp_path: Path, config: dict[str, Any]) -> None:
    write_task(tmp_path, config, ROWS)
    assert any(name.endswith(",none") for name in evaluate(tmp_path, Stub()))


@pytest.mark.parametrize(
    "config, change, rows, expected",
    [
        (CHOOSE, {"doc_to_text": "{{question.stem}}"}, ROWS, "row 1: doc_to_text: UndefinedError: 'question' is undefined"),
        (CHOOSE, {"doc_to_text": "{{ask"}, ROWS, "row 1: doc_to_text: TemplateSyntaxError"),
        (CHOOSE, {"doc_to_text": None}, ROWS, "doc_to_text is missing"),
        (CHOOSE, {"doc_to_text": "ask"}, changed(1, ask=None), "row 2: doc_to_text must give a text, got None"),
        (CHOOSE, {"doc_to_target": "{{right + 5}}"}, ROWS, "row 1: doc_to_target names none of the 2 choices: 5"),
        (CHOOSE, {"doc_to_target": "right"}, changed(2, right=-1), "row 3: doc_to_target names none of the 2 choices: -1"),
        (CHOOSE, {}, changed(1, right="B"), "row 2: doc_to_target names none of the 2 choices: 'B'"),
        (CHOOSE, {"doc_to_target": "{{[0, 2]}}"}, ROWS, "row 1: doc_to_target names none of the 2 choices: 2"),
        (WRITE, {"doc_to_choice": ["a", "b"], "doc_to_target": "right"}, changed(1, right=-1), "row 2: doc_to_target names"),
        (CHOOSE, {"doc_to_choice": "white"}, ROWS, "doc_to_choice must give a list of texts, got 'white'"),
        (CHOOSE, {"doc_to_choice": 7}, ROWS, "doc_to_choice has an invalid value: 7"),
        (CHOOSE, {"doc_to_choice": [1, 2]}, ROWS, "doc_to_choice must give a list of texts, got [1, 2]"),
        (CHOOSE, {}, changed(0, answers=["", "b"]), "row 1: doc_to_choice gives an empty text as choice 0"),
        (CHOOSE, {}, changed(2, answers=["a", ""]), "row 3: doc_to_choice gives an empty text as choice 1"),
        (WORD, {"doc_to_target": "right"}, ROWS, "row 1: doc_to_target must give a text, got 0"),
        (WORD, {"doc_to_target": "word"}, changed(1, word=""), "row 2: doc_to_target gives an empty text"),
        (CHOOSE, {"test_split": "dev"}, ROWS, "test_split: the data have no split 'dev', only test"),
        (CHOOSE, {"fewshot_split": "dev"}, ROWS, "fewshot_split: the data have no split 'dev', only test"),
        (CHOOSE, {"test_split": None}, ROWS, "test_split: "),
        (CHOOSE, {"test_split": 5}, ROWS, "test_split must be str or None, got 5"),
        (CHOOSE, {"doc_to_target": True}, ROWS, "doc_to_target names none of the 2 choices: True"),
        (CHOOSE, {"output_type": 5}, ROWS, "output_type must be one of loglikelihood, multiple_choice"),
        (CHOOSE, {"metric_list": []}, ROWS, "metric_list names no metric"),
        (CHOOSE, {"dataset_path": "jsom"}, ROWS, "dataset_path: "),
        (CHOOSE, {"metric_list": [{"metric": "accuraccy"}]}, ROWS, "metric_list: unknown metric 'accuraccy'"),
        (CHOOSE, {"metric_list": [{**METRIC, "metric": "accuraccy"}]}, ROWS, "metric_list: unknown metric 'accuraccy'"),
        (CHOOSE, {"metric_list": [{**METRIC, "aggregation": "avg"}]}, ROWS, "'acc' needs a known aggregation"),
        (CHOOSE, {"metric_list": [METRIC, {**METRIC, "metric": "perplexity"}]}, ROWS, "has no metric 'perplexity'"),
        (CHOOSE, {"doc_to_txet": "x"}, ROWS, "unknown field doc_to_txet; did you mean doc_to_text?"),
        (CHOOSE, {"dataset_path": None}, ROWS, "dataset_path is missing"),
        (CHOOSE, {"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, ROWS, "dataset_kwargs: Unable to find"),
        (CHOOSE, {}, [], "dataset_kwargs: the data have no rows"),
        (CHOOSE, {"target_delimiter": 5}, ROWS, "target_delimiter must be str, got 5"),
        (CHOOSE, {"num_fewshot": -1}, ROWS, "num_fewshot must be a whole number of 0 or more, got -1"),
        (CHOOSE, {"num_fewshot": 1.5, "fewshot_split": "test"}, ROWS, "num_fewshot must be int or None, got 1.5"),
        (CHOOSE, {"num_fewshot": "two"}, ROWS, "num_fewshot must be int or None, got 'two'"),
        (CHOOSE, {"num_fewshot": 9}, ROWS, "fewer examples than --num_fewshot"),
        (CHOOSE, {"description": "{{nothing}}"}, ROWS, "description: UndefinedError"),
        (CHOOSE, {"process_docs": "no_docs"}, ROWS, "process_docs must be a function or None, got 'no_docs'"),
        (CHOOSE, {"process_docs": "!function functions.no_docs"}, ROWS, "process_docs: AttributeError"),
        (WRITE, {"repeats": 0}, ROWS, "repeats must be a whole number of 1 or more"),
        (WRITE, {"generation_kwargs": {"max_gen_toks": 1e30}}, ROWS, "max_gen_toks must be a whole number"),
        (WRITE, {"generation_kwargs": {"until": [], "num_beams": 2}}, ROWS, "num_beams = 2 is not supported"),
        (WRITE, {"filter_list": [{"name": "a", "filter": [{"function": "sort"}]}]}, ROWS, "filter_list: Unknown filter"),
        (WRITE, {"filter_list": [{"name": "a", "filter": [{"function": "regex", "regex_pattern": "("}]}]}, ROWS,
         "filter_list: filter 'a'"),
    ],
)  # fmt: skip
def test_a_mistake_names_file_and_field_before_the_model_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    change: dict[str, Any],
    rows: list[dict[str, Any]],
    expected: str,
) -> None:
    path, lm = write_task(tmp_path, {**config, **change}, rows), Stub()
    with pytest.raises(UserError) as error:
        evaluate(tmp_path, lm)
    assert str(error.value).startswith(f"{path}, task mine")
    assert expected in str(error.value)
    assert lm.asked == 0
    assert capsys.readouterr().out == ""


def test_results_of_a_tasks_own_function(tmp_path: Path) -> None:
    path = write_task(tmp_path, {**CHOOSE, "process_results": "!function functions.no_result"}, ROWS)
    with pytest.raises(UserError, match="task mine, row 1: process_results: there is no 'wrong'"):
        evaluate(tmp_path, Stub())
    assert path.is_file()


def test_a_models_exception_is_no_mistake_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path, CHOOSE, ROWS)
    monkeypatch.setattr(Stub, "_answers", lambda *_: credit([], 0))
    with pytest.raises(ValueError, match="empty"):
        evaluate(tmp_path, Stub())


JUNK = st.one_of(
    st.none(), st.integers(-2, 3), st.floats(), st.text(max_size=4), st.sampled_from(["{{x", "{{ask.x}}", "-1"]),
    st.lists(st.integers(0, 2), max_size=2), st.just({"metric": 1}),
)  # fmt: skip


@pytest.mark.long
@given(
    st.sampled_from([CHOOSE, WORD, WRITE]),
    st.sampled_from([*WRITE, "repeats", "num_fewshot", "description", "target_delimiter", "gen_prefix", "filter_list",
                     "fewshot_split", "fewshot_config", "dataset_kwargs", "process_docs", "metadata", "tag", "unknown"]),
    JUNK,
)  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_any_field_runs_or_is_a_mistake(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], field: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, {**config, field: value}, ROWS)
    try:
        evaluate(folder, Stub())
    except UserError as error:
        assert str(error).strip()


# -- local benchmark files ---------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("eval/offline_tasks.py")


GOOD: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "question": "Which melts?",
        "choices": {"text": ["ice", "sand"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "piqa": {"goal": "Cut bread", "sol1": "Use a knife.", "sol2": "Use a spoon.", "label": 0},
    "blimp_pair": {"sentence_good": "She sleeps.", "sentence_bad": "She sleep."},
    "lambada": {"text": "The cat saw the cat"},
}
FILES = {"arc_easy": "arc_easy_test", "piqa": "piqa_validation", "blimp_pair": "blimp/pair", "lambada": "lambada_test"}


def write_rows(folder: Path, task: str, *rows: dict[str, Any]) -> Path:
    path = folder / f"{FILES[task]}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) + "\n" for row in rows))  # an empty line between two rows
    return path


@pytest.mark.parametrize(
    "task, change, expected",
    [
        ("piqa", {"label": -1}, "label must be a whole number from 0 to 1, which names a choice, got -1"),
        ("piqa", {"label": 2}, "label must be a whole number"),
        ("piqa", {"label": "0"}, "got '0'"),
        ("piqa", {"label": None}, "got None"),
        ("piqa", {"label": True}, "got True"),
        ("piqa", {"label": 0.5}, "got 0.5"),
        ("piqa", {"sol2": ""}, "sol2 must be a text, got ''"),
        ("piqa", {"goal": 3}, "goal must be a text, got 3"),
        ("arc_easy", {"answerKey": ""}, "answerKey must be one of A, B, got ''"),
        ("arc_easy", {"answerKey": "C"}, "answerKey must be one of A, B, got 'C'"),
        ("arc_easy", {"choices": ["ice", "sand"]}, "choices must hold the lists text and label"),
        ("arc_easy", {"choices": {"text": ["ice"], "label": ["A", "B"]}}, "choices have 1 texts but 2 labels"),
        ("arc_easy", {"choices": {"text": ["ice", ""], "label": ["A", "B"]}}, "choices must be a list of texts"),
        ("arc_easy", {"choices": {"text": None, "label": ["A", "B"]}}, "choices must be a list of texts, got None"),
        ("arc_easy", {"choices": {"text": [], "label": []}}, "answerKey must be one of"),
        ("arc_easy", {"choices": {"text": ["ice", "sand"], "label": ["A", "A"]}}, "choices have the label 'A' twice"),
        ("blimp_pair", {"sentence_bad": ""}, "sentence_bad must be a text"),
        ("blimp_pair", {"sentence_bad": "She sleeps."}, "sentence_good and sentence_bad are the same"),
        ("lambada", {"text": "The cat saw "}, "text must end with a word, got 'The cat saw '"),
        ("lambada", {"text": ["The"]}, "text must be a text"),
    ],
)
def test_a_value_that_no_model_can_get_right_is_refused(
    offline: ModuleType, tmp_path: Path, task: str, change: dict[str, Any], expected: str
) -> None:
    write_rows(tmp_path, task, GOOD[task])
    assert [config["task"] for config in offline.offline_tasks([task], tmp_path)] == [task]
    path = write_rows(tmp_path, task, GOOD[task], {**GOOD[task], **change})
    with pytest.raises(UserError) as error:
        offline.offline_tasks([task], tmp_path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert expected in str(error.value)


@pytest.mark.parametrize("line", [b"[" * 100_000, json.dumps(GOOD["piqa"]).encode("utf-16"), b"\xff{}", b"[]"])
def test_a_line_that_is_no_object_is_refused(offline: ModuleType, tmp_path: Path, line: bytes) -> None:
    path = write_rows(tmp_path, "piqa", GOOD["piqa"])
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(UserError, match=r"piqa_validation\.jsonl is not JSONL: its line 2 is not a JSON object"):
        offline.offline_tasks(["piqa"], tmp_path)


def test_items_from_held_out_text_pass_their_check(offline: ModuleType) -> None:
    item = {"context": "One\n", "choices": ["two", "three"], "label": 1}
    assert offline._check_cloze(item) is None
    assert "from 0 to 1" in offline._check_cloze({**item, "label": 2})
    assert "list of texts" in offline._check_cloze({**item, "choices": ["two", 3]})


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label"]), inner),
)


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_any_value_is_a_row_of_the_task_or_is_told(task: str, data: st.DataObject) -> None:
    offline = load_script("eval/offline_tasks.py")
    check = {"arc_easy": offline._check_arc, "piqa": offline._check_piqa, "lambada": offline._check_last_word}
    row = dict(GOOD[task])
    field = data.draw(st.sampled_from(sorted(row)))
    row[field] = data.draw(ANY_JSON)
    wrong = check.get(task, offline._check_blimp)(row)
    if field == "label":
        assert (wrong is None) == (type(row["label"]) is int and row["label"] in (0, 1))
    elif field == "answerKey":
        assert (wrong is None) == (row["answerKey"] in ("A", "B"))
    else:
        assert wrong is None or field in wrong or "choices" in wrong or "answerKey" in wrong


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, without the harness's own 14,000 files."""
    environment = dict(os.environ)
    monkeypatch.syspath_prepend(ROOT / "eval")
    start = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda *args, **named: start(*args, **{**named, "include_defaults": False})
    )
    yield load_script("eval/lm_eval_cli.py")
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runs") / "next_token", tokenizer, "next_token", 48)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"mine.yaml": "task: mine\n  doc: [1,\n"}, "mine.yaml: line 2, column 6: mapping values are not allowed"),
        ({"mine.yaml": "task: mine\nmetric_list:\n\t- acc\n"}, "mine.yaml: line 3, column 1: found character that cannot"),
        ({"mine.yaml": "task: mine\ndescription: a\nmetadata: {v: 1, v: 2}\n"}, "mine.yaml: the field v is there twice"),
        ({"mine.yaml": "task: mine\ninclude: base.yaml\n"}, "mine.yaml: include: there is no file "),
        ({"mine.yaml": "task: mine\ninclude: 5\n"}, "mine.yaml: include: TypeError: "),
        ({"mine.yaml": "group: mine\ntask: []\n"}, "mine.yaml, group mine: task must be a list of at least one task"),
        ({"mine.yaml": "task: mine\ntag: 5\n"}, "mine.yaml, task mine: tag must be str or list or None, got 5"),
        ({"mine.yaml": "task: mine\n", "z.yaml": "task: mine\n"}, "task mine is defined twice, in "),
        ({"mine.yaml": "task: mine\ndoc_to_text: !function gone.f\n"}, "mine.yaml: ImportError: "),
        ({"mine.yaml": "group: mine\ntask: [nothing]\n"}, "there is no task 'nothing', which the group mine names"),
        ({"mine.yaml": json.dumps({**CHOOSE, "dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}})},
         "mine.yaml, task mine: dataset_kwargs: Unable to find"),
        ({"mine.yaml": json.dumps({**WRITE, "generation_kwargs": {"temperature": "warm"}})},
         "mine.yaml, task mine: generation_kwargs: could not convert string to float: 'warm'"),
    ],
)  # fmt: skip
def test_the_command_reports_a_mistake_in_one_line(
    cli: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], expected: str
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "other.yaml").write_text("[not a task\n")  # files without the name do not matter
    words = ["--model_args", f"checkpoint={run},k=1,device=cpu", "--tasks", "mine", "--include_path", str(folder)]
    with pytest.raises(SystemExit) as stop:
        run_and_exit(lambda: cli.main(words))
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert expected.replace(" here", "") in said.err
    assert len((said.out + said.err).splitlines()) == 1, said


@pytest.mark.parametrize(
    "fields, expected",
    [
        (
            "aggregate_metric_list: [{metric: acc, aggregation: median}]",
            "task mine: aggregate_metric_list: Currently, 'mean'",
        ),
        (
            "aggregate_metric_list: [{metric: acc, weight: 1}]",
            "task mine: aggregate_metric_list: unknown option weight",
        ),
        ("aggregate_metric_list: [{metric: accc}]", "group mine: aggregate_metric_list: no task has the metric 'accc'"),
        ("aggregate_metric_list: [{metric: acc, filter_list: a}]", "aggregate_metric_list: no task has the filter 'a'"),
        (
            "aggregate_metric_list: acc",
            "group mine: aggregate_metric_list must be a list of entries with metric, got 'a'",
        ),
        ("num_fewshot: two", "task mine: num_fewshot must be int or None, got 'two'"),
        ("doc_to_txet: two", "task mine: unknown field doc_to_txet; did you mean doc_to_text?"),
    ],
)
def test_a_mistake_in_a_group_names_the_groups_file(tmp_path: Path, fields: str, expected: str) -> None:
    group, lm = tmp_path / "group.yaml", Stub()
    write_task(tmp_path, {**CHOOSE, "task": "member"}, ROWS)
    group.write_text("group: mine\ntask: [member]\naggregate_metric_list: [{metric: acc}]\n")
    evaluate(tmp_path, lm)
    assert lm.asked
    group.write_text(f"group: mine\ntask: [member]\n{fields}\n")
    with pytest.raises(UserError) as error:
        evaluate(tmp_path, Stub())
    assert str(error.value).startswith(f"{group}, ")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("limit: x", "limit must be float or None, got 'x'"),
        ("limit: true", "limit must be float or None, got True"),
        ("limit: .nan", "--limit must be above 0"),
        ("num_fewshot: 1.5", "num_fewshot must be int or None, got 1.5"),
        ("tasks: [5]", "tasks must be a list of names, got [5]"),
        ("model_args: 5", "model_args must be dict, got 5"),
        ("gen_kwargs: 5", "gen_kwargs must be dict or str, got 5"),
        ("output_path: 5", "output_path must be str or None, got 5"),
        ("samples: [1]", "samples must be str or dict or None, got [1]"),
        ("tasks: mine", "the field tasks is there twice"),
    ],
)
def test_a_wrong_value_in_a_file_of_options_is_refused(
    cli: ModuleType, tmp_path: Path, line: str, expected: str
) -> None:
    file = tmp_path / "options.yaml"
    again = line == "tasks: mine"
    file.write_text("tasks: mine\n" * (again or not line.startswith("tasks")) + line + "\n")
    with pytest.raises(UserError) as error:
        cli.main(["--config", str(file)])
    assert expected in str(error.value)
    assert str(error.value).startswith((f"{file}: ", "--limit"))


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--limit", "inf", "--limit must be above 0"),
        ("--samples", "x", "--samples must list rows by task"),
        ("--samples", '{"mine": [-1]}', "--samples must list rows by task"),
        ("--gen_kwargs", '{"a":', "Invalid JSON"),
        ("--seed", "x", "argument --seed: invalid value: 'x'"),
    ],
)
def test_a_wrong_value_of_an_option_is_refused(cli: ModuleType, option: str, value: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        cli.main(["--tasks", "mine", option, value])


def test_a_file_of_broken_rows_is_one_line(
    cli: ModuleType, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.disable_progress_bars()
    write_task(tmp_path, CHOOSE, ROWS)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"ask": "Ice\n')
    words = ["--model_args", f"checkpoint={run},k=1,device=cpu", "--tasks", "mine", "--include_path", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        run_and_exit(lambda: cli.main(words))
    said = capfd.readouterr()
    assert stop.value.code == 2
    assert "mine.yaml, task mine: dataset_kwargs: the data cannot be read: " in said.err
    assert len((said.out + said.err).splitlines()) == 1, said
