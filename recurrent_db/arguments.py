"""Command-line parsing, shared by all commands: typed arguments, one-line errors, exit status 2.

A command is a dataclass of arguments and a function. ``run_command(Args, main)`` parses the arguments, runs the function,
and prints a user's mistake as one line on standard error. tyro does the parsing; its multi-line errors are folded into one
line.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from recurrent_db.errors import UserError

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
    folded = " ".join(message) or "bad arguments"
    return folded + (f"; did you mean {' or '.join(hints[:2])}?" if hints else "")


def _flags(kind: type, prefix: str = "--") -> Iterator[str]:
    """The boolean options of a dataclass and of the dataclasses inside it, as typed on the command line."""
    for name, hint in typing.get_type_hints(kind).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), option + ".")
        elif hint is bool:
            yield option


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

    Booleans are written ``--flag``, ``--flag true`` or ``--flag false``. ``--help`` prints the help and exits with status 0.

    Args:
        kind: the dataclass.
        argv: the arguments; ``sys.argv[1:]`` by default.
        default: values of options that are not given, instead of the dataclass's defaults.
        prog: the program's name in ``--help``.

    Raises:
        UserError: an option is unknown, a value is invalid, or an argument is missing; one line.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    flags = set(_flags(kind))
    words = []
    for word, following in itertools.zip_longest(given, given[1:], fillvalue="--"):
        words.append({"true": "True", "false": "False"}.get(word, word))
        if word.replace("_", "-") in flags and following.startswith("-"):
            words.append("True")
    stderr = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr), _quick_sources():
            return tyro.cli(kind, args=words, prog=prog, config=(tyro.conf.FlagConversionOff,), **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(fold_error_box(stderr.getvalue())) from None


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


def parse_ints(text: str, option: str, least: int) -> list[int]:
    """Parse integers separated by commas. Returns them in rising order without repeats.

    Args:
        text: the option's value.
        option: the option's name, for error messages.
        least: smallest integer allowed.

    Raises:
        UserError: ``text`` is anything else, or an integer is below ``least``.
    """
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UserError(f"{option} takes whole numbers separated by commas, got {text!r}") from None
    if values[0] < least:
        raise UserError(f"{option} must be {least} or more, got {values[0]}")
    return values
