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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recurrent_db.data.shards import MANIFEST
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


def _check_rows(path: Path, fields: Sequence[str]) -> None:
    """Raise UserError unless the file is JSONL with at least one object, all with ``fields``. Empty lines are skipped."""
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path} is not JSONL: its line {number} is not a JSON object")
            if missing := [field for field in fields if field not in row]:
                raise UserError(f"{path}, line {number}: missing {', '.join(missing)}")
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


def _localize(config: Config, folder: Path, *fields: str) -> Config:
    """Point a task at its data files in ``folder``, as absolute paths. Splits without a file are left out.

    Raises:
        UserError: there is no file to evaluate on, or a file lacks ``fields``.
    """
    files: dict[str, str] = config["dataset_kwargs"]["data_files"]
    there = {split: (folder / name).resolve() for split, name in files.items() if (folder / name).is_file()}
    splits = {name: config.get(f"{name}_split") for name in ("training", "validation", "test")}
    if not any(splits[name] in there for name in ("validation", "test")):
        wanted = " or ".join(files[s] for n, s in splits.items() if s in files and n != "training")
        raise UserError(f"task {config['task']}: no file {wanted} in {folder}")
    for path in there.values():
        _check_rows(path, fields)
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
    tasks = [_localize(_read_yaml("blimp", name=name), folder, "sentence_good", "sentence_bad") for name in chosen]
    if wanted != "blimp":
        return tasks
    if len(names) < PARADIGMS:
        logging.getLogger("lm_eval").warning("blimp: %s has %d of the %d paradigms", folder, len(names), PARADIGMS)
    return [{**_read_yaml("blimp_group"), "task": [task["task"] for task in tasks]}, *tasks]


def _arc_easy(folder: Path, wanted: str) -> list[Config]:
    return [_localize(_read_yaml("arc_easy"), folder, "question", "choices", "answerKey")]


def _piqa(folder: Path, wanted: str) -> list[Config]:
    return [_localize(_read_yaml("piqa"), folder, "goal", "sol1", "sol2", "label")]


def _lambada(folder: Path, wanted: str) -> list[Config]:
    return [_localize(_read_yaml("lambada"), folder, "text")]


def _heldout_cloze(folder: Path, wanted: str) -> list[Config]:
    path = write_heldout_task(folder, wanted)
    return [_localize(_read_yaml("heldout_cloze"), path.parent, "context", "choices", "label")]


def _heldout_last_word(folder: Path, wanted: str) -> list[Config]:
    path = write_heldout_task(folder, wanted)
    config = _read_yaml("lambada")
    config.update(task=wanted, test_split=None, dataset_kwargs={"data_files": {"validation": path.name}})
    return [_localize(config, path.parent, "text")]


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
