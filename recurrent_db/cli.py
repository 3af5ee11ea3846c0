"""The ``recurrent-db`` command: a table of subcommands. A subcommand's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from recurrent_db.arguments import run_and_exit
from recurrent_db.errors import UserError

COMMANDS = {
    "flops": ("flops", "count FLOPs per token, by objective, part of the model and K"),
    "train": ("train", "pretrain a model; `torchrun -m recurrent_db train` runs on several processes"),
    "plan": ("plan", "estimate memory, communication and time of a training run before it starts"),
    "blocks": ("blocks", "join blocks that were trained separately into one model"),
    "repl": ("repl", "generate text interactively"),
    "report": ("report", "compare runs on one HTML page"),
    "export": ("export", "write a run as a folder for Hugging Face transformers"),
    "import": ("import_", "create a run from a Hugging Face transformers folder"),
}
"""Subcommand -> (module in `recurrent_db.commands`, one-line summary)."""


def usage() -> str:
    lines = [f"  recurrent-db {name:<8} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: recurrent-db COMMAND ...  (COMMAND --help lists its options)", *lines])


def run(argv: list[str]) -> int:
    """Run one subcommand and return its exit status. Raises `UserError` for a mistake of the user."""
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
