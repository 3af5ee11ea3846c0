"""`recurrent-db train`: pretrain a model. ``torchrun -m recurrent_db train`` runs it on several processes."""

from __future__ import annotations

from pathlib import Path

from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError

Args = tuple[Config, str, bool]
"""The arguments of `training.trainer.train`: config, ``resume`` ("", "newest" or "last-good") and ``overwrite``."""


def arguments(words: list[str], prog: str = "recurrent-db train") -> Args:
    """Parse ``CONFIG.toml [--dotted.key value] [--resume [last-good]] [--overwrite]``. ``--help`` lists all settings.

    Raises:
        UserError: ``--resume`` together with ``--overwrite``, a word after ``--resume`` other than last-good, or a mistake
            in the configuration.
    """
    words, resume, overwrite = list(words), "", False
    if "--resume" in words:
        at = words.index("--resume")
        following = "".join(words[at + 1 : at + 2])
        if at and following and not following.startswith("-") and following != "last-good":
            raise UserError(f"--resume takes no value or last-good, not {following!r}")
        resume = "last-good" if following == "last-good" else "newest"
        del words[at : at + (2 if resume == "last-good" else 1)]
    if "--overwrite" in words:
        words.remove("--overwrite")
        overwrite = True
    if resume and overwrite:
        raise UserError("--resume and --overwrite cannot be combined")
    path = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    return load_config(path, words, prog=f"{prog} CONFIG.toml"), resume, overwrite


def run(args: Args) -> int:
    from recurrent_db.distributed.watchdog import report_lost
    from recurrent_db.training.trainer import train

    return report_lost(lambda: train(*args))
