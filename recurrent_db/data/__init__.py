"""Turns text into batches. The pipeline, in the order of its files:

1. ``corpus``: the embedded corpus, the Python standard library's sources, as `Document` (id, text).
2. ``sources``: any source (``stdlib``, files, folders, ``hf:NAME``) as a stream of documents in bounded memory,
   undecodable bytes replaced and counted, split into "train" and "validation".
3. ``prepare``: tokenise the documents on every core, each followed by the end-of-sequence token.
4. ``shard_writer`` and ``shards``: write the tokens as uint16 or uint32 files with document boundaries, checksums and
   the tokenizer in one directory, which appears complete or not at all; open it again, checked.
5. ``loader``: cut each source into packed sequences of T tokens, order them by a keyed permutation, mix the sources in
   exact shares, and give rank r of any number of processes its part of step s as a `Batch`.
6. ``prefetch``: the batches of the next steps on the device, prepared by a thread where that pays.

A sample is a function of (seed, global position): nothing about the order has to be saved or restored.
"""

from recurrent_db.data.corpus import Document, stdlib_documents
from recurrent_db.data.loader import Batch, Loader, permute, validation_batches
from recurrent_db.data.prefetch import prefetch
from recurrent_db.data.prepare import Prepared, prepare
from recurrent_db.data.shard_writer import DataWriter
from recurrent_db.data.shards import TokenData, TokenSource, document, load_tokenizer, open_data, read_manifest
from recurrent_db.data.sources import ReadOptions, ReadReport, read_documents

__all__ = [
    "Batch",
    "DataWriter",
    "Document",
    "Loader",
    "Prepared",
    "ReadOptions",
    "ReadReport",
    "TokenData",
    "TokenSource",
    "document",
    "load_tokenizer",
    "open_data",
    "permute",
    "prefetch",
    "prepare",
    "read_documents",
    "read_manifest",
    "stdlib_documents",
    "validation_batches",
]
