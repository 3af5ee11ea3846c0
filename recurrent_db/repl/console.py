"""What an interactive command shows and reads: colour, columns, whole characters, lines, Ctrl-C.

At a terminal lines come through prompt_toolkit (history in a file, editing, pasting of several lines), or through `input`
where it is not installed; from a pipe or a file they are read one by one. Text goes to standard output, remarks to
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


def colourful() -> bool:
    """Whether standard output shows colours: a terminal that can, and no NO_COLOR (https://no-color.org)."""
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, *codes: str) -> str:
    """``text`` in a colour or face, where standard output shows them."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and colourful() else text


def remark(text: str) -> None:
    """One line about what goes on, on standard error: it is no part of the texts."""
    sys.stdout.flush()
    print(paint(text, DIM) if is_terminal(sys.stderr) else text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """One line about what was wrong."""
    sys.stdout.flush()
    text = one_line(text)
    print(paint(text, RED) if is_terminal(sys.stderr) else text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Text


def harmless(text: str) -> str:
    """Control characters but line feed and tab as pictures, so that a text cannot command a terminal."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]",
        lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else "\u2421" if m[0] == "\x7f" else "\ufffd",
        text,
    )


class Utf8Writer:
    """Writes bytes to standard output as they come, never half of a character; bytes that are not UTF-8 as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._last = "\n"

    def add(self, piece: bytes, final: bool = False) -> None:
        text = self._decoder.decode(piece, final)
        if text:
            self._last = text[-1]
            sys.stdout.write(harmless(text) if is_terminal(sys.stdout) else text)
            sys.stdout.flush()

    def end(self) -> None:
        """What is left of a character, and a line's end where there is none."""
        self.add(b"", final=True)
        if self._last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()


def width_of(text: str) -> int:
    """Columns that a text without control characters takes on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, cut where they are full."""
    lines = []
    for raw in harmless(text).split("\n"):
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
    """Texts in columns under their heads, ``width`` wide together."""
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
    """A file in the user's state directory (XDG_STATE_HOME; on Windows LOCALAPPDATA); its folder is made.

    Raises:
        OSError, RuntimeError: there is none that can be written.
    """
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME")
    folder = (Path(root) if root else Path.home() / ".local" / "state") / "recurrent_db"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    path.touch(mode=0o600)
    return path


def as_text(line: str) -> str:
    """A line that was read with surrogates for what is not UTF-8. Raises `UserError` where there is such a byte."""
    raw = b""
    try:
        raw = line.encode("utf-8", errors="surrogateescape")
        return raw.decode("utf-8")
    except UnicodeError as error:
        found = error.start if isinstance(error, UnicodeDecodeError) else 0
        what = f"byte {found + 1} of it is 0x{raw[found]:02x}" if raw else "it has half of a character"
        raise UserError(f"what came in is not UTF-8, so nothing was done with it: {what}") from None


class Lines(Protocol):
    """Where lines come from."""

    def around(self) -> contextlib.AbstractContextManager[None]:
        """To be in force while lines are read and answered."""
        ...

    def read(self) -> str:
        """The next line or lines, without the last line's end.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C.
            UserError: what was typed is not UTF-8.
        """
        ...


class PlainLines:
    """Lines through `input`. A line of three double quotes alone begins a text of several lines, and another ends it."""

    def __init__(self) -> None:
        self._asks = is_terminal(sys.stdin)
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]

    def around(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _line(self, prompt: str) -> str:
        if self._asks and not is_terminal(sys.stdout):
            print(prompt, end="", file=sys.stderr, flush=True)
        return input(prompt if self._asks and is_terminal(sys.stdout) else "")

    def read(self) -> str:
        line = self._line(PROMPT)
        if line.strip() != '"""':
            return as_text(line)
        lines: list[str] = []
        with contextlib.suppress(EOFError):
            while (line := self._line(MORE)).strip() != '"""':
                lines.append(line)
        return as_text("\n".join(lines))


class EditedLines:
    """Lines through prompt_toolkit. Raises ImportError where it is not installed.

    Enter sends, Alt-Enter begins a new line, pasted lines stay together, arrows walk through the history, Tab completes
    ``words``.
    """

    def __init__(self, words: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        try:
            history: History = FileHistory(str(state_file("history")))
        except (OSError, RuntimeError) as error:
            remark(f"no history is kept: {error}")
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
    def around(self) -> Iterator[None]:
        """Keys that are pressed while a text comes are not shown in its middle, and wait for the next line: Ctrl-D too, that
        the terminal would swallow. Ctrl-C is heard at once all the same."""
        try:
            import termios
        except ImportError:  # Windows
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        kept = termios.tcgetattr(sys.stdin)
        kept[0] &= ~termios.ICRNL  # Enter stays what it is at the prompt
        kept[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def read(self) -> str:
        return as_text(self._session.prompt())


def open_lines(words: Sequence[str]) -> Lines:
    """The best that standard input and output allow. Raises `UserError` where there is no input."""
    if sys.stdin is None:
        raise UserError("standard input is closed: there is nothing to read prompts from")
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        try:
            return EditedLines(words)
        except ImportError:
            remark(
                "prompt_toolkit is not installed, so no history and little editing: pip install 'recurrent-db[repl]'"
            )
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  `input` edits with it
    return PlainLines()


# ---------------------------------------------------------------------------------------------------------------
# Ctrl-C


class Interrupts:
    """Ctrl-C raises KeyboardInterrupt within `allowed`, once, and does nothing elsewhere: the program outlives it."""

    def __init__(self) -> None:
        self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While this is in force."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
