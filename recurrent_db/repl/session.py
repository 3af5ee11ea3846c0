"""The session of `recurrent-db repl RUN`: prompts in, texts out, and commands.

A line that begins with a slash and a word is a command; every other line is a prompt. The texts are those of
`recurrent_db.generate` with the same options. Texts and tables go to standard output, remarks to standard error.
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

# ---------------------------------------------------------------------------------------------------------------
# Commands


def _on_or_off(word: str) -> bool:
    if word not in ("on", "off"):
        raise UserError(f"warm_start is on or off, not {word!r}")
    return word == "on"


def _exit_or_off(word: str) -> str | None:
    return None if word == "off" else word


@dataclass(frozen=True)
class Setting:
    """A generation option that a command shows and changes."""

    option: str
    parse: Callable[[str], Any]
    about: str


SETTINGS = {
    "k": Setting("k", int, "core iterations for each token; of a denoiser, noise levels of the walk"),
    "temp": Setting("temperature", float, "0 is greedy, 1 the model's own distribution"),
    "top_p": Setting("top_p", float, "draw among the fewest tokens that reach this probability; 1 is all"),
    "top_k": Setting("top_k", int, "draw among so many most likely tokens; 0 is all"),
    "min_p": Setting("min_p", float, "draw among tokens this times as likely as the likeliest; 0 is all"),
    "penalty": Setting("repetition_penalty", float, "above 1 makes tokens that are there less likely; 1 is none"),
    "max": Setting("max_new_tokens", int, "the most new tokens"),
    "seed": Setting("seed", int, "the same seed gives the same text"),
    "cache": Setting("cache_policy", str, "full; or last or modulo-S: less memory, another distribution"),
    "sampler": Setting("sampler", str, "how tokens are made; alone it lists what there is"),
    "adaptive": Setting(
        "exit", _exit_or_off, "stop iterating when kl, entropy or latent (kl:1e-3) has settled, K at most; or off"
    ),
    "warm": Setting("warm_start", _on_or_off, "on: a token's iterations start from the last state of the token before"),
}
"""By command word. `/exit` leaves the session, so the option ``exit`` has another word."""
ACTIONS = {
    "compare": ("K K ...", "the last prompt with each K, same seed, side by side"),
    "trace": ("[N]", "read-outs by iteration for the next N tokens of the last prompt (1)"),
    "stats": ("", "speed, mean K, cache and FLOPs of what was made last"),
    "save": ("FILE", "write the transcript; as JSON where FILE ends with .json"),
    "help": ("", "this list"),
    "quit": ("", "leave (so does Ctrl-D)"),
}
ALIASES = {"temperature": "temp", "max_new_tokens": "max", "repetition_penalty": "penalty", "exit": "quit", "q": "quit"}
SAMPLERS_SHOWN = {
    "sequential": "one token after another, K iterations each",
    "speculative": "[:DRAFT_K[:BLOCK]] blocks drafted at DRAFT_K (2) iterations; the same distribution, faster",
    "diagonal": "[:INNER] a new token every INNER iterations; the same text, faster",
    "diagonal-unverified": "[:INNER] the same without taking anything back; another text",
}
"""What `/sampler` lists."""
_COMMAND = re.compile(r"/([A-Za-z]\w*)(?:[^\S\n]+([^\n]*))?")
_TRACED_AT_ONCE = 1 << 27
"""Tokens times iterations times vocabulary of a trace: 1 GiB in fp64."""


def shown(value: object) -> str:
    """An option's value, as a user would type it."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def described(options: GenerationOptions) -> str:
    """All that commands can change, in one line."""
    values = ((setting.option, getattr(options, setting.option)) for setting in SETTINGS.values())
    return ", ".join(f"{name} {shown(value)}" for name, value in values)


def check(options: GenerationOptions, model: LoopedLM | None = None) -> None:
    """Raises `UserError` for options that a session, or a session with this model, cannot run with."""
    if options.max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {options.max_new_tokens}")
    if model is not None:
        check_served(model, options)


def _parsed(parse: Callable[[str], Any], word: str, name: str) -> Any:
    try:
        return parse(word)
    except ValueError:
        raise UserError(f"{name} takes a {'whole number' if parse is int else 'number'}, got {word!r}") from None


class Session:
    """What a user has set and seen. Everything that is shown goes to standard output or error."""

    def __init__(self, model: LoopedLM, tokenizer: Tokenizer, options: GenerationOptions, name: str = "") -> None:
        self.model, self.tokenizer, self.options, self.name = model, tokenizer, options, name
        self.replies: list[Reply] = []
        """All texts, in order."""
        self.last: list[Reply] = []
        """Those of the last prompt or comparison."""
        self.done = False
        self._saved: set[Path] = set()
        self._interrupts = Interrupts()

    def run(self, lines: Lines) -> None:
        """Answer line after line until there are no more or the user leaves."""
        with self._interrupts.installed(), lines.around():
            while not self.done:
                try:
                    with self._interrupts.allowed():
                        text = lines.read()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    remark("/quit or Ctrl-D leaves")
                except UserError as error:
                    complain(str(error))
                else:
                    self.answer(text)

    def answer(self, text: str) -> None:
        """One prompt, or commands one a line. Mistakes, and what the machine cannot do, are a line."""
        commands = [_COMMAND.fullmatch(line.strip()) for line in text.strip().split("\n")]
        try:
            with self._interrupts.allowed():
                if all(commands):
                    for command in commands:
                        assert command is not None
                        self._command(command[1].lower(), (command[2] or "").strip())
                elif not text.strip():
                    raise UserError("an empty line: type a prompt, or /help for the commands")
                else:
                    self._prompt(text)
        except KeyboardInterrupt:
            remark("stopped")
        except UserError as error:
            complain(str(error))
        except BrokenPipeError:
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            complain(f"that did not work: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

    def _command(self, word: str, rest: str) -> None:
        word = ALIASES.get(word, word)
        if word in ACTIONS:
            if rest and not ACTIONS[word][0]:
                raise UserError(f"/{word} takes nothing more, got {rest!r}")
            getattr(self, f"_{word}")(rest)
        elif word in SETTINGS:
            self._set(word, rest)
        else:
            near = difflib.get_close_matches(word, [*SETTINGS, *ACTIONS, *ALIASES], n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
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
        # What precedes a document in training is the end of another.
        ids = self.tokenizer.encode(text) or [self.tokenizer.eos_id]
        if len(ids) > self.model.config.max_seq_len:
            window = self.model.config.max_seq_len
            remark(
                f"the prompt has {len(ids):,} tokens and the model's context {window:,}: its last {window:,} are read"
            )
        self.last, writer = [], Utf8Writer()
        reply = self._reply(text, ids, self.options, writer.add)
        writer.end()
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
            raise UserError("/compare takes two or more numbers of iterations, such as /compare 1 4 16")
        asked = self._asked()
        each = [replace(self.options, k=_parsed(int, word, "/compare")) for word in dict.fromkeys(words)]
        for options in each:  # before any of them is made
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

    # -- figures -----------------------------------------------------------------------------------------------------

    def _trace(self, rest: str) -> None:
        count = _parsed(int, rest, "/trace") if rest else 1
        if count < 1:
            raise UserError(f"/trace takes 1 token or more, got {count}")
        asked, k = self._asked(), self.options.k
        if count > len(asked.ids) + 1:
            count = len(asked.ids) + 1
            remark(f"the text has {len(asked.ids)} tokens, so {count} can be traced")
        if count * k * self.model.config.vocab_size > _TRACED_AT_ONCE:
            raise UserError(f"{count} tokens at k = {k} are too many to trace at once: choose fewer, or a lower /k")
        if self.options.cache_policy != "full":
            remark(f"as with a full cache; the text's was {self.options.cache_policy}")
        if self.options.exit is not None:
            remark(f"all {k} iterations; the text's end where {self.options.exit} has settled")
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
            raise UserError("there is nothing to save yet")
        try:
            path = Path(rest).expanduser().absolute()
            if path.exists() and path not in self._saved:
                raise UserError(f"{rest} is there already: name another file")
            check_output(path)
            write_atomic(path, self._as_json() if path.suffix == ".json" else self._as_text())
        except (ValueError, RuntimeError) as error:  # no path at all; no such user's folder
            raise UserError(f"cannot write {rest!r}: {error}") from None
        self._saved.add(path)
        remark(f"{len(self.replies)} texts in {path}")

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
            'A line is a prompt, or one of these. Alt-Enter (or a line of """ before and after) makes longer prompts.'
        )
        for word, setting in SETTINGS.items():
            print(f"  /{word:<8} {shown(getattr(self.options, setting.option)):<11} {setting.about}")
        for word, (arguments, about) in ACTIONS.items():
            print(f"  /{word:<8} {arguments:<11} {about}")

    def _quit(self, rest: str) -> None:
        self.done = True
