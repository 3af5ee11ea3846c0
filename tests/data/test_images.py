"""Images: sources in, image shards and batches out, or one line that says why not."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from doc_pages import blocks, commands
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data import ImageData, ImageLoader, image_batches, open_data, open_images, prefetch, prepare_images
from recurrent_db.data.image_loader import from_pixels, to_pixels
from recurrent_db.data.image_sources import ImageOptions, RawImage, decode
from recurrent_db.errors import UserError

pa = pytest.importorskip("pyarrow", reason="the extra `vision` is not installed")
Image = pytest.importorskip("PIL.Image", reason="the extra `vision` is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `vision` is not installed")

Script = Callable[..., "CompletedProcess[str]"]
NAMES = ["even", "odd"]


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind)
    return stream.getvalue()


def noise(count: int, height: int = 6, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def hugging_face(names: Sequence[str]) -> dict[str, str]:
    label = {"names": list(names), "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


def write_table(
    path: Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    metadata: dict[str, str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """A parquet file of encoded images. ``metadata`` is the schema's; by default it names the classes `NAMES`."""
    table = pa.table(dict(zip(columns, (images, labels), strict=True)))
    parquet.write_table(table.replace_schema_metadata(hugging_face(NAMES) if metadata is None else metadata), path)
    return path


def write_noise(path: Path, count: int = 40, metadata: dict[str, str] | None = None, seed: int = 0) -> Path:
    return write_table(
        path, [encoded(image) for image in noise(count, seed=seed)], [n % 2 for n in range(count)], metadata
    )


def pixels_of(folder: Path, split: str) -> dict[bytes, int]:
    """The images of a split with their labels."""
    data = open_images(folder, split, verify=True)
    images = data.read(np.arange(len(data)))
    return {image.tobytes(): label for image, label in zip(images, data.labels.tolist(), strict=True)}


# ---------------------------------------------------------------------------------------------------------------
# Sources -> shards


def test_digits_by_parquet_and_by_folder(tmp_path: Path) -> None:
    """Both ways give the same images, and every image is in one split."""
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    grey = (digits.images[:200] * 15).astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=3), digits.target[:200].tolist()
    names = [f"digit {n}" for n in range(10)]
    raw = [encoded(image) for image in images]
    write_table(tmp_path / "d.parquet", [{"bytes": one, "path": None} for one in raw], labels, hugging_face(names))
    for number, (one, label) in enumerate(zip(raw, labels, strict=True)):
        (tmp_path / "folder" / names[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / names[label] / f"{number}.png").write_bytes(one)
    (tmp_path / "folder" / names[0] / "notes.txt").write_text("not an image")
    expected = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for source, note in (("d.parquet", None), ("folder", "skipped 1 file(s)")):
        out = tmp_path / f"{source}-out"
        done = prepare_images([str(tmp_path / source)], out, holdout=0.2, shard_images=64)
        assert (done.size, done.classes) == ((8, 8), tuple(names))
        assert (note in (done.note or "")) if note else done.note is None
        train, held = pixels_of(out, "train"), pixels_of(out, "validation")
        assert {**train, **held} == expected
        assert not train.keys() & held.keys()
        assert 20 < done.images["validation"] < 60
        assert len(done.manifest["splits"]["train"]) == -(-done.images["train"] // 64)


def test_several_sources_and_a_test_split(tmp_path: Path) -> None:
    """Two parts of a training set follow each other. Copies of an image are in the same split."""
    sources = [write_noise(tmp_path / f"{n}.parquet", seed=n) for n in (0, 1)]
    test = write_noise(tmp_path / "test.parquet", 10, seed=2)
    done = prepare_images([str(sources[0]), str(sources[1]), str(sources[0])], tmp_path / "out",
                          test_sources=[str(test)], holdout=0.3)  # fmt: skip
    assert done.images["train"] + done.images["validation"] == 120
    assert done.images["test"] == 10
    assert not pixels_of(tmp_path / "out", "train").keys() & pixels_of(tmp_path / "out", "validation").keys()
    assert np.array_equal(open_images(tmp_path / "out", "test").read(np.arange(10)), noise(10, seed=2))


def test_what_the_note_says(tmp_path: Path) -> None:
    """Classes without training images, and test images that are training images too, are probably a mistake."""
    source = write_noise(tmp_path / "0.parquet", metadata={"classes": "even\nodd\nnone"})
    apart = write_noise(tmp_path / "1.parquet", 10, metadata={"classes": "even\nodd\nnone"}, seed=1)
    done = prepare_images([str(source)], tmp_path / "out", test_sources=[str(apart), str(source)])
    assert done.note is not None
    assert "1 of 3 classes have no training image" in done.note
    assert "40 test image(s) are among the training sources too" in done.note
    whole = write_noise(tmp_path / "2.parquet")
    other = write_noise(tmp_path / "3.parquet", 10, seed=1)
    assert prepare_images([str(whole)], tmp_path / "out2", test_sources=[str(other)]).note is None


def test_class_names(tmp_path: Path) -> None:
    """They are in the schema's metadata in two ways. Without them, classes have the names of their labels."""
    for number, (metadata, names) in enumerate(
        [({"classes": "even\nodd"}, ("even", "odd")), ({"huggingface": "{"}, ("0", "1")), ({}, ("0", "1"))]
    ):
        source = write_noise(tmp_path / f"{number}.parquet", metadata=metadata)
        assert prepare_images([str(source)], tmp_path / f"out{number}").classes == names


def test_the_hub(tmp_path: Path) -> None:
    """A data set by the library `datasets`, from a local folder: the same images as by pyarrow."""
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    (tmp_path / "set").mkdir()
    raw = [{"bytes": encoded(image), "path": None} for image in noise(20)]
    path = write_table(tmp_path / "set/train.parquet", raw, [n % 2 for n in range(20)])
    for name, source in (("hub", f"hf:{tmp_path / 'set'}"), ("file", str(path))):
        assert prepare_images([source], tmp_path / name, holdout=0).classes == tuple(NAMES)
    assert pixels_of(tmp_path / "hub", "train") == pixels_of(tmp_path / "file", "train")
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(encoded(noise(1)[0]))
    with pytest.raises(UserError, match=r"row 0: no bytes .*give a folder of images without hf:"):
        prepare_images([f"hf:{tmp_path / 'photos'}"], tmp_path / "out")


def test_other_columns(tmp_path: Path) -> None:
    source = write_table(tmp_path / "s.parquet", [encoded(one) for one in noise(9)], [0, 1, 1] * 3, {}, ("img", "fine"))
    done = prepare_images([str(source)], tmp_path / "out", holdout=0, options=ImageOptions("img", "fine"))
    assert done.images == {"train": 9}


def test_greyscale_and_palette_images_are_converted_on_request() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    three = np.repeat(grey[..., None], 3, axis=2)
    for mode in ("L", "P"):
        assert np.array_equal(decode(RawImage("x", encoded(grey, mode=mode), 0, None), convert=True), three)


def test_a_rotation_in_exif_data_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    stream = io.BytesIO()
    Image.fromarray(noise(1, 8, 4)[0]).save(stream, "PNG", exif=exif)
    assert np.array_equal(decode(RawImage("x", stream.getvalue(), 0, None)), np.rot90(noise(1, 8, 4)[0], -1))


def test_cifar(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/cifar/cifar10-test.parquet"
    if not source.is_file():
        pytest.skip("no CIFAR-10 in the folder 'shared' beside the repository")
    few = next(parquet.ParquetFile(source).iter_batches(300))
    parquet.write_table(pa.Table.from_batches([few]), tmp_path / "few.parquet")
    done = prepare_images([str(tmp_path / "few.parquet")], tmp_path / "out")
    assert (sum(done.images.values()), done.size) == (300, (32, 32))
    assert done.classes[0] == "airplane"
    [batch] = image_batches(open_images(tmp_path / "out", "train", verify=True), 300)
    assert 0.3 < float(batch.images_BCHW.std()) < 0.7


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def animated() -> bytes:
    stream = io.BytesIO()
    first, *rest = (Image.fromarray(image) for image in noise(3))
    first.save(stream, "PNG", save_all=True, append_images=rest)
    return stream.getvalue()


GOOD = encoded(noise(1)[0])
GREY = np.zeros((6, 6), np.uint8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (encoded(noise(1, 6, 5)[0]), "6 x 5 pixels .*first image has 6 x 6"),
        (encoded(GREY), "mode L .*--convert"),
        (encoded(noise(1)[0], mode="P"), "mode P .*--convert"),
        (encoded(noise(1)[0], mode="RGBA"), "mode RGBA, not RGB"),
        (encoded(GREY.astype(np.uint16)), "mode I;16, not RGB"),
        (encoded(noise(1)[0], "JPEG", "CMYK"), "mode CMYK, not RGB"),
        (encoded(noise(1)[0], "GIF"), "not an image"),
        (b"", "not an image"),
        (b"text", "not an image"),
        (GOOD[:-20], "damaged image"),
        (GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:], "damaged image"),
        (png_header(6, 6), "damaged image"),
        (png_header(2049, 2048), "2049 x 2048 pixels, but at most"),
        (png_header(20_000, 20_000), "more than 4194304 pixels|at most 4194304"),
        (png_header(2**31 - 1, 2**31 - 1), "more than 4194304 pixels|at most 4194304"),
        (animated(), r"animated image \(3 frames\)"),
        (None, "no bytes of an image"),
        ({"bytes": None, "path": "/etc/passwd"}, "no bytes of an image"),
    ],
)
def test_bad_images_are_named(image: Any, message: str, tmp_path: Path) -> None:
    """The error names the file and the row, and nothing is written."""
    good = {"bytes": GOOD, "path": None} if isinstance(image, dict) else GOOD
    source = write_table(tmp_path / "s.parquet", [good, good, image, good], [0, 1, 0, 1])
    with pytest.raises(UserError, match=rf"s\.parquet: row 2: .*({message})"):
        prepare_images([str(source)], tmp_path / "out", holdout=0)
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], r"row 1: no label"),
        ([0, 1, -1], "row 2: label -1 is negative"),
        ([0, 2, 1], "row 1: label 2, but there are 2 classes"),
        ([0, 2**40, 1], "row 1: label 1099511627776, but"),
        ([0.0, 1.0, 1.0], r"row 0: label '0\.0' is not an integer"),
        (["a", "b", "a"], "row 0: label 'a' is not an integer"),
        ([True, False, True], "row 0: label 'True' is not an integer"),
    ],
)
def test_bad_labels_are_named(labels: list[Any], message: str, tmp_path: Path) -> None:
    source = write_table(tmp_path / "s.parquet", [GOOD] * 3, labels)
    with pytest.raises(UserError, match=message):
        prepare_images([str(source)], tmp_path / "out", holdout=0)
    if labels[1] == 2**40:  # also without class names
        source = write_table(tmp_path / "s.parquet", [GOOD] * 3, labels, {})
        with pytest.raises(UserError, match="at most 65536 classes are possible"):
            prepare_images([str(source)], tmp_path / "out", holdout=0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (hugging_face(["even", "uneven"]), "class 1 is 'uneven', but in the first source 'odd'"),
        (hugging_face(["odd", "even"]), "class 0 is 'odd'"),
        (hugging_face(["even", "odd", "more"]), "3 classes, but the first has 2"),
        ({}, "has no class names"),
        (hugging_face(["even", "even"]), "two classes are named 'even'"),
        ({"classes": ""}, "not a list of texts"),
        ({"classes": "even\n\x1b[31modd"}, "unprintable"),
    ],
)
def test_classes_of_two_sources_that_differ(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    first, other = write_noise(tmp_path / "a.parquet"), write_noise(tmp_path / "b.parquet", metadata=metadata)
    for sources, test_sources in (([first], [other]), ([first, other], [])):
        with pytest.raises(UserError, match=message):
            prepare_images(list(map(str, sources)), tmp_path / "out", test_sources=list(map(str, test_sources)))


def test_a_test_label_without_a_training_class(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a.parquet", [encoded(one) for one in noise(4)], [0, 1, 0, 1], {})
    other = write_table(tmp_path / "b.parquet", [GOOD] * 2, [1, 2], {})
    with pytest.raises(UserError, match="row 1: label 2, but training has 2 classes"):
        prepare_images([str(first)], tmp_path / "out", test_sources=[str(other)], holdout=0)


def test_a_link_that_puts_an_image_into_two_classes_is_refused(tmp_path: Path) -> None:
    for name, pixels in zip(("cat", "dog"), noise(2), strict=True):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "0.png").write_bytes(encoded(pixels))
    (tmp_path / "source/dog/all").symlink_to("..")
    with pytest.raises(UserError, match="a link puts this image of class cat into class dog too"):
        prepare_images([str(tmp_path / "source")], tmp_path / "out", holdout=0)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/1.png").write_bytes(GOOD)
    (tmp_path / "hollow/cat").mkdir(parents=True)
    (tmp_path / "rotten/cat").mkdir(parents=True)
    (tmp_path / "rotten/cat/1.png").write_bytes(GOOD[:80])
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "torn.parquet").write_bytes(write_noise(tmp_path / "s.parquet").read_bytes()[:-9])
    write_table(tmp_path / "none.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    for name, message in {
        "flat": "no folder in it",
        "hollow": "cat: no image in the folder of this class",
        "rotten": r"1\.png: (damaged|not an image)",
        "text.txt": r"not a \.parquet file or a folder",
        "torn.parquet": r"cannot read .*torn\.parquet",
        "none.parquet": "no image in it",
        "missing": "no such file or folder",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare_images([str(tmp_path / name)], tmp_path / "out", holdout=0)
    for options, message in (
        (ImageOptions("img"), "no column 'img'; it has: image, label .*--image-key"),
        (ImageOptions(label_key="fine"), "no column 'fine'.*--label-key"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_images([str(tmp_path / "s.parquet")], tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_python_callers_mistakes(tmp_path: Path) -> None:
    source = str(write_noise(tmp_path / "s.parquet", 3))
    for options, message in (
        ({"sources": []}, "no source"),
        ({"sources": [""]}, "no source"),
        ({"test_sources": [source, ""]}, "no source"),
        ({"holdout": 1.0}, "holdout must be"),
        ({"shard_images": 0}, "images per shard"),
        ({"holdout": 1e-9}, "left for validation"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_images(**{"sources": [source], "out": tmp_path / "out", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "PPM"])
def test_an_image_cut_anywhere_is_refused(kind: str) -> None:
    raw = encoded(noise(1, 4, 4)[0], kind)
    for end in range(len(raw)):
        with pytest.raises(UserError, match=r"^here: "):
            decode(RawImage("here", raw[:end], 0, None))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_png_is_refused_or_has_the_same_pixels(data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        pixels = decode(RawImage("here", bytes(raw), 0, None))
    except UserError as error:
        assert str(error).startswith("here: ")
    else:
        assert np.array_equal(pixels, noise(1)[0])


# ---------------------------------------------------------------------------------------------------------------
# Damaged directories


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    prepare_images([str(write_noise(folder / "s.parquet"))], folder / "out", holdout=0.3, shard_images=10)
    return folder / "out"


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_files_are_refused(made: Path, tmp_path: Path) -> None:
    for number, (name, change, message) in enumerate(
        [
            ("train-00000.pixels.bin", lambda raw: raw[:-1], "truncated: 1079 bytes instead of 1080"),
            ("train-00000.pixels.bin", lambda raw: raw + b"x", "too long"),
            ("train-00000.pixels.bin", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], "damaged: its SHA-256"),
            ("train-00001.labels.bin", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], "damaged: its SHA-256"),
            ("manifest.json", lambda raw: raw[:-9], "not JSON"),
            ("manifest.json", lambda raw: raw.replace(b'"odd"', b'"ode"'), "its checksum is wrong"),
        ]
    ):
        copy = Path(shutil.copytree(made, tmp_path / str(number)))
        (copy / name).write_bytes(change((copy / name).read_bytes()))
        with pytest.raises(UserError, match=message):
            open_images(copy, "train", verify=True)
    (copy / "train-00000.pixels.bin").unlink()
    with pytest.raises(UserError, match="No such file"):
        open_images(copy, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="recurrent_db.tokens"), "not a manifest of images"),
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(size=[6, -6]), "damaged: the size"),
        (lambda m: m.update(size=[2**20, 2**20]), "damaged: images of 1048576 x 1048576"),
        (lambda m: m.update(size=True), "damaged: the size"),
        (lambda m: m.update(classes=["a", 1]), "damaged: the class names"),
        (lambda m: m.update(classes=["a"]), "a label is outside the 1 classes"),
        (lambda m: m.update(splits=[]), "damaged: no splits"),
        (lambda m: m["splits"]["train"][0].pop("sha256"), "lacks its files and checksums"),
        (lambda m: m["splits"]["train"][0].update(images=-1), "lacks its number"),
        (lambda m: m["splits"]["train"][0].update(images=10**15), "truncated"),
        (lambda m: m["splits"]["train"][0].update(file="../x"), "points outside"),
        (lambda m: m["splits"]["train"][0].update(labels_file="/etc/passwd"), "points outside"),
        (lambda m: m["splits"].pop("train"), r"no 'train' split \(it has: validation\)"),
    ],
)
def test_bad_manifests_are_refused(change: Callable[[Any], object], message: str, made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    edit(copy, change)
    with pytest.raises(UserError, match=message):
        open_images(copy, "train")


def test_the_two_kinds_of_data_are_told_apart(made: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a manifest of token shards"):
        open_data(made, "train")
    with pytest.raises(UserError, match="not a manifest of images"):
        open_images(data_dir, "train")
    with pytest.raises(UserError, match=r"no such data directory; make one with train/prepare_images\.py"):
        open_images(tmp_path / "none", "train")


def test_the_hash_names_the_data(made: Path, tmp_path: Path) -> None:
    """The same images have the same hash, wherever they come from. It is that of all splits."""
    shutil.copy(made.parent / "s.parquet", tmp_path / "other.parquet")
    prepare_images([str(tmp_path / "other.parquet")], tmp_path / "same", holdout=0.3, shard_images=10)
    prepare_images([str(tmp_path / "other.parquet")], tmp_path / "other", holdout=0.2, shard_images=10)
    hashes = [open_images(folder, "train").hash for folder in (made, tmp_path / "same", tmp_path / "other")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert open_images(made, "validation").hash == hashes[0]


# ---------------------------------------------------------------------------------------------------------------
# Shards -> batches


def numbered(count: int, side: int = 4) -> ImageData:
    """Images whose pixels all differ, so that each and each of its parts are recognised."""
    images = np.arange(count * side * side * 3, dtype=np.uint32).reshape(count, side, side, 3)
    return ImageData.from_arrays((images * 7 % 251 + 1).astype(np.uint8), np.arange(count) % 3, ("a", "b", "c"))


def order(loader: ImageLoader, start: int, count: int) -> list[int]:
    return loader.locate(np.arange(start, start + count))[1].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 100))
def test_every_image_is_seen_once_per_epoch(count: int, epoch: int, seed: int) -> None:
    loader = ImageLoader(numbered(count, 1), 4, seed)
    assert sorted(order(loader, epoch * count, count)) == list(range(count))


def test_epochs_and_seeds_have_other_orders() -> None:
    loader = ImageLoader(numbered(50), 10)
    orders = [order(loader, 0, 50), order(loader, 50, 50), order(ImageLoader(numbered(50), 10, seed=1), 0, 50)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert loader.epochs(5) == 1.0


def same(first: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_number_of_processes_changes_nothing(world: int, made: Path) -> None:
    """Nor do micro-batches, nor a loader that was made anew, as after a resume."""
    data = open_images(made, "train")
    loader = ImageLoader(data, 8, seed=3, flip=True, crop_padding=2)
    for step in range(8):
        whole = loader.batch(step)
        anew = ImageLoader(open_images(made, "train"), 8, seed=3, flip=True, crop_padding=2)
        parts = [micro for rank in range(world) for micro in anew.micro_batches(step, 3, rank, world)]
        for name in ("images_BCHW", "labels_B", "sample_index_B"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    [ahead] = next(iter(prefetch(loader, 7, 8, torch.device("cpu"), thread=True)))
    assert same(ahead, whole)
    assert same(whole.slice(2, 4), loader.batch(7, micro=(2, 4)))


def test_a_batch(made: Path) -> None:
    data = open_images(made, "train")
    batch = ImageLoader(data, 5).batch(1)
    index = order(ImageLoader(data, 5), 5, 5)
    assert batch.images_BCHW.shape == (5, 3, 6, 6)
    assert (batch.images_BCHW.dtype, batch.labels_B.dtype) == (torch.float32, torch.int64)
    assert batch.sample_index_B.tolist() == [5, 6, 7, 8, 9]
    assert np.array_equal(to_pixels(batch.images_BCHW), data.read(np.array(index)))
    assert batch.labels_B.tolist() == data.labels[index].tolist()


def test_pixels_and_floats() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    floats = from_pixels(every)
    assert (float(floats.min()), float(floats.max())) == (-1, 1)
    assert np.array_equal(to_pixels(floats), every)
    assert to_pixels(torch.tensor([[[[-9.0]], [[9.0]], [[0.0]]]])).tolist() == [[[[0, 255, 128]]]]


def test_flips_and_crops_are_parts_of_the_image() -> None:
    """Each augmented image is one of the mirrored and shifted ones. All of them occur, about equally often."""
    data = numbered(1)
    plain = data.read(np.array([0]))[0]
    padded = np.pad(plain, ((1, 1), (1, 1), (0, 0)))
    possible = {}
    for flipped in (False, True):
        for y in range(3):
            for x in range(3):
                part = padded[y : y + 4, x : x + 4]
                # The cut is made first, then mirrored.
                possible[(part[:, ::-1] if flipped else part).tobytes()] = 0
    assert len(possible) == 18
    for image in to_pixels(ImageLoader(data, 1800, flip=True, crop_padding=1).batch(0).images_BCHW):
        possible[image.tobytes()] += 1
    assert min(possible.values()) > 60
    assert max(possible.values()) < 140


def test_augmentation_is_keyed_by_seed_and_position() -> None:
    def images(seed: int, **options: Any) -> torch.Tensor:
        # One image only, so that the order is the same for every seed.
        return ImageLoader(numbered(1), 64, seed, **options).batch(0).images_BCHW

    for options in ({"flip": True}, {"crop_padding": 2}):
        assert torch.equal(images(0, **options), images(0, **options))
        assert not torch.equal(images(0, **options), images(1, **options))
        assert len(torch.unique(images(0, **options), dim=0)) > 1


def test_held_out_images_are_not_augmented() -> None:
    data = numbered(11)
    whole = list(image_batches(data, 4))
    assert [len(batch) for batch in whole] == [4, 4, 3]
    assert np.array_equal(np.concatenate([to_pixels(batch.images_BCHW) for batch in whole]), data.read(np.arange(11)))
    parts = [index for rank in range(3) for batch in image_batches(data, 2, rank=rank, world=3)
             for index in batch.sample_index_B.tolist()]  # fmt: skip
    assert sorted(parts) == list(range(11))
    assert [batch.sample_index_B.tolist() for batch in image_batches(data, 9, max_images=3)] == [[0, 3, 7]]


def test_mistakes_of_the_loader(made: Path) -> None:
    data = open_images(made, "train")
    for options, message in (
        ({"batch_size": 0}, "batch size must be"),
        ({"crop_padding": 7}, "crop_padding must be 0 to 6"),
        ({"crop_padding": -1}, "crop_padding must be"),
    ):
        with pytest.raises(UserError, match=message):
            ImageLoader(**{"data": data, "batch_size": 4, **options})
    with pytest.raises(UserError, match="does not divide evenly among 3 processes"):
        ImageLoader(data, 4).batch(0, world=3)
    with pytest.raises(IndexError):
        data.read(np.array([len(data)]))


def test_a_shard_truncated_while_in_use(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    data = open_images(copy, "train")
    for path in copy.glob("train-*.pixels.bin"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="truncated while in use"):
        ImageLoader(data, 4).batch(0)


# ---------------------------------------------------------------------------------------------------------------
# The command


def test_command_line(script_here: Script, tmp_path: Path) -> None:
    source, out = write_noise(tmp_path / "s.parquet"), tmp_path / "out"
    run = ("train/prepare_images.py", "--source", source, "--out", out, "--holdout", "0.3")
    done = script_here(*run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 images (" in done.stdout
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for words, message in (
        ((), "exists already"),
        (("--overwrite", "--label-key", "fine"), "no column 'fine'"),
        (("--source", source), "given twice"),
        (("--test-source", source, "--test-source", source), "given twice"),
        (("--holdout", "nan"), "holdout"),
    ):
        failed = script_here(*run, *words)
        assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
        assert message in failed.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert script_here(*run, "--overwrite").returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_commands_of_the_guide(script_here: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_noise(tmp_path / "train.parquet")
    write_noise(tmp_path / "test.parquet", 10, seed=1)
    for number, image in enumerate(noise(40, seed=2)):
        (tmp_path / "photos" / NAMES[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / NAMES[number % 2] / f"{number}.png").write_bytes(encoded(image))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    here = [block for block in blocks(ROOT / "docs/guides/images.md") if block.run_by == "tests/data/test_images.py"]
    assert here
    for block in here:
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
            continue
        for line in commands(block.code):
            done = script_here(*line.removeprefix("python ").split())
            assert done.returncode == 0, done.stderr
