"""Reads labelled images from parquet files, folders and the Hugging Face hub, and decodes them.

A source is a parquet file, a folder, or ``hf:NAME[:CONFIG[:SPLIT]]``.

- Parquet: one image per row. A column has the encoded image, as bytes or as {bytes, path}, and another has an integer
  label. Class names are in the schema's metadata: a Hugging Face ``ClassLabel``, or ``classes`` with one name per line.
- A folder has one folder per class. Their sorted names are the classes. Images in a class are read in the order of their
  paths. Files of other kinds are counted and skipped.
- The hub's data sets are streamed.

Images are PNG, JPEG, WebP, BMP or PPM. The size in an image's header is checked before the image is decoded.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_db.data.image_shards import MOST_CLASSES, MOST_PIXELS, problem_of_classes
from recurrent_db.data.readers import ReadOptions, ReadReport
from recurrent_db.data.sources import files_of
from recurrent_db.data.tables import first_line, open_hub
from recurrent_db.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
MOST_BYTES = 64 << 20
"""Most bytes of an encoded image."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
_PNG_END = b"IEND\xaeB`\x82"
_GREYSCALE_OR_PALETTE = ("1", "L", "P")
_BATCH_ROWS = 256


@dataclass(frozen=True)
class ImageOptions:
    """How images are found in tables, and which are accepted."""

    image_key: str = "image"
    """Column of the encoded images in parquet and hub data sets."""
    label_key: str = "label"
    """Column of the labels."""
    convert: bool = False
    """Convert greyscale and palette images to RGB. Otherwise they are refused."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """An encoded image."""

    where: str
    """File, and row or path, for messages. Rows are counted from 0."""
    raw: bytes
    label: int
    classes: tuple[str, ...] | None
    """Class names of its source; None if the source does not name them."""


# ---------------------------------------------------------------------------------------------------------------
# Sources -> encoded images


def read_images(location: str, options: ImageOptions, report: ReadReport) -> Iterator[RawImage]:
    """Stream the images of one source in a fixed order.

    Args:
        location: a parquet file, a folder with a folder per class, or ``hf:NAME[:CONFIG[:SPLIT]]``.
        report: receives counts of the files that were left out.

    Raises:
        UserError: while reading, if the source has another form, or an image or a label is missing.
    """
    path = Path(location)
    if location.startswith("hf:"):
        yield from open_hub(location, lambda rows: _hub_images(rows, location, options))
    elif path.is_dir():
        yield from _folder_images(path, report)
    elif path.suffix.lower() == ".parquet" and path.exists():
        yield from _parquet_images(path, options)
    elif path.exists():
        raise UserError(f"{location}: not a .parquet file or a folder with a folder per class")
    else:
        raise UserError(f"{location}: no such file or folder; other sources are hf:NAME")


def _folder_images(folder: Path, report: ReadReport) -> Iterator[RawImage]:
    try:
        folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from None
    if not folders:
        raise UserError(f"{folder}: no folder in it: put the images of each class in a folder with the class's name")
    classes = checked_classes([path.name for path in folders], str(folder))
    class_of: dict[Path, str] = {}
    for label, path in enumerate(folders):
        files = files_of(path, ReadOptions(), report, SUFFIXES)
        if not files:
            raise UserError(f"{path}: no image in the folder of this class ({' '.join(SUFFIXES)})")
        for _, file in files:
            if (other := class_of.setdefault(file.resolve(), path.name)) != path.name:
                raise UserError(f"{file}: a link puts this image of class {other} into class {path.name} too")
            try:
                with file.open("rb") as opened:
                    raw = opened.read(MOST_BYTES + 1)
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror or error}") from None
            yield RawImage(str(file), raw, label, classes)


def _parquet_images(path: Path, options: ImageOptions) -> Iterator[RawImage]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow") from None
    keys = [options.image_key, options.label_key]
    number = 0
    try:
        with path.open("rb") as file:
            table = parquet.ParquetFile(file, page_checksum_verification=True)
            schema = table.schema_arrow
            _check_columns(schema.names, options, str(path))
            classes = _schema_classes(schema.metadata or {}, options.label_key, str(path))
            for batch in table.iter_batches(_BATCH_ROWS, columns=keys):
                columns = (batch.column(key).to_pylist() for key in keys)
                for image, label in zip(*columns, strict=True):
                    yield _row_image(image, label, classes, f"{path}: row {number}", options)
                    number += 1
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types; all mean that the input is unreadable
        raise UserError(f"cannot read {path}, from row {number} on: {first_line(error)}") from None


def _hub_images(rows: Any, location: str, options: ImageOptions) -> Iterator[RawImage]:
    import datasets

    classes = None
    if rows.features is not None:
        _check_columns(list(rows.features), options, location)
        if isinstance(rows.features[options.image_key], datasets.Image):
            rows = rows.cast_column(options.image_key, datasets.Image(decode=False))
        if isinstance(rows.features[options.label_key], datasets.ClassLabel):
            classes = checked_classes(list(rows.features[options.label_key].names), location)
    for number, row in enumerate(rows):
        _check_columns(list(row), options, location)
        where = f"{location}: row {number}"
        yield _row_image(row[options.image_key], row[options.label_key], classes, where, options)


def _check_columns(names: list[str], options: ImageOptions, where: str) -> None:
    for key, flag in ((options.image_key, "--image-key"), (options.label_key, "--label-key")):
        if names.count(key) != 1:
            found = "two columns" if key in names else "no column"
            raise UserError(f"{where}: {found} {key!r}; it has: {', '.join(names)} (choose with {flag})")


def _schema_classes(metadata: dict[bytes, bytes], label_key: str, where: str) -> tuple[str, ...] | None:
    """Class names in the metadata of a parquet schema; None if there are none."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return checked_classes(features[label_key]["names"], where)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    if b"classes" in metadata:
        return checked_classes(metadata[b"classes"].decode("utf-8", errors="replace").splitlines(), where)
    return None


def checked_classes(names: Any, where: str) -> tuple[str, ...]:
    """Class names as a tuple. Raises `UserError` if they are not texts that differ."""
    if problem := problem_of_classes(names):
        raise UserError(f"{where}: {problem}")
    return tuple(names)


def _row_image(image: Any, label: Any, classes: tuple[str, ...] | None, where: str, options: ImageOptions) -> RawImage:
    """One row of a table. A path in it is not followed: a stranger's table could name any file."""
    raw = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(raw, bytes):
        hint = "; give a folder of images without hf:" if where.startswith("hf:") else ""
        raise UserError(f"{where}: no bytes of an image in column {options.image_key!r}{hint}")
    if label is None:
        raise UserError(f"{where}: no label in column {options.label_key!r}")
    if not isinstance(label, int) or isinstance(label, bool):
        raise UserError(f"{where}: label {str(label)[:200]!r} is not an integer")
    if label < 0:
        raise UserError(f"{where}: label {label} is negative")
    if label >= (most := MOST_CLASSES if classes is None else len(classes)):
        reason = f"at most {most} classes are possible" if classes is None else f"there are {most} classes"
        raise UserError(f"{where}: label {label}, but {reason}; labels are counted from 0")
    return RawImage(where, raw, label, classes)


# ---------------------------------------------------------------------------------------------------------------
# Encoded images -> pixels


def decode(image: RawImage, convert: bool = False) -> np.ndarray:
    """Decode an image to RGB: uint8, shape (H, W, 3). A rotation in its EXIF data is applied.

    Args:
        convert: accept greyscale and palette images.

    Raises:
        UserError: the image is too large, damaged, truncated, animated, transparent, or of another mode. Its size is
            checked before it is decoded.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise _missing("pillow") from None
    if len(image.raw) > MOST_BYTES:
        raise UserError(f"{image.where}: an encoded image of more than {MOST_BYTES >> 20} MiB is refused")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are refused here
            with Image.open(io.BytesIO(image.raw), formats=_FORMATS) as header:
                _check_header(header, image.where, convert)
                header.verify()  # the checksums of a PNG
                if header.format == "PNG" and _PNG_END not in image.raw:
                    raise UserError(f"{image.where}: truncated PNG: its end is missing")
            with Image.open(io.BytesIO(image.raw), formats=_FORMATS) as opened:
                opened.load()
                ImageOps.exif_transpose(opened, in_place=True)
                return np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB"))
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError:  # pillow's own, far larger limit
        raise UserError(f"{image.where}: more than {MOST_PIXELS} pixels, the most that are accepted") from None
    except UnidentifiedImageError:
        raise UserError(f"{image.where}: not an image ({', '.join(_FORMATS)}), or its header is damaged") from None
    except Exception as error:  # pillow's decoders raise many types; all mean that the image is damaged
        raise UserError(f"{image.where}: damaged image: {first_line(error)}") from None


def _check_header(header: Any, where: str, convert: bool) -> None:
    width, height = header.size
    if width * height > MOST_PIXELS:
        raise UserError(f"{where}: {width} x {height} pixels, but at most {MOST_PIXELS} are accepted")
    if getattr(header, "n_frames", 1) > 1:
        raise UserError(f"{where}: an animated image ({header.n_frames} frames)")
    if header.mode != "RGB" and header.mode not in _GREYSCALE_OR_PALETTE:
        raise UserError(f"{where}: mode {header.mode}, not RGB: convert the image first")
    if "transparency" in header.info:
        raise UserError(f"{where}: an image with transparency: convert it to RGB first")
    if header.mode != "RGB" and not convert:
        kind = "a palette" if header.mode == "P" else "greyscale"
        raise UserError(f"{where}: mode {header.mode} ({kind}), not RGB: accept such images with --convert")


def _missing(library: str) -> UserError:
    return UserError(f"images need the library {library}: pip install 'recurrent-db[vision]'")
