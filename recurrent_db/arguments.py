"""What every command of the project shares: typed arguments, one-line errors, exit status 2.

A command is a dataclass of arguments plus a function; ``run_command(Args, main)`` parses, runs and turns a
user's mistake into one line on standard error. Parsing is tyro's; only its error boxes are folded into a line.
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
    """Fold tyro's boxed message into one line: the message, then its suggestions where it has any."""
    message: list[str] = []
    hints: list[str] = []
    section = message
    for raw in text.splitlines()[1:]:
        if set(raw.strip()) <= set("│─╰╯ ╭╮"):
            section = []  # past the message: helptext, which --help shows better
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
    """The boolean options of a dataclass and of those inside it, as they are typed."""
    for name, hint in typing.get_type_hints(kind).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), option + ".")
        elif hint is bool:
            yield option


@functools.cache
def _classes(path: str) -> tuple[list[str], dict[str, int]]:
    """The lines of a Python file, and the index of the line where each of its classes begins."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    found = (node for node in ast.parse("".join(lines)).body if isinstance(node, ast.ClassDef))
    return lines, {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 for node in found}


@contextlib.contextmanager
def _quick_sources() -> Iterator[None]:
    """Make `inspect` parse a file once for the sources of all its classes. tyro reads the help there, class by class, and
    Python before 3.13 parses the whole file for each: more than half of the time of ``--help`` with many sections."""
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
    """Parse ``argv`` (``sys.argv[1:]`` by default) into the dataclass ``kind``.

    Booleans are written ``--flag``, ``--flag true`` or ``--flag false``. ``--help`` prints and exits 0.

    Raises:
        UserError: for an unknown option, a bad value or a missing argument, in one line.
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
"""Seconds after which a process other than torchrun's first reports its own mistake."""


MOST_LINE = 1000
"""Characters of a mistake's line; what a message quotes of a file may be longer."""


def one_line(message: str) -> str:
    """A message as one line that only says something: white space folded, and what is not printable (control characters,
    which could command a terminal, lone surrogates) as U+FFFD; of a long one the two ends."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message[: 1 << 20].split()))
    half = MOST_LINE // 2 - 3
    return line if len(line) <= MOST_LINE else f"{line[:half]} ... {line[-half:]}"


def fail(message: str) -> NoReturn:
    """Print ``message`` as one line and leave with status 2.

    Of several processes (torchrun's RANK) the first speaks: it ends, and torchrun ends the others, who wait for that. One
    that is still there after `OTHERS_WAIT` is alone with its mistake, and says so.
    """
    who = "error"
    if (rank := os.environ.get("RANK", "0")) != "0":
        time.sleep(OTHERS_WAIT)
        who = f"error (process {rank})"
    print(f"{who}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def run_and_exit(action: Callable[[], int | None]) -> NoReturn:
    """Run ``action``; a `UserError`, a full disk, an unwritable path or Ctrl-C ends in one line instead of a traceback."""
    try:
        raise SystemExit(action() or 0)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader (head, less) went away: not a mistake. Point stdout at nothing so that the exit flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"no space left on the disk of {error.filename or 'the output folder'}; what was complete is kept")
        if error.filename is not None:
            fail(f"{error.filename}: {error.strerror}")
        raise


def run_command(kind: type[Args], main: Callable[[Args], int | None]) -> NoReturn:
    """Parse the command line into ``kind``, run ``main`` on it and exit."""
    run_and_exit(lambda: main(parse(kind)))


def parse_ints(text: str, option: str, least: int) -> list[int]:
    """Integers separated by commas, in rising order without repeats. Raises `UserError` for anything else."""
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UserError(f"{option} takes whole numbers separated by commas, got {text!r}") from None
    if values[0] < least:
        raise UserError(f"{option} must be {least} or more, got {values[0]}")
    return values
