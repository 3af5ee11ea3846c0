"""Tokenise text into the shards that training reads.

python train/prepare_data.py --source stdlib --tokenizer T.model --out DIR
python train/prepare_data.py --source code=stdlib web=crawl/ --val-source held-out.txt --tokenizer T.model --out DIR
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from recurrent_db.arguments import run_command
from recurrent_db.data.prepare import prepare
from recurrent_db.data.shard_writer import DEFAULT_SHARD_TOKENS
from recurrent_db.data.sources import ReadOptions
from recurrent_db.errors import UserError


@dataclass
class Args:
    """Tokenise text into the shards that training reads."""

    source: list[str]
    """Where the text is: stdlib (the Python standard library's own sources), files, folders, or
    hf:NAME[:CONFIG[:SPLIT]]. NAME=SOURCE names a source for data.mixture; those without a name form "default"."""
    tokenizer: Path
    """Tokenizer model (tokenizers/train_tokenizer.py makes one)."""
    out: Path
    """Data directory to make."""
    val_source: tuple[str, ...] = ()
    """Validation text, written as in --source; without it a share of the sources is held out."""
    holdout: float = 0.05
    """Share held out for validation (0 to 1) when there is no --val-source: files of stdlib by their path, documents
    by a hash of their text, and the end of each document of a source of fewer than 64."""
    workers: int | None = None
    """Tokenising threads (default: one per core). The output does not depend on it."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens per shard file."""
    max_documents: int | None = None
    """Documents to read of each named source, at most (default: all)."""
    max_mib: float | None = None
    """MiB of text to read of each named source, at most (default: all)."""
    part: str = "1/1"
    """I/N reads the I-th of N parts of the sources, parted by a hash of each document's text: what one part holds no
    other has. A judge of generated text (eval/train_judge.py) is trained on another part than the models it judges."""
    text_key: str = "text"
    """Key or column that holds the text in JSON lines, JSON, parquet and hub data sets."""
    document_separator: str | None = None
    """String at which text files are cut into documents, e.g. '<|endoftext|>' (default: one document per file)."""
    overwrite: bool = False
    """Replace an older data directory, once the new one is complete."""


def main(args: Args) -> None:
    if args.max_mib is not None and not 0 < args.max_mib < 2**40:
        raise UserError(f"--max-mib must be above 0, not {args.max_mib}")
    if sum(word == "--source" or word.startswith("--source=") for word in sys.argv) > 1:
        raise UserError("--source is given twice: write all sources after one --source")
    part = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if part is None:
        raise UserError(f"--part is written I/N, such as 1/2, not {args.part!r}")
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
        options=ReadOptions(args.text_key, args.document_separator or None),
        overwrite=args.overwrite,
        progress=True,
    )
    if done.note:
        print(f"note: {done.note}", file=sys.stderr)
    print(done.summary())


if __name__ == "__main__":
    run_command(Args, main)
