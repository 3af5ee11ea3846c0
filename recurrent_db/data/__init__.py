"""Turns text into batches. The pipeline, file by file:

1. ``corpus`` reads the embedded corpus, the Python standard library's sources, as `Document` (id, text).
2. ``sources`` streams documents from any source (``stdlib``, files, folders, ``hf:NAME``) in bounded memory. ``unpacking``
   decompresses files, ``readers`` reads text and JSON, and ``tables`` reads parquet, Arrow and the hub. Undecodable bytes
   are replaced and counted.
3. ``holdout`` splits documents into "train" and "validation".
4. ``prepare`` tokenises the documents on all cores and ends each with the end-of-sequence token.
5. ``shard_writer`` writes a data directory: uint16 or uint32 token files, document boundaries, checksums and the
   tokenizer. ``shards`` checks and reads it.
6. ``loader`` cuts each source into packed sequences of T tokens, shuffles them by a keyed permutation, mixes the sources
   in exact shares, and gives each process its part of a step as a `Batch`.
7. ``prefetch`` prepares the batches of the next steps in a thread if the device is not the CPU.

Images take a way of their own, of the same form: ``image_sources`` reads and decodes them, ``prepare_images`` checks and
splits them, ``image_shards`` writes and reads their data directory, and ``image_loader`` shuffles and augments them.
``directory`` is what both kinds of data directory share.

A sample is a function of (seed, position in the run), so the data order needs no saved state.
"""

from recurrent_db.data.corpus import Document, stdlib_documents
from recurrent_db.data.image_loader import ImageBatch, ImageLoader, image_batches
from recurrent_db.data.image_shards import ImageData, open_images
from recurrent_db.data.loader import Batch, Loader, Slots, StepLoader, permute, validation_batches
from recurrent_db.data.prefetch import prefetch
from recurrent_db.data.prepare import Prepared, prepare
from recurrent_db.data.prepare_images import PreparedImages, prepare_images
from recurrent_db.data.readers import ReadOptions, ReadReport
from recurrent_db.data.shard_writer import DataWriter
from recurrent_db.data.shards import TokenData, TokenSource, document, load_tokenizer, open_data, read_manifest
from recurrent_db.data.sources import read_documents

__all__ = [
    "Batch",
    "DataWriter",
    "Document",
    "ImageBatch",
    "ImageData",
    "ImageLoader",
    "Loader",
    "Prepared",
    "PreparedImages",
    "ReadOptions",
    "ReadReport",
    "Slots",
    "StepLoader",
    "TokenData",
    "TokenSource",
    "document",
    "image_batches",
    "load_tokenizer",
    "open_data",
    "open_images",
    "permute",
    "prefetch",
    "prepare",
    "prepare_images",
    "read_documents",
    "read_manifest",
    "stdlib_documents",
    "validation_batches",
]
