"""The ``recurrent-db`` command: a table of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import sys

from recurrent_db.arguments import run_and_exit
from recurrent_db.errors import UserError

COMMANDS = {
    "flops": ("flops", "FLOPs per token by part, for every way of training and by K"),
    "train": ("train", "pretrain a model; `torchrun -m recurrent_db train` does it on several processes"),
    "plan": ("plan", "memory, communication and time of a training run before it starts"),
    "blocks": ("blocks", "one model of blocks that were trained apart"),
    "repl": ("repl", "talk to a checkpoint"),
    "report": ("report", "compare runs on one HTML page"),
    "export": ("export", "a run as a folder for Hugging Face transformers"),
    "import": ("import_", "a folder of Hugging Face transformers as a run"),
}
"""Name -> module in `recurrent_db.commands`, and what it does in a line."""


def usage() -> str:
    lines = [f"  recurrent-db {name:<8} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: recurrent-db COMMAND ...  (COMMAND --help says more)", *lines])


def run(argv: list[str]) -> int:
    """Run one command. Raises `UserError` for a mistake in the words."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, words = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; commands: {', '.join(COMMANDS)}")
    command = importlib.import_module(f"recurrent_db.commands.{COMMANDS[name][0]}")
    status: int = command.run(command.arguments(words, f"recurrent-db {name}"))
    return status


def main() -> None:
    """Entry point of the installed command."""
    run_and_exit(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
