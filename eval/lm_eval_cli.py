"""Run the lm-eval harness on a checkpoint, with tasks that need no network.

python eval/lm_eval_cli.py --model_args checkpoint=RUN,k=8 --tasks NAMES [--data DIR] [the harness's own options]

The default of --model is recurrent_db. Its model arguments:
  checkpoint     run directory or checkpoint folder
  k              core iterations (default 8)
  sigma          noise level at which a denoiser's inference starts (default: the run's sigma_max)
  draws          noise draws in a likelihood (default 1)
  max_length     longest input in tokens (default: the model's window)
  dtype          float32 (default) or bfloat16
  seed           seed of the noise and of sampling (default 0)
  prefix_reuse   compute shared prefixes of requests once (default true)
  cache          JSON Lines file that stores answers and reuses stored ones; --use_cache means the same
  sampler, exit  decoding strategy and early exit of generated text (recurrent_db/generation/options.py). Likelihoods always
                 take k iterations
--batch_size and --device are auto by default.

Tasks with --data DIR:
  heldout_cloze           made from the held-out text of a data directory (train/prepare_data.py); chance is 0.25
  heldout_last_word       made from the same text, in the style of LAMBADA
  arc_easy, piqa          DIR/arc_easy_validation.jsonl, DIR/piqa_validation.jsonl (_train and _test files are optional)
  blimp_PARADIGM, blimp   DIR/blimp/PARADIGM.jsonl; the group averages the paradigms in the folder
  lambada                 DIR/lambada_test.jsonl or DIR/lambada_validation.jsonl
Prompts and metrics are the harness's own. Any other name, and any name without --data, is the harness's task of that name,
which downloads its data.

The harness's options follow. --output_path writes the results as JSON.
"""

from __future__ import annotations

import os
import sys

# Set before the first import of tqdm, which reads it: the harness does not check for a terminal before it draws bars.
os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" else "1")

import argparse
import contextlib
import difflib
import io
import json
import logging
import logging.handlers
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from offline_tasks import OFFLINE, chosen, maker, offline_tasks, task_folder, task_name

from recurrent_db.arguments import run_and_exit
from recurrent_db.errors import UserError
from recurrent_db.files import expand_user
from recurrent_db.schema import MOST_INTEGER

MODEL = "recurrent_db"

# Fields of the harness's configuration that `simple_evaluate` takes under the same name.
PASSED_ON = (
    "model", "model_args", "tasks", "num_fewshot", "batch_size", "max_batch_size", "device", "use_cache", "limit",
    "samples", "check_integrity", "write_out", "log_samples", "system_instruction", "apply_chat_template",
    "fewshot_as_multiturn", "gen_kwargs", "predict_only", "confirm_run_unsafe_code", "metadata",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Path | None]:
    """Parse the harness's options and --data. Raises UserError, in one line, where the harness would print its usage."""
    ours = _Parser(add_help=False, allow_abbrev=False)
    ours.add_argument("--data", type=lambda text: Path(expand_user(text)))
    known, rest = ours.parse_known_args(list(argv))
    try:
        from lm_eval._cli import HarnessCLI
    except ImportError as error:
        raise UserError(f'the lm-eval harness is not installed ({error}): pip install "recurrent-db[eval]"') from None
    if not rest or rest[0] not in ("run", "ls", "validate"):
        if not rest or {"-h", "--help"} & set(rest):
            print(__doc__)
            rest = ["--help"]
        rest = ["run", *rest]
    stderr, saved = io.StringIO(), sys.argv
    try:
        sys.argv = ["lm_eval_cli.py", *rest]
        with contextlib.redirect_stderr(stderr):
            return HarnessCLI().parse_args(), known.data
    except SystemExit as stop:
        if not stop.code:
            raise
        said = stderr.getvalue().strip().rsplit("error: ", 1)[-1]
        raise UserError(re.sub(r"invalid functools\.partial\(.*\) value", "invalid value", said)) from None
    except ValueError as error:  # of an option whose value is JSON
        raise UserError(str(error)) from None
    finally:
        sys.argv = saved


def fill_defaults(args: argparse.Namespace, file: dict[str, Any]) -> None:
    """Fill in our model's defaults, in place, for arguments that neither the options nor the --config ``file`` set."""
    if args.model is None and "model" not in file:
        args.model = MODEL
    if (args.model or file.get("model")) != MODEL:
        return
    if args.model_args is None and isinstance(file.get("model_args"), dict):
        args.model_args = dict(file["model_args"])
    model_args = args.model_args or {}
    for name, default in (("device", "auto"), ("batch_size", "auto"), ("max_batch_size", None)):
        given = getattr(args, name, None)
        if name in model_args:
            if given is not None:
                raise UserError(f"{name} is given twice, as --{name} and in --model_args")
            given = model_args.pop(name)
        if given is None and name not in file:
            given = default
        if given is not None:
            setattr(args, name, given)
    # The harness's own cache unpickles the file's contents, and does not record which model gave the answers.
    if file.get("use_cache"):
        raise UserError("use_cache in the --config file is not supported: set cache in its model_args instead")
    if args.use_cache:
        if "cache" in model_args:
            raise UserError("the answer cache is given twice, as --use_cache and as the model argument cache")
        args.model_args = {**model_args, "cache": args.use_cache}
        args.use_cache = None


# ---------------------------------------------------------------------------------------------------------------------
# Running


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Show only the harness's warnings, and not even these if the run ends in a user error, which prints one line.

    The environment variable LMEVAL_LOG_LEVEL restores the harness's own logging.
    """
    if os.environ.get("LMEVAL_LOG_LEVEL"):
        from lm_eval.utils import setup_logging

        setup_logging()
        yield
        return
    logger = logging.getLogger("lm_eval")
    printer = logging.StreamHandler(sys.stderr)
    printer.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    held = logging.handlers.MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, target=printer, flushOnClose=False)
    logger.addHandler(held)
    logger.propagate = False
    logger.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        yield
        held.flush()
    finally:
        logger.removeHandler(held)


def _is_word(name: bytes, content: bytes) -> bool:
    return name in content and re.search(rb"(?<![\w.-])" + re.escape(name) + rb"(?![\w.-])", content) is not None


def check_names(names: Sequence[str], include_path: str | None) -> None:
    """Raise UserError for a task name that occurs in no task file of the harness or of ``include_path``.

    The harness reports this too, but only after parsing 14,000 files, which takes a quarter of a minute. This search takes a
    second. Patterns and paths are left to the harness.
    """
    import lm_eval

    missing = {name for name in names if re.fullmatch(r"[\w.-]+", name) and not Path(name).exists()}
    missing -= check_files(missing, include_path)
    for folder, _, files in os.walk(Path(lm_eval.__file__).parent / "tasks"):
        if not missing:
            return
        for file in files:
            if not file.endswith((".py", ".md")):
                content = Path(folder, file).read_bytes()
                missing -= {name for name in missing if _is_word(name.encode(), content)}
    if missing:
        raise UserError("lm-eval: Tasks not found: " + ", ".join(name for name in names if name in missing))


def check_files(names: set[str], include_path: str | None) -> set[str]:
    """Read the files of ``include_path`` in which some of ``names`` occur, and return these names.

    The harness leaves out a file that it cannot read, and the second file that defines a task.

    Raises:
        UserError: such a file is no valid task file, or two of them define the same task.
    """
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    from recurrent_db.evaluation.lm_eval_tasks import user_errors

    found: set[str] = set()
    files: dict[str, Path] = {}
    for path in TaskIndex._iter_yaml_files(Path(include_path)) if include_path else ():
        content = path.read_bytes()
        if not (here := {name for name in names if _is_word(name.encode(), content)}):
            continue
        found |= here
        defined: dict[str, Any] = {}
        with user_errors():
            config = load_yaml(path, resolve_func=False)
            check_keys(path)
            if {"task", "group", "class"} & config.keys():  # otherwise other files include it
                TaskIndex.process_cfg(config, path, defined)
        for name in [name for name, entry in defined.items() if entry.yaml_path and name in names]:
            if name in files:
                raise UserError(f"task {name} is defined twice, in {files[name]} and {path}")
            files[name] = path
    return found


def check_keys(path: Path) -> None:
    """Raise UserError if a mapping of a YAML file has a key twice. The harness takes the last one."""
    import yaml

    todo = [yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    raise UserError(f"{path}: the field {key} is there twice")
            todo += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def check_numbers(config: Any) -> None:
    """Raise UserError for invalid numbers that the harness accepts, or reports without naming the option."""
    if config.limit is not None and not 0 < config.limit <= MOST_INTEGER:
        raise UserError(f"--limit must be above 0 and at most {MOST_INTEGER}, got {config.limit:g}")
    rows = {} if config.samples is None else config.samples
    if not isinstance(rows, dict) or not all(
        isinstance(numbers, list) and all(isinstance(number, int) and number >= 0 for number in numbers)
        for numbers in rows.values()
    ):
        raise UserError(f'--samples must list rows by task, such as {{"piqa": [0, 1]}}, got {rows!r}')
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise UserError(f"--num_fewshot must be 0 or more, got {config.num_fewshot}")


def check_output(path: str | None) -> None:
    """Raise UserError if results cannot be written to ``path``. The harness notices only after the run."""
    if path is None:
        return
    folder = Path(path).parent if path.endswith(".json") else Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output_path {path}: {error.strerror or error}") from None


def saved_since(output: Path, moment: float) -> bool:
    """Whether a complete results file was written under ``output`` after ``moment`` (seconds since the epoch)."""
    folder = output.parent if output.suffix == ".json" else output
    for path in folder.rglob("*.json"):
        # Two seconds of slack, because file systems round times down.
        if path.stat().st_mtime >= moment - 2:
            try:
                if "results" in json.loads(path.read_text(encoding="utf-8")):
                    return True
            except (ValueError, TypeError):
                continue
    return False


def evaluate(config: Any, folder: Path) -> None:
    """Do the same as the harness's ``run``, but load only the tasks of ``folder``: indexing all 14,000 files is slow."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table, sanitize_model_name

    started = time.time()
    tracker = EvaluationTracker(output_path=config.output_path)
    results = simple_evaluate(
        **{name: getattr(config, name) for name in PASSED_ON},
        **config.cache_requests,
        **dict(
            zip(
                ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"),
                config.seed or [None] * 4,
                strict=True,
            )
        ),
        evaluation_tracker=tracker,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, metadata=config.metadata),
    )
    if results is None or os.environ.get("RANK", "0") != "0":  # the harness takes the first process of each machine
        return
    samples = results.pop("samples") if config.log_samples else None
    # The harness names the results folder after arguments that our model does not have.
    name = str(config.model_args.get("checkpoint", config.model))
    tracker.general_config_tracker.model_name = name
    tracker.general_config_tracker.model_name_sanitized = sanitize_model_name(name)
    tracker.save_results_aggregated(results=results, samples=samples)
    if config.output_path is not None and not saved_since(Path(config.output_path), started):
        # The harness only logs this error and continues.
        raise UserError(f"the results could not be saved under --output_path {config.output_path}: is the disk full?")
    for task, rows in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=rows)
    if config.show_config:
        print(json.dumps(results, indent=2, default=str, ensure_ascii=False))
    print(
        f"{config.model} ({config.model_args}), gen_kwargs: ({config.gen_kwargs}), limit: {config.limit}, "
        f"num_fewshot: {config.num_fewshot}, batch_size: {config.batch_size}"
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))


def run(args: argparse.Namespace, data: Path | None) -> None:
    """Run the harness with the offline tasks added to its own."""
    if args.tasks and all(maker(name) for name in args.tasks) and data is not None:
        # The libraries read these variables on import. Offline tasks need no download and no lookup of their names.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import lm_eval.models  # noqa: F401  the harness's own models keep their names
    from lm_eval.config.evaluate_config import EvaluatorConfig

    import recurrent_db.evaluation.lm_eval_model  # noqa: F401  registers recurrent_db
    from recurrent_db.evaluation.lm_eval_tasks import check_options, checked_tasks, user_errors

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions too
    mistakes: tuple[type[Exception], ...] = (
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        ConnectionError,
        FileNotFoundError,
        datasets.exceptions.DatasetsError,
    )
    with user_errors(*mistakes):
        options = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
        if args.config:
            check_keys(Path(args.config))
            check_options(options, args.config)
        fill_defaults(args, options)
        config = EvaluatorConfig.from_cli(args)
    check_numbers(config)
    check_output(config.output_path)
    given = [config.tasks] if isinstance(config.tasks, str) else config.tasks
    names = [name for names in given for name in names.split(",") if name]
    if not names:
        raise UserError("--tasks names no task; the offline tasks are " + ", ".join(OFFLINE))
    offline = offline_tasks(names, data)
    services = (config.wandb_args, config.trackio_args, config.hf_hub_log_args, config.include_path)
    with task_folder(offline) as folder:
        config.tasks = args.tasks = chosen(names, offline)
        if offline and set(config.tasks) <= set(map(task_name, offline)) and not any(services):
            datasets.config.HF_DATASETS_CACHE = folder / "cache"
            with user_errors(*mistakes), checked_tasks(config.model == MODEL):
                evaluate(config, folder)
            return
        if offline:
            args.include_path = [*([config.include_path] if config.include_path else []), str(folder)]
            logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)  # our tasks replace its own on purpose
        try:
            check_names([name for name in names if data is None or not maker(name)], config.include_path)
            with user_errors(*mistakes), checked_tasks(config.model == MODEL):
                args.func(args)
        except UserError as error:
            local = [name for name in names if maker(name)] if data is None else []
            near = difflib.get_close_matches(next((n for n in names if not maker(n)), ""), OFFLINE, n=1)
            hint = f" (with --data DIR, {local[0]} is read from local files)" if local else ""
            raise UserError(f"{error}{hint}{f'; did you mean {near[0]}?' if near else ''}") from None


def main(argv: Sequence[str] | None = None) -> int:
    args, data = parse(sys.argv[1:] if argv is None else argv)
    with quiet_harness():
        if args.command == "run":
            run(args, data)
        else:
            if args.command == "validate":
                check_files(set(args.tasks.split(",")), args.include_path)
            args.func(args)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
