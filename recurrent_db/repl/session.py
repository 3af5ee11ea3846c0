"""The session of `recurrent-db repl RUN`: answers prompts with text, and runs commands.

A line that begins with a slash and a word is a command; any other line is a prompt. The text equals that of
`recurrent_db.generate` with the same options. Texts and tables go to standard output, messages to standard error.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.samplers import check_served
from recurrent_db.model.looped import LoopedLM
from recurrent_db.repl.console import (
    BOLD,
    DIM,
    Interrupts,
    Lines,
    Utf8Writer,
    complain,
    is_terminal,
    paint,
    remark,
    side_by_side,
)
from recurrent_db.repl.reply import Reply, bytes_shown, check_memory, make_reply
from recurrent_db.repl.trace import label, table, trace
from recurrent_db.schema import from_words

# ---------------------------------------------------------------------------------------------------------------
# Commands


def _on_or_off(word: str) -> bool:
    if word not in ("on", "off"):
        raise UserError(f"warm_start must be on or off, got {word!r}")
    return word == "on"


def _exit_or_off(word: str) -> str | None:
    return None if word == "off" else word


@dataclass(frozen=True)
class Setting:
    """A generation option that a command shows or changes."""

    option: str
    parse: Callable[[str], Any]
    about: str


SETTINGS = {
    "k": Setting("k", int, "core iterations per token; for a denoiser, noise levels of the walk"),
    "temp": Setting("temperature", float, "0 takes the most likely token; 1 is the model's own distribution"),
    "top_p": Setting("top_p", float, "draw from the fewest tokens that reach this probability; 1 keeps all"),
    "top_k": Setting("top_k", int, "draw from this many most likely tokens; 0 keeps all"),
    "min_p": Setting("min_p", float, "drop tokens below this share of the highest probability; 0 keeps all"),
    "penalty": Setting("repetition_penalty", float, "above 1 makes repeated tokens less likely; 1 has no effect"),
    "max": Setting("max_new_tokens", int, "largest number of new tokens"),
    "seed": Setting("seed", int, "the same seed gives the same text"),
    "cache": Setting("cache_policy", str, "full, last or modulo-S; the last two save memory and change the text"),
    "sampler": Setting("sampler", str, "decoding strategy; /sampler alone lists them"),
    "adaptive": Setting(
        "exit", _exit_or_off, "stop iterating early, by kl, entropy or latent (kl:1e-3 sets the threshold); or off"
    ),
    "warm": Setting("warm_start", _on_or_off, "on: a token's iterations start from the previous token's last state"),
}
"""Settings by command word. The option ``exit`` is called ``adaptive`` here, because `/exit` leaves the session."""
ACTIONS = {
    "compare": ("K K ...", "continue the last prompt with each K and the same seed, side by side"),
    "trace": ("[N]", "show the read-out after each iteration, for N tokens of the last text (default 1)"),
    "stats": ("", "speed, mean K, cache and FLOPs of the last texts"),
    "save": ("FILE", "save all texts to a file; as JSON if its name ends in .json"),
    "help": ("", "show this list"),
    "quit": ("", "leave (or press Ctrl-D)"),
}
ALIASES = {"temperature": "temp", "max_new_tokens": "max", "repetition_penalty": "penalty", "exit": "quit", "q": "quit"}
SAMPLERS_SHOWN = {
    "sequential": "one token after another, K iterations each",
    "speculative": "[:DRAFT_K[:BLOCK]] draft blocks with DRAFT_K (2) iterations; same distribution, faster",
    "diagonal": "[:INNER] start a new token every INNER iterations; same text, faster",
    "diagonal-unverified": "[:INNER] the same without corrections; different text",
}
"""Lines of `/sampler`."""
_COMMAND = re.compile(r"/([A-Za-z]\w*)(?:[^\S\n]+([^\n]*))?")
_TRACED_AT_ONCE = 1 << 27
"""Largest product of tokens, iterations and vocabulary in a trace: 1 GiB in fp64."""


def shown(value: object) -> str:
    """An option's value, as the user would type it."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def described(options: GenerationOptions) -> str:
    """One line with every setting."""
    values = ((setting.option, getattr(options, setting.option)) for setting in SETTINGS.values())
    return ", ".join(f"{name} {shown(value)}" for name, value in values)


def check(options: GenerationOptions, model: LoopedLM | None = None) -> None:
    """Raises `UserError` for options that a session cannot use, or cannot use with ``model``."""
    if options.max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {options.max_new_tokens}")
    if model is not None:
        check_served(model, options)


def _parsed(parse: Callable[[str], Any], word: str, name: str) -> Any:
    try:
        return from_words([word], parse) if parse in (int, float) else parse(word)
    except ValueError as error:
        raise UserError(f"{name} {error}") from None


class Session:
    """Settings and texts of one user. Prints its results to standard output and standard error."""

    def __init__(self, model: LoopedLM, tokenizer: Tokenizer, options: GenerationOptions, name: str = "") -> None:
        self.model, self.tokenizer, self.options, self.name = model, tokenizer, options, name
        self.replies: list[Reply] = []
        """All texts of the session, in order."""
        self.last: list[Reply] = []
        """Texts of the last prompt or comparison."""
        self.done = False
        self._saved: set[Path] = set()
        self._interrupts = Interrupts()

    def run(self, lines: Lines) -> None:
        """Answer lines until the input ends or the user leaves.

        Raises:
            KeyboardInterrupt: the input is not a terminal, and an interrupt came.
        """
        with self._interrupts.installed(), lines.answering():
            while not self.done:
                try:
                    with self._interrupts.allowed():
                        text = lines.read()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    self._interrupts.check()
                    remark("leave with /quit or Ctrl-D")
                except UserError as error:
                    complain(str(error))
                else:
                    self.answer(text)
                    self._interrupts.check()

    def answer(self, text: str) -> None:
        """Answer a prompt, or run commands, one per line. Any error is reported in one line."""
        commands = [_COMMAND.fullmatch(line.strip()) for line in text.strip().split("\n")]
        try:
            with self._interrupts.allowed():
                if all(commands):
                    for command in commands:
                        assert command is not None
                        self._command(command[1].lower(), (command[2] or "").strip())
                elif not text.strip():
                    raise UserError("the line is empty: type a prompt, or /help for the commands")
                else:
                    self._prompt(text)
        except KeyboardInterrupt:
            self._interrupts.check()
            remark("stopped")
        except UserError as error:
            complain(str(error))
        except BrokenPipeError:
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            complain(f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    def _command(self, word: str, rest: str) -> None:
        word = ALIASES.get(word, word)
        if word in ACTIONS:
            if rest and not ACTIONS[word][0]:
                raise UserError(f"/{word} takes no argument, got {rest!r}")
            getattr(self, f"_{word}")(rest)
        elif word in SETTINGS:
            self._set(word, rest)
        else:
            near = difflib.get_close_matches(word, [*SETTINGS, *ACTIONS, *ALIASES], n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise UserError(f"unknown command /{word}; {hint}")

    def _set(self, word: str, rest: str) -> None:
        setting = SETTINGS[word]
        if rest:
            options = replace(self.options, **{setting.option: _parsed(setting.parse, rest, f"/{word}")})
            check(options, self.model)
            self.options = options
        elif word == "sampler":
            chosen = self.options.sampler.split(":")[0]
            for name, about in SAMPLERS_SHOWN.items():
                print(f"{'*' if name == chosen else ' '} {name:<20} {about}")
            return
        remark(f"{setting.option} = {shown(getattr(self.options, setting.option))}")

    # -- texts -------------------------------------------------------------------------------------------------------

    def _prompt(self, text: str) -> None:
        # An empty prompt becomes the separator, which precedes every document in training.
        ids = self.tokenizer.encode(text) or [self.tokenizer.eos_id]
        if len(ids) > self.model.config.max_seq_len:
            window = self.model.config.max_seq_len
            remark(f"the prompt has {len(ids):,} tokens, so only its last {window:,}, the model's context, are used")
        self.last, writer = [], Utf8Writer()
        reply = self._reply(text, ids, self.options, writer.add)
        writer.end()
        self._interrupts.check()
        self.last = [reply]
        if reply.ended == "stopped":
            remark(f"stopped after {len(reply.ids)} tokens")
        elif is_terminal(sys.stdout):
            end = "the document ends here" if reply.ended == "document" else f"{len(reply.ids)} tokens"
            remark(f"[{end}; {reply.seconds:.2f} s, k {reply.options.k}]")

    def _reply(self, prompt: str, ids: list[int], options: GenerationOptions, show: Callable[[bytes], object]) -> Reply:
        reply = make_reply(self.model, self.tokenizer, prompt, ids, options, show)
        self.replies.append(reply)
        return reply

    def _asked(self) -> Reply:
        if not self.last:
            raise UserError("type a prompt first")
        return self.last[-1]

    def _compare(self, rest: str) -> None:
        words = rest.replace(",", " ").split()
        if not words:
            raise UserError("/compare takes two or more values of K, for example /compare 1 4 16")
        asked = self._asked()
        each = [replace(self.options, k=k) for k in dict.fromkeys(_parsed(int, word, "/compare") for word in words)]
        for options in each:  # check all of them before any text is generated
            check_memory(self.model, len(asked.prompt_ids), options)
        replies: list[Reply] = []
        total = len(each) * self.options.max_new_tokens
        with tqdm(total=total, unit=" tokens", leave=False, disable=not is_terminal(sys.stderr)) as bar:
            for number, options in enumerate(each, 1):
                bar.set_description(f"k {options.k}")
                replies.append(self._reply(asked.prompt, asked.prompt_ids, options, lambda _: bar.update()))
                if replies[-1].ended == "stopped":
                    break
                bar.update(number * self.options.max_new_tokens - bar.n)
        self.last = replies
        heads = [f"k = {reply.options.k}" + " (stopped)" * (reply.ended == "stopped") for reply in replies]
        width = shutil.get_terminal_size().columns
        if is_terminal(sys.stdout) and width >= 20 * len(heads):
            print(side_by_side(heads, [reply.text for reply in replies], width))
        else:
            for head, reply in zip(heads, replies, strict=True):
                print(paint(head, BOLD))
                writer = Utf8Writer()
                writer.add(reply.text.encode())
                writer.end()

    # -- measurements ------------------------------------------------------------------------------------------------

    def _trace(self, rest: str) -> None:
        count = _parsed(int, rest, "/trace") if rest else 1
        if count < 1:
            raise UserError(f"/trace takes 1 token or more, got {count}")
        asked, k = self._asked(), self.options.k
        if count > len(asked.ids) + 1:
            count = len(asked.ids) + 1
            remark(f"the text has {len(asked.ids)} tokens, so only {count} can be traced")
        if count * k * self.model.config.vocab_size > _TRACED_AT_ONCE:
            raise UserError(f"{count} tokens at k = {k} are too many to trace at once: trace fewer, or lower /k")
        if self.options.cache_policy != "full":
            remark(f"the trace uses a full cache; the text used {self.options.cache_policy}")
        if self.options.exit is not None:
            remark(f"the trace shows all {k} iterations; the text stopped earlier by {self.options.exit}")
        prompt = len(asked.prompt_ids)
        ids = asked.prompt_ids + asked.ids[: count - 1]
        result = trace(self.model, ids, prompt, k, self.options.seed)
        width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else 100
        for index in range(count):
            drawn = asked.ids[index] if index < len(asked.ids) else None
            if drawn is None and asked.ended == "document":
                drawn = self.tokenizer.eos_id
            before = self.tokenizer.decode(ids[max(0, prompt + index - 16) : prompt + index])
            became = "" if drawn is None else f": {label(self.tokenizer, drawn)}"
            print(f"token {index + 1}, after {before[-32:]!r}{became}")
            print("\n".join(table(result, index, self.model, self.tokenizer, drawn, width)))

    def _stats(self, rest: str) -> None:
        self._asked()
        rows = [
            ("k", "tokens", "prompt", "tokens/s", "to the first", "mean k", "cache", "FLOPs", "a new token", "accepted")
        ]
        for reply in self.last:
            new = len(reply.ids)
            rows.append((
                str(reply.options.k), str(new), str(len(reply.prompt_ids)), f"{reply.tokens_per_second:.3g}",
                f"{reply.first_seconds:.3g} s", f"{reply.mean_k:.2f}", bytes_shown(reply.cache_bytes),
                f"{reply.flops:.3e}", f"{reply.flops / new:.3e}" if new else "-",
                "-" if reply.acceptance is None else f"{reply.acceptance:.3f}",
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for number, row in enumerate(rows):
            line = "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            print(line if number else paint(line, DIM))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("/save takes the name of a file")
        if not self.replies:
            raise UserError("there is no text to save yet")
        try:
            path = Path(rest).expanduser().absolute()
            if path.exists() and path not in self._saved:
                raise UserError(f"{rest} already exists: choose another name")
            check_output(path)
            write_atomic(path, self._as_json() if path.suffix == ".json" else self._as_text())
        except (ValueError, RuntimeError) as error:  # an invalid path, or an unknown user's home directory
            raise UserError(f"cannot write {rest!r}: {error}") from None
        self._saved.add(path)
        remark(f"saved {len(self.replies)} texts to {path}")

    def _as_json(self) -> str:
        return json.dumps([reply.to_json() for reply in self.replies], indent=1, ensure_ascii=False) + "\n"

    def _as_text(self) -> str:
        parts = [f"recurrent_db: {self.name}\n"]
        for number, reply in enumerate(self.replies, 1):
            parts.append(f"\n[{number}] {described(reply.options)}; {len(reply.ids)} tokens, ended by: {reply.ended}\n")
            parts.append(f"[prompt]\n{reply.prompt}\n[text]\n{reply.text}\n")
        return "".join(parts)

    def _help(self, rest: str) -> None:
        print(
            'Type a prompt, or one of these commands. Alt-Enter, or """ on the lines before and after, makes longer prompts.'
        )
        for word, setting in SETTINGS.items():
            print(f"  /{word:<8} {shown(getattr(self.options, setting.option)):<11} {setting.about}")
        for word, (arguments, about) in ACTIONS.items():
            print(f"  /{word:<8} {arguments:<11} {about}")

    def _quit(self, rest: str) -> None:
        self.done = True
