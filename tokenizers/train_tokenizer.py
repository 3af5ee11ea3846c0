"""Train a lossless sentencepiece tokenizer.

python tokenizers/train_tokenizer.py --input stdlib --vocab-size 4096 --out T.model
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from recurrent_db.arguments import one_line, run_command
from recurrent_db.data.readers import ReadOptions, ReadReport
from recurrent_db.data.sources import parse_source, read_documents
from recurrent_db.data.tokenizer import Tokenizer, train
from recurrent_db.errors import UserError
from recurrent_db.schema import above, at_least, at_most


@dataclass
class Args:
    """Train a lossless sentencepiece tokenizer: encoding and decoding return any UTF-8 text unchanged."""

    input: list[str]
    """Text to train on: stdlib (the Python standard library's own sources), files, folders, or
    hf:NAME[:CONFIG[:SPLIT]], as in train/prepare_data.py."""
    vocab_size: int
    """Tokens in the vocabulary, including 4 special tokens and 256 bytes; at least 272."""
    out: Path
    """Model file to write."""
    model_type: Literal["bpe", "unigram", "char"] = "bpe"
    """Type of sentencepiece model. unigram takes about 20 times longer to train. char has one token per character of the
    text, at most --vocab-size tokens in all, for models that are measured in bits per character."""
    max_mib: Annotated[float, above(0), at_most(2**40)] = 8.0
    """MiB of text to train on, sampled uniformly from the inputs."""
    max_documents: Annotated[int | None, at_least(1)] = None
    """Most documents to read from each input; by default all."""
    seed: int = 0
    """Seed of the sample."""
    text_key: str = "text"
    """Key or column of the text in JSON lines, JSON, parquet, Arrow and hub data sets."""
    document_separator: str | None = None
    """String at which text files are cut into documents. By default a file is one document."""
    exclude: tuple[str, ...] = ()
    """Files and folders to leave out of folders: shell patterns such as '*.json', compared with names and with paths in the
    folder."""
    overwrite: bool = False
    """Replace an existing model file."""


def main(args: Args) -> None:
    if args.out.is_dir():
        raise UserError(f"{args.out} is a folder: --out names the model file")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already: choose another --out, or replace it with --overwrite True")
    nearest = next(parent for parent in args.out.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot create {args.out}: {nearest} is not a folder")
    report = ReadReport()
    options = ReadOptions(args.text_key, args.document_separator or None, args.exclude)

    def texts() -> Iterator[str]:
        with tqdm(desc="reading", unit="B", unit_scale=True, disable=None) as bar:
            for source in args.input:
                documents = read_documents(parse_source(source)[1], options, report)
                for number, document in enumerate(documents):
                    if number == args.max_documents:
                        break
                    bar.update(len(document.text))
                    yield document.text

    model = train(texts(), args.vocab_size, args.model_type, max(1, int(args.max_mib * 2**20)), args.seed)
    tokenizer = Tokenizer.from_bytes(model)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.out)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    if note := report.note():
        print(f"note: {one_line(note)}", file=sys.stderr)
    print(f"{args.out}: {tokenizer.vocab_size} tokens, {len(model)} bytes, hash {tokenizer.hash}")


if __name__ == "__main__":
    run_command(Args, main)
