"""Tasks of the lm-eval harness that read local files: configurations for eval/lm_eval_cli.py and eval/sweep.py.

The YAML files of eval/tasks/ are the harness's own, except that they read local files. The folder given by --data holds
JSONL files, one JSON object per line with these fields:

- ``arc_easy``: arc_easy_validation.jsonl (_test and _train are optional): question, choices (text, label), answerKey
- ``piqa``: piqa_validation.jsonl (_train is optional): goal, sol1, sol2, label
- ``blimp_PARADIGM``, and the group ``blimp`` of all paradigms: blimp/PARADIGM.jsonl: sentence_good, sentence_bad
- ``lambada``: lambada_test.jsonl, or else lambada_validation.jsonl: text, whose last word must be predicted
- ``heldout_cloze``, ``heldout_last_word``: made from the held-out text of a data directory
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recurrent_db.data.directory import MANIFEST
from recurrent_db.errors import UserError
from recurrent_db.evaluation.heldout_task import write_heldout_task

TASKS = Path(__file__).resolve().parent / "tasks"
PARADIGMS = 67
"""Number of paradigms in all of BLiMP."""

Config = dict[str, Any]


def _read_yaml(file: str, **values: str) -> Config:
    import yaml

    text = (TASKS / f"{file}.yaml").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return yaml.safe_load(text)


Row = Mapping[str, Any]
Check = Callable[[Row], str | None]
"""What is wrong with a row that has all fields; None if nothing is."""


def _no_text(row: Row, *fields: str) -> str | None:
    wrong = next((field for field in fields if not isinstance(row[field], str) or not row[field]), None)
    return wrong and f"{wrong} must be a text, got {row[wrong]!r}"


def _no_choice(choices: Any, label: Any) -> str | None:
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        return f"choices must be a list of texts, got {choices!r}"
    if isinstance(label, bool) or not isinstance(label, int) or label not in range(len(choices)):
        return f"label must be a whole number from 0 to {len(choices) - 1}, which names a choice, got {label!r}"
    return None


def _check_arc(row: Row) -> str | None:
    choices, answer = row["choices"], row["answerKey"]
    if not isinstance(choices, dict) or not isinstance(labels := choices.get("label"), list):
        return f"choices must hold the lists text and label, got {choices!r}"
    if answer not in labels:
        return f"answerKey must be one of {', '.join(map(str, labels))}, got {answer!r}"
    if labels.count(answer) > 1:
        return f"choices have the label {answer!r} twice"
    right = labels.index(answer)
    if isinstance(choices.get("text"), list) and len(choices["text"]) != len(labels):
        return f"choices have {len(choices['text'])} texts but {len(labels)} labels"
    return _no_text(row, "question") or _no_choice(choices.get("text"), right)


def _check_piqa(row: Row) -> str | None:
    return _no_text(row, "goal", "sol1", "sol2") or _no_choice([row["sol1"], row["sol2"]], row["label"])


def _check_blimp(row: Row) -> str | None:
    if (wrong := _no_text(row, "sentence_good", "sentence_bad")) is None and row["sentence_good"] == row[
        "sentence_bad"
    ]:
        return "sentence_good and sentence_bad are the same"
    return wrong


def _check_last_word(row: Row) -> str | None:
    if (wrong := _no_text(row, "text")) is None and not row["text"].split(" ")[-1].strip():
        return f"text must end with a word, got {row['text'][-20:]!r}"
    return wrong


def _check_cloze(row: Row) -> str | None:
    return _no_text(row, "context") or _no_choice(row["choices"], row["label"])


FIELDS: dict[Check, tuple[str, ...]] = {
    _check_arc: ("question", "choices", "answerKey"),
    _check_piqa: ("goal", "sol1", "sol2", "label"),
    _check_blimp: ("sentence_good", "sentence_bad"),
    _check_last_word: ("text",),
    _check_cloze: ("context", "choices", "label"),
}
"""The fields of a task's rows, by the check of their values."""


def _check_rows(path: Path, check: Check) -> None:
    """Raise UserError unless the file is JSONL with at least one object, and all have the fields and values of ``check``.

    Empty lines are skipped. A label that names no choice, such as the -1 of hidden test labels, would count as a wrong
    answer of every model.
    """
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path} is not JSONL: its line {number} is not a JSON object")
            if missing := [field for field in FIELDS[check] if field not in row]:
                raise UserError(f"{path}, line {number}: missing {', '.join(missing)}")
            if wrong := check(row):
                raise UserError(f"{path}, line {number}: {wrong}")
            rows += 1
    if not rows:
        raise UserError(f"{path} has no rows")


@functools.cache
def _links() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="recurrent_db-")


def _as_pattern(path: Path) -> str:
    """``path`` as the library `datasets` must get it, which reads ``* ? [ ]`` as patterns and cuts names at ``::``."""
    if "::" not in str(path):
        return glob.escape(str(path))
    folder = Path(tempfile.mkdtemp(dir=_links().name))
    (folder / f"rows{path.suffix}").symlink_to(path)
    return str(folder / f"rows{path.suffix}")


def _localize(config: Config, folder: Path, check: Check) -> Config:
    """Point a task at its data files in ``folder``, as absolute paths. Splits without a file are left out.

    Raises:
        UserError: there is no file to evaluate on, or a file's rows do not pass ``check``.
    """
    files: dict[str, str] = config["dataset_kwargs"]["data_files"]
    there = {split: (folder / name).resolve() for split, name in files.items() if (folder / name).is_file()}
    splits = {name: config.get(f"{name}_split") for name in ("training", "validation", "test")}
    if not any(splits[name] in there for name in ("validation", "test")):
        wanted = " or ".join(files[s] for n, s in splits.items() if s in files and n != "training")
        raise UserError(f"task {config['task']}: no file {wanted} in {folder}")
    for path in there.values():
        _check_rows(path, check)
    config["dataset_kwargs"]["data_files"] = {split: _as_pattern(path) for split, path in there.items()}
    for name, split in splits.items():
        if split not in there:
            config[f"{name}_split"] = None
    return config


def _blimp(folder: Path, wanted: str) -> list[Config]:
    """The group ``blimp`` and all its paradigms, or only the paradigms that match the name or pattern ``wanted``."""
    names = sorted(path.stem for path in (folder / "blimp").glob("*.jsonl"))
    chosen = names if wanted == "blimp" else [name for name in names if fnmatch.fnmatch(f"blimp_{name}", wanted)]
    if not chosen:
        what = wanted.removeprefix("blimp_") if wanted.startswith("blimp_") else "*"
        raise UserError(f"task {wanted}: no file blimp/{what}.jsonl in {folder}")
    tasks = [_localize(_read_yaml("blimp", name=name), folder, _check_blimp) for name in chosen]
    if wanted != "blimp":
        return tasks
    if len(names) < PARADIGMS:
        logging.getLogger("lm_eval").warning("blimp: %s has %d of the %d paradigms", folder, len(names), PARADIGMS)
    return [{**_read_yaml("blimp_group"), "task": [task["task"] for task in tasks]}, *tasks]


def _arc_easy(folder: Path, wanted: str) -> list[Config]:
    return [_localize(_read_yaml("arc_easy"), folder, _check_arc)]


def _piqa(folder: Path, wanted: str) -> list[Config]:
    return [_localize(_read_yaml("piqa"), folder, _check_piqa)]


def _lambada(folder: Path, wanted: str) -> list[Config]:
    return [_localize(_read_yaml("lambada"), folder, _check_last_word)]


def _heldout_cloze(folder: Path, wanted: str) -> list[Config]:
    path = write_heldout_task(folder, wanted)
    return [_localize(_read_yaml("heldout_cloze"), path.parent, _check_cloze)]


def _heldout_last_word(folder: Path, wanted: str) -> list[Config]:
    path = write_heldout_task(folder, wanted)
    config = _read_yaml("lambada")
    config.update(task=wanted, test_split=None, dataset_kwargs={"data_files": {"validation": path.name}})
    return [_localize(config, path.parent, _check_last_word)]


HELDOUT = {"heldout_cloze": _heldout_cloze, "heldout_last_word": _heldout_last_word}
OFFLINE: dict[str, Callable[[Path, str], list[Config]]] = {
    **HELDOUT,
    "arc_easy": _arc_easy,
    "piqa": _piqa,
    "lambada": _lambada,
    "blimp": _blimp,
    "blimp_*": _blimp,
}


def maker(name: str) -> Callable[[Path, str], list[Config]] | None:
    """The function that makes the offline task ``name``; None if it is not an offline task."""
    return next((make for pattern, make in OFFLINE.items() if fnmatch.fnmatchcase(name, pattern)), None)


def offline_tasks(names: Sequence[str], data: Path | None) -> list[Config]:
    """Configurations of the offline tasks among ``names``; none without ``data``.

    Raises:
        UserError: --data is missing but needed, is not a folder, or lacks a task's files.
    """
    if data is None:
        if needy := [name for name in names if name in HELDOUT]:
            raise UserError(f"task {needy[0]} needs --data DIR, a folder made by train/prepare_data.py")
        return []
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    configs: dict[str, Config] = {}
    for name in names:
        make = maker(name)
        if make is None:
            continue
        if name not in HELDOUT and (data / MANIFEST).is_file():
            raise UserError(f"task {name} reads benchmark JSONL, but --data {data} holds token shards")
        configs.update((task_name(config), config) for config in make(data, name))
    return list(configs.values())


def task_name(config: Config) -> str:
    """The name of a task or group."""
    return config.get("group") or config["task"]


def chosen(names: Sequence[str], configs: Sequence[Config]) -> list[str]:
    """The tasks and groups that ``names`` select, without repeats. Patterns (blimp_*) select from ``configs``."""
    available = [task_name(config) for config in configs]
    hits = (fnmatch.filter(available, name) if maker(name) and configs else [name] for name in names)
    return list(dict.fromkeys(name for matching in hits for name in matching))


@contextlib.contextmanager
def task_folder(configs: Sequence[Config]) -> Iterator[Path]:
    """Write the configurations as YAML files to a temporary folder, for the harness's ``include_path``."""
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as temporary:
        for config in configs:
            text = json.dumps(config)  # JSON is also YAML
            (Path(temporary) / f"{task_name(config)}.yaml").write_text(text, encoding="utf-8")
        yield Path(temporary)
