"""Mistakes in the tasks of the lm-eval harness: looked for before the model runs, and reported in one line.

The harness meets a mistake in a task's file or data as some exception, or scores a row that no model can get right.

- `user_errors` turns exceptions into a `UserError` that names the task, its file, the field and the row. These come from the
  traceback, so that kinds of mistakes need no cases of their own.
- `checked_tasks` makes the harness check labels, choices, metrics and generation options before it runs the model.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any

from recurrent_db.errors import UserError
from recurrent_db.evaluation.lm_eval_arguments import request_options

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask

# Modules of the harness that work on nothing but tasks. Everything calls its `utils`.
_TASKS = re.compile(
    r"lm_eval\.(tasks|config|filters|prompts|evaluator_utils|api\.(task|group|metrics|registry|filter|samplers))\b"
)
_UTILS = "lm_eval.utils"
# Functions of the harness, and variables of `ConfigurableTask.__init__`, by which an exception is traced to a task's field.
_FIELD_OF_FUNCTION = {
    "__post_init__": "generation_kwargs",
    "from_dict": "fewshot_config",
    "download": "dataset_path",
    "training_docs": "training_split",
    "validation_docs": "validation_split",
    "test_docs": "test_split",
    "eval_docs": "test_split",
    "fewshot_docs": "fewshot_split",
    "apply_filters": "filter_list",
    "doc_to_prefix": "gen_prefix",
    "resolve_field": "description",
    "process_results": "process_results",
    "get_prompt": "use_prompt",
}
_FIELD_OF_VARIABLE = {
    "config_sampler": "fewshot_config",
    "filter_config": "filter_list",
    "metric_config": "metric_list",
}
_TYPES: dict[str, Any] = {
    "None": type(None), "str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict,
    "Callable": FunctionType,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Exceptions


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions in the harness's code for tasks into `UserError`, and elsewhere in the harness those of ``kinds``.

    Exceptions that come from this package, such as a model's, are raised as they are. LMEVAL_LOG_LEVEL=DEBUG shows the
    traceback of the others.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logging.getLogger("lm_eval.recurrent_db").debug("this exception is reported as a mistake", exc_info=True)
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = (str(frame.f_globals.get("__name__")) for frame in reversed(frames))
        module = next(
            (name for name in modules if name.startswith(("lm_eval.", "recurrent_db.")) and name != _UTILS), ""
        )
        if _TASKS.match(module):
            raise UserError(_Place(error, frames).message()) from None
        if isinstance(error, kinds) and not module.startswith("recurrent_db."):
            raise UserError(f"lm-eval: {_sentence(error)}") from None
        raise


class _Place:
    """Where in a task an exception comes from, found in the frames of its traceback."""

    def __init__(self, error: Exception, frames: list[FrameType]) -> None:
        from lm_eval.api.task import ConfigurableTask

        self.error, self.task = error, None
        self.name = self.file = self.field = ""
        self.config: Mapping[str, Any] = {}
        self.overrides: Mapping[str, Any] = {}  # fields of a task that the group ``self.group`` sets
        self.group = ("", "")
        self.doc, self.row = None, None
        for frame in frames:
            function, values = frame.f_code.co_name, frame.f_locals
            if self.task is not None:
                self.field = _field_of_code(self.task, frame.f_code) or self.field
            if not str(frame.f_globals.get("__name__")).startswith("lm_eval."):
                continue
            found = next(
                (values[word] for word in ("self", "task") if isinstance(values.get(word), ConfigurableTask)), None
            )
            if found is not None:
                self.task = found
                self.config = values["config"] if found.config is None else vars(found.config)
            elif function in ("_build_task", "process_cfg"):
                self.config = values.get("cfg", {})
            elif function == "_build_group":
                self.config = {**values["raw_cfg"], "task": values["group_name"]}
            elif function == "_build_group_members" and isinstance(overrides := values.get("item_overrides"), dict):
                entry = values["registry"].get(values["group_name"])
                self.group, self.overrides = (values["group_name"], str(entry.yaml_path) if entry else ""), overrides
            if function == "process_cfg":
                self.file = str(values["path"])
            elif function == "load_yaml" and not (self.field == "include" and isinstance(error, OSError)):
                self.file, self.field = str(values["path"]), "include" if "includes" in values else ""
            if str(frame.f_globals["__name__"]) == "lm_eval.config.group":
                self.field = "aggregate_metric_list"
                continue
            if function == "__init__" and "test_doc" not in values:
                self.field = next((field for word, field in _FIELD_OF_VARIABLE.items() if word in values), self.field)
            elif function.startswith("doc_to_") or function in _FIELD_OF_FUNCTION:
                self.field = _FIELD_OF_FUNCTION.get(function, function)
            self.doc = values.get("test_doc", values.get("doc", self.doc))
            self.row = 0 if "test_doc" in values else values.get("doc_id", self.row)
            if "fs_doc" in values:  # an example before the question, which has no number
                self.row = None
        self.name, file = _source(self.config)
        self.file = file or self.file

    def message(self) -> str:
        said = self._mistake() or (f"{self.field}: " if self.field else "") + _sentence(self.error)
        word = re.match(r"(?:unknown field )?(\w+)", said)
        if word and word[1] in self.overrides:
            self.name, self.file = self.group
        return _located(said, self.name, self.file, self.row)

    def _mistake(self) -> str | None:
        """The mistake, if a check of the task's values finds it."""
        if word := re.search(r"unexpected keyword argument '(\w+)'", str(self.error)):
            if self.field == "dataset_path":
                return f"dataset_kwargs: unknown option {word[1]}"
            if self.field == "aggregate_metric_list":
                return f"aggregate_metric_list: unknown option {word[1]}"
            return _unknown_field(word[1])
        try:
            check_types(self.config)
            if self.task is None or self.task.config is None:
                return None
            check_metrics(self.task)
            if self.doc is not None:
                check_row(self.task, self.doc)
        except UserError as error:
            return str(error)
        config = self.task.config
        if self.field == "dataset_path" and config.dataset_path is None:
            group, _, member = self.name.partition("::")
            return (
                f"there is no task {member!r}, which the group {group} names" if member else "dataset_path is missing"
            )
        if self.field == "dataset_path" and config.dataset_kwargs and repr(config.dataset_path) not in str(self.error):
            self.field = "dataset_kwargs"
        splits = getattr(self.task, "dataset", None)
        if isinstance(self.error, KeyError) and self.field.endswith("_split") and isinstance(splits, Mapping):
            return f"{self.field}: the data have no split {self.error.args[0]!r}, only {', '.join(map(str, splits))}"
        return None


def _field_of_code(task: ConfigurableTask, code: CodeType) -> str | None:
    """The field whose function, written by the user, has this code."""
    values = {} if task.config is None else vars(task.config)
    return next((name for name, value in values.items() if getattr(value, "__code__", None) is code), None)


def _source(config: Mapping[str, Any]) -> tuple[str, str]:
    """A task's name, and the file that it was read from if the user wrote it."""
    import lm_eval

    metadata = config.get("metadata")
    source = str(metadata.get("config_source", "inline")) if isinstance(metadata, dict) else "inline"
    own = source != "inline" and not source.startswith(
        (str(Path(lm_eval.__file__).parent), tempfile.gettempdir() + "/lm-eval-")
    )
    return str(config.get("task", "")), source if own else ""


def _located(message: str, name: str, file: str, row: int | None) -> str:
    parts = [file, f"task {name}" if name else "", "" if row is None else f"row {row + 1}"]
    return f"{', '.join(filter(None, parts)) or 'lm-eval'}: {message}"


def _unknown_field(name: str) -> str:
    from lm_eval.config.task import TaskConfig

    near = difflib.get_close_matches(name, [field.name for field in fields(TaskConfig)], n=1)
    return f"unknown field {name}" + (f"; did you mean {near[0]}?" if near else "")


def _sentence(error: BaseException) -> str:
    """An exception's message. Some need more words, or the exception that caused them."""
    cause = error.__cause__ or error.__context__
    if type(error).__name__ == "DatasetGenerationError" and cause is not None:
        return f"the data cannot be read: {_sentence(cause)}"
    if isinstance(error, StopIteration):  # as datasets reports an empty file
        return "the data have no rows"
    if (mark := getattr(error, "problem_mark", None)) is not None:  # of YAML
        return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'invalid YAML'}"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no file {error.filename}"
    message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if "larger than population" in message:
        return "there are fewer examples than --num_fewshot (--fewshot) asks for"
    if isinstance(error, KeyError) and " " not in message:
        return f"there is no {message!r}"
    if isinstance(error, ValueError | KeyError | OSError | AssertionError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else f"{type(error).__name__} without a message"


# ---------------------------------------------------------------------------------------------------------------------
# Checks


@contextlib.contextmanager
def checked_tasks(ours: bool = True) -> Iterator[None]:
    """Make the harness run `check_task` on each task before it runs a model. ``ours``: the model is recurrent_db.

    The harness has no hook between a task's requests and the model, so two of its methods are replaced meanwhile.
    """
    from lm_eval.api.task import ConfigurableTask, Task
    from lm_eval.tasks import TaskManager

    build, load = Task.build_all_requests, TaskManager.load

    def build_and_check(task: Task, **options: Any) -> None:
        build(task, **options)
        if type(task) is ConfigurableTask:  # subclasses have their own requests and results
            check_task(task, ours)

    def load_quietly(manager: TaskManager, *arguments: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the type of a field that is missing
            loaded = load(manager, *arguments)
        for name, group in loaded["groups"].items():
            entry = manager.task_index.get(name)
            check_group(group, f"{entry.yaml_path}, group {name}" if entry and entry.yaml_path else f"group {name}")
        return loaded

    Task.build_all_requests, TaskManager.load = build_and_check, load_quietly
    try:
        yield
    finally:
        Task.build_all_requests, TaskManager.load = build, load


def check_task(task: ConfigurableTask, ours: bool = True) -> None:
    """Raise `UserError` unless the task's metrics, all rows that it asks for, and its generation options are valid."""
    row = None
    try:
        check_metrics(task)
        _check_filters(task)
        for field, least in (("repeats", 1), ("num_fewshot", 0)):
            number = getattr(task.config, field)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < least):
                raise UserError(f"{field} must be a whole number of {least} or more, got {number!r}")
        if ours and task.OUTPUT_TYPE == "generate_until":
            request_options(task.instances[0].args[1])
        docs = {instance.doc_id: instance.doc for instance in task.instances}
        for row, doc in docs.items():  # noqa: B007  for the message
            check_row(task, doc)
        row = None
        _check_scored(task, task.instances[0].doc)
    except UserError as error:
        raise UserError(_located(str(error), *_source(vars(task.config)), row)) from None


def check_group(group: Group, place: str) -> None:
    """Raise `UserError`, naming ``place``, for a group without tasks or one that averages what none of its tasks has."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.group import AggMetricConfig

    tasks = group.get_all_tasks()
    if not tasks:
        raise UserError(f"{place}: task must be a list of at least one task")
    if any(type(task) is not ConfigurableTask for task in tasks):
        return  # others do not say what their metrics are
    metrics = {metric for task in tasks for metric in task.aggregation()}
    filters = {ensemble.name for task in tasks for ensemble in task._filters}
    for entry in group.aggregate_metric_list or []:
        if not isinstance(entry, AggMetricConfig):
            raise UserError(f"{place}: aggregate_metric_list must be a list of entries with metric, got {entry!r}")
        for what, asked, known in (("metric", [entry.metric], metrics), ("filter", entry.filter_list or [], filters)):
            if missing := [word for word in asked if word not in known]:
                raise UserError(f"{place}: aggregate_metric_list: no task has the {what} {missing[0]!r}")


def check_types(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a field whose value has another type than the harness declares for it."""
    from lm_eval.api.task import ALL_OUTPUT_TYPES
    from lm_eval.config.task import TaskConfig

    for field in fields(TaskConfig):
        if not field.name.startswith("doc_to_"):  # more types are in use than are declared
            _check_type(field.name, str(field.type), config.get(field.name, field.default))
    if (kind := config.get("output_type", "generate_until")) not in ALL_OUTPUT_TYPES:
        raise UserError(f"output_type must be one of {', '.join(ALL_OUTPUT_TYPES)}, got {kind!r}")


def check_options(options: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` for an option of the harness, read from ``source``, whose value has not the declared type."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    checked_elsewhere = ("batch_size", "max_batch_size", "seed")
    try:
        for field in fields(EvaluatorConfig):
            value = options.get(field.name)
            if value is not None and field.name not in checked_elsewhere:
                _check_type(field.name, str(field.type) + " | str" * (field.name == "gen_kwargs"), value)
        tasks = options.get("tasks")
        if isinstance(tasks, list) and not all(isinstance(name, str) for name in tasks):
            raise UserError(f"tasks must be a list of names, got {tasks!r}")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _check_type(name: str, declared: str, value: Any) -> None:
    """Raise `UserError` unless ``value`` has the type ``declared``. Types that this module does not know are not checked."""
    names = [word.partition("[")[0] for word in declared.split(" | ")]
    if not set(names) <= _TYPES.keys() or callable(value):
        return
    number_as_flag = isinstance(value, bool) and "bool" not in names
    if number_as_flag or not isinstance(value, tuple(_TYPES[word] for word in names)):
        raise UserError(f"{name} must be {' or '.join(names).replace('Callable', 'a function')}, got {value!r}")


def check_metrics(task: ConfigurableTask) -> None:
    """Raise `UserError` for a metric or an aggregation that does not exist. The harness leaves such a metric out."""
    if task.config.metric_list == []:
        raise UserError("metric_list names no metric")
    for name, metric in getattr(task, "_metric_fn_list", {}).items():
        if metric is None and task.config.process_results is None:
            raise UserError(f"metric_list: unknown metric {name!r}")
        if task._aggregation_list.get(name, "") is None:
            raise UserError(f"metric_list: metric {name!r} needs a known aggregation, such as mean")


def _check_filters(task: ConfigurableTask) -> None:
    """Raise `UserError` for filters that cannot be made, or that overwrite each other's results."""
    names = [ensemble.name for ensemble in task._filters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"filter_list: the name {twice.pop()!r} is used twice")
    for ensemble in task._filters:
        for make in ensemble.filters:
            try:
                make()
            except Exception as error:
                raise UserError(f"filter_list: filter {ensemble.name!r}: {_sentence(error)}") from None


def _check_scored(task: ConfigurableTask, doc: Any) -> None:
    """Raise `UserError` for a metric that this type of output does not have. The harness leaves such a metric out."""
    if task.config.process_results is not None or task.OUTPUT_TYPE == "generate_until":
        return
    answers = [-1.0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else (-1.0, False)]
    if task.OUTPUT_TYPE == "multiple_choice":
        answers *= len(task.doc_to_choice(doc)) * (1 + ("acc_mutual_info" in task._metric_fn_list))
    missing = task._metric_fn_list.keys() - task.process_results(doc, answers).keys()
    if missing:
        raise UserError(f"metric_list: {task.OUTPUT_TYPE} has no metric {sorted(missing)[0]!r}")


def check_row(task: ConfigurableTask, doc: Any) -> None:
    """Raise `UserError` unless the row gives texts, and a target that names one of its choices."""
    text, target = _value(task, "doc_to_text", doc), _value(task, "doc_to_target", doc)
    if not isinstance(text, str | int):
        raise UserError(f"doc_to_text must give a text, got {text!r}")
    if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling"):
        if not isinstance(target, str):
            raise UserError(f"doc_to_target must give a text, got {target!r}")
        if task.OUTPUT_TYPE == "loglikelihood" and not target:
            raise UserError("doc_to_target gives an empty text")
        return
    many = task.OUTPUT_TYPE == "multiple_choice"
    if not many and task.config.doc_to_choice is None:
        return
    choices = _value(task, "doc_to_choice", doc)
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"doc_to_choice must give a list of texts, got {choices!r}")
    if "" in choices:
        raise UserError(f"doc_to_choice gives an empty text as choice {choices.index('')}")
    if task.config.process_results is not None:
        return  # the task itself decides what is right
    # A number as the text is the index of the right choice, and the choices are the texts.
    field, named = ("doc_to_text", text) if isinstance(text, int) else ("doc_to_target", target)
    for label in named if isinstance(named, list) and named else [named]:
        by_text = many and isinstance(label, str) and label in choices
        by_number = isinstance(label, Integral) and label in range(len(choices))
        if isinstance(getattr(task.config, field), bool):  # YAML's yes, no, true and false: numbers to the harness
            by_text = by_number = False
        if not (by_text or by_number):
            raise UserError(f"{field} names none of the {len(choices)} choices: {label!r}")


def _value(task: ConfigurableTask, field: str, doc: Any) -> Any:
    """A field's value for a row. Raises `UserError` with the field's name."""
    given = getattr(task.config, field)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return getattr(task, field)(doc)
    except (SyntaxError, TypeError) as error:
        if given is None and task.config.use_prompt is None:
            raise UserError(f"{field} is missing") from None
        raise UserError(f"{field} has an invalid value: {error if callable(given) else repr(given)}") from None
    except Exception as error:
        if str(error).startswith("malformed node"):  # in the harness's ast.literal_eval
            raise UserError(f"{field} must give a list of texts, got {given!r}") from None
        raise UserError(f"{field}: {_sentence(error)}") from None
