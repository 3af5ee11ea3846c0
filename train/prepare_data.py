"""Tokenise text into a data directory for training.

python train/prepare_data.py --source stdlib --tokenizer T.model --out DIR
python train/prepare_data.py --source code=stdlib web=crawl/ --val-source held-out.txt --tokenizer T.model --out DIR
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from recurrent_db.arguments import one_line, run_command
from recurrent_db.data.prepare import prepare
from recurrent_db.data.readers import ReadOptions
from recurrent_db.data.shard_writer import DEFAULT_SHARD_TOKENS
from recurrent_db.errors import UserError
from recurrent_db.schema import PositiveInt, ShareBelowOne, above, at_least, at_most


@dataclass
class Args:
    """Tokenise text into a data directory for training."""

    source: list[str]
    """Training text: stdlib (the Python standard library's own sources), files, folders, or hf:NAME[:CONFIG[:SPLIT]].
    NAME=SOURCE names a source for data.mixture. Sources without a name together form "default"."""
    tokenizer: Path
    """Tokenizer model, made by tokenizers/train_tokenizer.py."""
    out: Path
    """Data directory to create."""
    val_source: tuple[str, ...] = ()
    """Validation text, written as in --source. By default the share --holdout of the sources is held out."""
    holdout: ShareBelowOne = 0.05
    """Share of the sources' text held out for validation (0 to 1), without --val-source. Short documents are held out
    whole, chosen by a hash of their text, and long documents give their end. Files of stdlib are chosen by a hash of their
    path."""
    workers: Annotated[int | None, at_least(1), at_most(1 << 12)] = None
    """Tokenising threads; by default one per core. The output does not depend on it."""
    shard_tokens: PositiveInt = DEFAULT_SHARD_TOKENS
    """Most tokens per shard file."""
    max_documents: Annotated[int | None, at_least(1)] = None
    """Most documents to read from each named source; by default all."""
    max_mib: Annotated[float | None, above(0), at_most(2**40)] = None
    """Most MiB of text to read from each named source; by default all."""
    part: str = "1/1"
    """I/N reads the I-th of N parts of the sources. A hash of a document's text chooses its part, so the parts share no
    document. Use different parts for a model and for the judge of its text (eval/train_judge.py)."""
    text_key: str = "text"
    """Key or column of the text in JSON lines, JSON, parquet, Arrow and hub data sets."""
    document_separator: str | None = None
    """String at which text files are cut into documents, such as '<|endoftext|>'. By default a file is one document."""
    exclude: tuple[str, ...] = ()
    """Files and folders to leave out of folders: shell patterns such as '*.json', compared with names and with paths in the
    folder."""
    overwrite: bool = False
    """Replace an existing data directory once the new one is complete."""


def main(args: Args) -> None:
    if sum(word == "--source" or word.startswith("--source=") for word in sys.argv) > 1:
        raise UserError("--source is given twice: list all sources after one --source")
    part = re.fullmatch(r"([0-9]{1,18})/([0-9]{1,18})", args.part)
    if part is None:
        raise UserError(f"--part must be written I/N, such as 1/2, not {args.part!r}")
    done = prepare(
        args.source,
        args.tokenizer,
        args.out,
        val_sources=args.val_source,
        holdout=args.holdout,
        workers=args.workers,
        shard_tokens=args.shard_tokens,
        max_documents=args.max_documents,
        max_bytes=None if args.max_mib is None else max(1, int(args.max_mib * 2**20)),
        part=(int(part[1]), int(part[2])),
        options=ReadOptions(args.text_key, args.document_separator or None, args.exclude),
        overwrite=args.overwrite,
        progress=True,
    )
    if done.note:
        print(f"note: {one_line(done.note)}", file=sys.stderr)
    print(done.summary())


if __name__ == "__main__":
    run_command(Args, main)
