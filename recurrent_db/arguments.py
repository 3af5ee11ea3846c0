"""Command-line parsing, shared by all commands: typed arguments, one-line errors, exit status 2.

A command is a dataclass of arguments and a function. ``run_command(Args, main)`` parses the arguments, runs the function,
and prints a user's mistake as one line on standard error. Numbers, lists and bounds are those of `schema`. tyro does the
rest of the parsing; its multi-line errors are folded into one line.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from recurrent_db.errors import UserError
from recurrent_db.schema import Section, check_bounds, expand_paths, from_words, plain_type

Args = TypeVar("Args")

_BOX = re.compile(r"[╭╮╰╯│─]+")


def fold_error_box(text: str) -> str:
    """Fold tyro's error box into one line: the message, then suggestions if there are any."""
    message: list[str] = []
    hints: list[str] = []
    section = message
    for raw in text.splitlines()[1:]:
        if set(raw.strip()) <= set("│─╰╯ ╭╮"):
            section = []  # the message has ended; help text follows, which --help shows better
            continue
        line = " ".join(_BOX.sub(" ", raw).split())
        if line.startswith("Perhaps you meant"):
            section = hints
        elif section is not hints:
            section.append(line)
        elif line.startswith("--"):
            hints.append(line.split()[0])
    folded = re.sub(r"^Error parsing (\S+): takes", r"\1 takes", " ".join(message)) or "bad arguments"
    folded = re.sub(r"^Missing value for argument '(\S+)'.*", r"\1 needs a value", folded)
    return folded + (f"; did you mean {' or '.join(hints[:2])}?" if hints else "")


def _options(kind: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """The options of a dataclass and of the dataclasses inside it, as typed on the command line, and their types."""
    for name, hint in typing.get_type_hints(kind).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _options(typing.cast(type, hint), option + ".")
        else:
            yield option, hint


_NUMBERS = re.compile(r"[][,.0-9_eE+-]*[0-9][][,.0-9_eE+-]*")
"""A part of a list of numbers."""


def _is_number_list(kind: Any) -> bool:
    kind = plain_type(kind)
    return get_origin(kind) in (list, tuple) and plain_type(get_args(kind)[0]) in (int, float)


def _regular(kind: type, given: Sequence[str]) -> list[str]:
    """The words of a command line, with ``true`` after each flag that has no value and each list of numbers in one word."""
    options, words = dict(_options(kind)), list[str]()
    value: int | None = None
    """Index in ``words`` of the list of numbers that the next word may continue."""
    for word, following in itertools.zip_longest(given, given[1:], fillvalue="--"):
        if value is not None and value < len(words):
            if _NUMBERS.fullmatch(word):
                words[value] += f",{word}"
                continue
            value = None
        words.append(word)
        option, equals, _ = word.partition("=")
        hint = options.get(option.replace("_", "-"))
        if hint is bool and not equals and following.startswith("-"):
            words.append("true")
        elif word.startswith("--"):
            value = len(words) - bool(equals) if _is_number_list(hint) else None
    return words


def listed(values: Iterable[float | str]) -> str:
    """The values of a list as one word of a command line."""
    return ",".join(map(str, values))


def _spec(kind: Any) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads and shows a value that `schema.from_words` understands."""

    def shown(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [f"{name}={number}" for name, number in value.items()]
        if isinstance(value, list | tuple):
            return [listed(value)] if value else []
        return [str(value).lower() if isinstance(value, bool) else str(value)]

    def metavar(kind: Any) -> str:
        kind = plain_type(kind)
        inside = get_args(kind)
        if get_origin(kind) is Literal:
            return "{" + ",".join(map(str, inside)) + "}"
        if get_origin(kind) in (list, tuple):
            return f"{metavar(inside[0])},..."
        if get_origin(kind) is dict:
            return f"NAME={metavar(inside[1])},..."
        return {bool: "{true,false}", str: "NAME"}.get(kind, kind.__name__.upper())

    nargs: Any = "*" if get_origin(plain_type(kind)) is dict else 1
    return PrimitiveConstructorSpec(nargs, metavar(kind), lambda words: from_words(words, kind), lambda _: True, shown)


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, flags, choices, tables and lists of numbers or choices. tyro reads the rest."""
    kind = plain_type(info.type)
    item = plain_type(get_args(kind)[0]) if get_origin(kind) in (list, tuple) else kind
    if item in (int, float, bool) or get_origin(item) in (Literal, dict):
        return _spec(info.type)
    return None


Names = Annotated[tuple[str, ...], _spec(tuple[str, ...])]
"""Type of an option that takes names separated by commas."""


@functools.cache
def _classes(path: str) -> tuple[list[str], dict[str, int]]:
    """The lines of a Python file, and for each class the index of its first line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    found = (node for node in ast.parse("".join(lines)).body if isinstance(node, ast.ClassDef))
    return lines, {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 for node in found}


@contextlib.contextmanager
def _quick_sources() -> Iterator[None]:
    """Make `inspect` parse each file once, instead of once per class.

    tyro reads field docstrings through `inspect`, which before Python 3.13 parses the whole file for each class. With many
    sections that is more than half of the time of ``--help``.
    """
    before = inspect.findsource

    def find(component: Any) -> tuple[list[str], int]:
        module = sys.modules.get(getattr(component, "__module__", ""))
        if inspect.isclass(component) and (path := getattr(module, "__file__", None)) is not None:
            lines, starts = _classes(path)
            if component.__qualname__ in starts:
                return lines, starts[component.__qualname__]
        return before(component)

    inspect.findsource = find  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.findsource = before


def parse(
    kind: type[Args], argv: Sequence[str] | None = None, default: Args | None = None, prog: str | None = None
) -> Args:
    """Parse command-line arguments into the dataclass ``kind``.

    Flags are written ``--flag``, ``--flag true`` or ``--flag false``; numbers ``16384``, ``16_384`` or ``1.6e4``; lists of
    numbers ``1,4`` or ``1 4``. ``~`` in a path is the home directory. ``--help`` prints the help and exits with status 0.

    Args:
        kind: the dataclass. The bounds of its fields are checked, except in a `Section`, which is checked as a whole later.
        argv: the arguments; ``sys.argv[1:]`` by default.
        default: values of options that are not given, instead of the dataclass's defaults.
        prog: the program's name in ``--help``.

    Raises:
        UserError: an option is unknown, a value is invalid, or an argument is missing; one line.
    """
    words = _regular(kind, sys.argv[1:] if argv is None else argv)
    stderr = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr), _quick_sources():
            args = tyro.cli(
                kind, args=words, prog=prog, config=(tyro.conf.FlagConversionOff,), registry=_REGISTRY, **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(fold_error_box(stderr.getvalue())) from None
    expand_paths(args)
    if not isinstance(args, Section):
        check_bounds(args, "--")
    return args


OTHERS_WAIT = 20.0
"""Seconds that processes of torchrun other than the first wait before they report a mistake."""


MOST_LINE = 1000
"""Largest number of characters in an error line. Messages may quote long parts of files."""


def one_line(message: str) -> str:
    """A message as one printable line.

    White space is folded. Unprintable characters, such as control characters that a terminal would obey, become U+FFFD. The
    middle of a line longer than `MOST_LINE` is left out.
    """
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message[: 1 << 20].split()))
    half = MOST_LINE // 2 - 3
    return line if len(line) <= MOST_LINE else f"{line[:half]} ... {line[-half:]}"


def fail(message: str) -> NoReturn:
    """Print ``message`` as one line and exit with status 2.

    Under torchrun all processes usually make the same mistake. Only the first prints it; it ends, and torchrun ends the
    others. A process that still runs after `OTHERS_WAIT` seconds is the only one with its mistake and prints it.
    """
    who = "error"
    if (rank := os.environ.get("RANK", "0")) != "0":
        time.sleep(OTHERS_WAIT)
        who = f"error (process {rank})"
    print(f"{who}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def run_and_exit(action: Callable[[], int | None]) -> NoReturn:
    """Run ``action`` and exit with its status. A `UserError`, a full disk, an unwritable path or Ctrl-C prints one line
    instead of a traceback."""
    try:
        raise SystemExit(action() or 0)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of the output (head, less) has ended, which is no mistake. With stdout on /dev/null, the flush at exit
        # does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"no space left on the disk of {error.filename or 'the output folder'}; complete files are kept")
        if error.filename is not None:
            fail(f"{error.filename}: {error.strerror}")
        raise


def run_command(kind: type[Args], main: Callable[[Args], int | None]) -> NoReturn:
    """Parse the command line into ``kind``, run ``main`` on it and exit."""
    run_and_exit(lambda: main(parse(kind)))
