"""Train a judge of generated text: a flat next-token model, trained on other documents than the models it judges.

python eval/train_judge.py CONFIG.toml --data.path DIR --run.dir RUN --budget.tokens N [--apart-from DIR]

All options of train/pretrain.py apply, --resume included. The objective is always next_token. The judge is an ordinary run
directory. It also holds hashes of its training documents (judge.json).

`--apart-from DIR` names a data directory whose documents, training and held-out, the judge must not be trained on. It may be
repeated. Prepare the judge's data as another part of the same sources (train/prepare_data.py --part 2/2), or from other
sources.
"""

from __future__ import annotations

import sys
from pathlib import Path

from recurrent_db.arguments import run_and_exit
from recurrent_db.commands.train import arguments
from recurrent_db.data import read_manifest
from recurrent_db.errors import UserError
from recurrent_db.evaluation.judge import check_apart, record, write_record
from recurrent_db.files import expand_user
from recurrent_db.training.trainer import train


def take_apart_from(words: list[str]) -> tuple[list[Path], list[str]]:
    """Split the command line into the values of --apart-from and the remaining words."""
    others, rest = [], []
    given = iter(words)
    for word in given:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != "--apart-from":
            rest.append(word)
            continue
        value = value if equals else next(given, "")
        if not value or value.startswith("--"):
            raise UserError("--apart-from needs a data directory")
        others.append(Path(expand_user(value)))
    return others, rest


def main() -> int:
    others, words = take_apart_from(sys.argv[1:])
    if {"-h", "--help"} & set(words):
        print(__doc__)
    if any(word.partition("=")[0] == "--objective.name" for word in words):
        raise UserError("the objective of a judge is always next_token: leave --objective.name out")
    config, resume, overwrite = arguments([*words, "--objective.name", "next_token"], prog="train_judge.py")
    if not config.data.path:
        raise UserError("data.path is not set: give a folder made by train/prepare_data.py with --data.path DIR")
    kept = record(Path(config.data.path))
    for other in others:
        for split in read_manifest(other)["splits"]:
            share = check_apart(kept, other, split) if read_manifest(other)["splits"][split] else 0.0
            if share:
                raise UserError(f"{config.data.path} holds {share:.1%} of the {split} documents of {other}")
    status = train(config, resume, overwrite)
    write_record(Path(config.run.dir), kept)
    return status


if __name__ == "__main__":
    run_and_exit(main)
