"""Input and output of the interactive session: lines, colours, columns, UTF-8 and Ctrl-C.

At a terminal, lines are read with prompt_toolkit (editing, a history file, pasting of several lines), or with `input` if it
is not installed. From a pipe or a file they are read one by one. Generated text goes to standard output, messages to
standard error.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from recurrent_db.arguments import one_line
from recurrent_db.errors import UserError

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
PROMPT, MORE = "> ", ". "


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def shows_colours() -> bool:
    """Whether standard output shows colours: it is a terminal with colours and NO_COLOR is unset (https://no-color.org)."""
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, *codes: str) -> str:
    """Colour ``text`` with ANSI codes if standard output shows colours."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and shows_colours() else text


def remark(text: str) -> None:
    """Print a one-line message to standard error, which keeps it apart from generated text."""
    sys.stdout.flush()
    print(paint(text, DIM) if is_terminal(sys.stderr) else text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Print a one-line error message to standard error."""
    sys.stdout.flush()
    text = one_line(text)
    print(paint(text, RED) if is_terminal(sys.stderr) else text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Text


def visible_controls(text: str) -> str:
    """Replace control characters, except line feed and tab, by visible symbols, so that a text cannot control a terminal."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]",
        lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else "\u2421" if m[0] == "\x7f" else "\ufffd",
        text,
    )


class Utf8Writer:
    """Writes UTF-8 bytes to standard output as they arrive, whole characters only. Invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._last = "\n"

    def add(self, piece: bytes, final: bool = False) -> None:
        text = self._decoder.decode(piece, final)
        if text:
            self._last = text[-1]
            sys.stdout.write(visible_controls(text) if is_terminal(sys.stdout) else text)
            sys.stdout.flush()

    def end(self) -> None:
        """Write an incomplete last character as U+FFFD, and a line break if the text does not end with one."""
        self.add(b"", final=True)
        if self._last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()


def width_of(text: str) -> int:
    """Number of terminal columns of a text without control characters."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` columns, without regard to words."""
    lines = []
    for raw in visible_controls(text).split("\n"):
        line, used = "", 0
        for character in raw:
            character = " " * (4 - used % 4) if character == "\t" else character
            columns = width_of(character)
            if used + columns > width:
                lines.append(line)
                line, used = "", 0
            line, used = line + character, used + columns
        lines.append(line)
    return lines


def side_by_side(heads: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Lay out texts in columns below their headings, ``width`` columns in total."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[head, "-" * each, *wrapped(text, each)] for head, text in zip(heads, texts, strict=True)]
    rows = []
    for number in range(max(map(len, columns))):
        cells = [column[number] if number < len(column) else "" for column in columns]
        padded = [cell + " " * (each - width_of(cell)) for cell in cells]
        rows.append(" | ".join(paint(cell, BOLD) if number == 0 else cell for cell in padded).rstrip())
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------
# Lines


def state_file(name: str) -> Path:
    """A file in the user's state directory (XDG_STATE_HOME; LOCALAPPDATA on Windows). Creates it and its folder.

    Raises:
        OSError, RuntimeError: the file cannot be written, or the user has no home directory.
    """
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME")
    folder = (Path(root) if root else Path.home() / ".local" / "state") / "recurrent_db"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    path.touch(mode=0o600)
    return path


def decode_line(line: str) -> str:
    """Decode a line that was read with surrogate escapes. Raises `UserError` if it is not valid UTF-8."""
    raw = b""
    try:
        raw = line.encode("utf-8", errors="surrogateescape")
        return raw.decode("utf-8")
    except UnicodeError as error:
        found = error.start if isinstance(error, UnicodeDecodeError) else 0
        what = f"byte {found + 1} is 0x{raw[found]:02x}" if raw else "it has half of a character"
        raise UserError(f"the input is not UTF-8, so it is ignored: {what}") from None


class Lines(Protocol):
    """A source of input lines."""

    def answering(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the session reads and answers lines."""
        ...

    def read(self) -> str:
        """The next line, or several lines at once, without the final line break.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: the user pressed Ctrl-C.
            UserError: the input is not UTF-8.
        """
        ...


class PlainLines:
    """Reads lines with `input`. A line of three double quotes starts a text of several lines; another one ends it."""

    def __init__(self) -> None:
        self._asks = is_terminal(sys.stdin)
        encoding = "utf-8" if self._asks else "utf-8-sig"  # a piped file may begin with a byte order mark
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")  # type: ignore[union-attr]

    def answering(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _line(self, prompt: str) -> str:
        if self._asks and not is_terminal(sys.stdout):
            print(prompt, end="", file=sys.stderr, flush=True)
        return input(prompt if self._asks and is_terminal(sys.stdout) else "")

    def read(self) -> str:
        line = self._line(PROMPT)
        if line.strip() != '"""':
            return decode_line(line)
        lines: list[str] = []
        with contextlib.suppress(EOFError):
            while (line := self._line(MORE)).strip() != '"""':
                lines.append(line)
        return decode_line("\n".join(lines))


class EditedLines:
    """Reads lines with prompt_toolkit. Raises ImportError if it is not installed.

    Enter sends, Alt-Enter starts a new line, pasted lines stay together, the arrow keys go through the history, and Tab
    completes ``words``.
    """

    def __init__(self, words: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        try:
            history: History = FileHistory(str(state_file("history")))
        except (OSError, RuntimeError) as error:
            remark(f"the history is not saved: {error}")
            history = InMemoryHistory()
        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            PROMPT, multiline=True, prompt_continuation=MORE, key_bindings=keys, history=history,
            completer=WordCompleter(list(words), sentence=True), complete_while_typing=False, reserve_space_for_menu=0,
        )  # fmt: skip

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Hide keys that are pressed while text is generated, and keep them for the next line. This includes Ctrl-D, which
        the terminal would discard. Ctrl-C still works at once."""
        try:
            import termios
        except ImportError:  # Windows
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        kept = termios.tcgetattr(sys.stdin)
        kept[0] &= ~termios.ICRNL  # Enter sends the same character as at the prompt
        kept[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def read(self) -> str:
        return decode_line(self._session.prompt())


def open_lines(words: Sequence[str]) -> Lines:
    """The best line reader for standard input and output. Raises `UserError` if standard input is closed."""
    if sys.stdin is None:
        raise UserError("standard input is closed, so no prompt can be read")
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        try:
            return EditedLines(words)
        except ImportError:
            remark("prompt_toolkit is not installed, so there is no history: pip install 'recurrent-db[repl]'")
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives `input` line editing
    return PlainLines()


# ---------------------------------------------------------------------------------------------------------------
# Ctrl-C


class Interrupts:
    """At a terminal, Ctrl-C raises KeyboardInterrupt once inside `allowed` and is ignored elsewhere, so it never ends the
    program. In a pipe it always raises KeyboardInterrupt, and `check` raises it again after a text that it stopped."""

    def __init__(self) -> None:
        self._armed = False
        self._ends = not is_terminal(sys.stdin)
        self._came = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed or self._ends:
            self._armed, self._came = False, True
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if an interrupt came that must end the program."""
        if self._ends and self._came:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let the next Ctrl-C raise KeyboardInterrupt."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT in this context, and restore the old handler after it."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
