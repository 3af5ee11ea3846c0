"""benchmarks/paper/vision.py at a size of seconds, on scikit-learn's digits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from recurrent_db.data import open_images
from recurrent_db.data.image_shards import ImageWriter
from recurrent_db.evaluation.image_metrics import save_extractor, train_extractor

SMALL = (
    "model.d_model=16 model.n_heads=2 model.d_mlp=32 model.d_condition=8 model.patch_size=4 model.n_core=6"
    " data.batch_size=16 eval.tokens=300"
)
SCRIPT = "benchmarks/paper/vision.py"
Script = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in three splits."""
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    folder = tmp_path_factory.mktemp("vision") / "digits"
    with ImageWriter(folder) as writer:
        for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            pixels = (image * 15).astype(np.uint8)[..., None].repeat(3, axis=2)
            split = "train" if number < 900 else "validation" if number < 1000 else "test"
            writer.add(split, pixels.tobytes(), label)
        writer.commit((8, 8), [f"digit {n}" for n in range(10)], {})
    return folder


def words(folder: Path, *more: object) -> list[object]:
    return [
        SCRIPT, "--work", folder / "work", "--results", folder / "results", "--options", SMALL, "--budget-flops", "4e8",
        "--device", "cpu", *more,
    ]  # fmt: skip


def test_classifiers_are_compared_and_a_second_call_only_prints(
    script_here: Script, data: Path, tmp_path: Path
) -> None:
    call = words(tmp_path, "--data", data, "--arms", "vit,blocks-3", "--seeds", "0", "--rates", "1e-3", "3e-3")
    first = script_here(*call)
    assert first.returncode == 0, first.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results/vision/digits").glob("*.json")}
    assert results.keys() == {"vit-seed0", "blocks-3-seed0"}
    for found in results.values():
        assert found["images"] == 797
        assert 4e8 <= found["flops"] < 4.5e8
        last = str(max(1, found["blocks"]))
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["correct"][last]), np.uint8), count=797)
        assert bits.mean() == pytest.approx(found["accuracy"][last])
    rows = [line.split(" | ") for line in first.stdout.splitlines() if re.match(r"\| (vit|blocks)", line)]
    assert [row[0][2:] for row in rows] == [
        "vit", *(f"blocks-3, block {b} alone" for b in (1, 2, 3)), "blocks-3", "blocks-3, 6 steps",
    ]  # fmt: skip
    assert float(rows[0][2]) == pytest.approx(100 * results["vit-seed0"]["accuracy"]["1"], abs=0.01)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 2 * 2 + 1 + 1
    second = script_here(*call)
    assert second.stdout == first.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    other = script_here(*call, "--budget-flops", "5e8")
    assert other.returncode == 2
    assert "was made with another budget_flops" in other.stderr


def test_generators_are_compared_under_one_extractor(script_here: Script, data: Path, tmp_path: Path) -> None:
    arms = "--data", data, "--arms", "dit-3-uniform,vit-4x3", "--seeds", "0", "--rates", "1e-3"
    told = script_here(*words(tmp_path, *arms))
    assert (told.returncode, "need --extractor" in told.stderr) == (2, True)
    save_extractor(train_extractor(open_images(data, "train"), epochs=1), tmp_path / "e.safetensors")
    sizes = "--extractor", tmp_path / "e.safetensors", "--samples", "640", "--sampler-steps", "3"
    found = script_here(*words(tmp_path, *arms, *sizes))
    assert found.returncode == 0, found.stderr
    rows = [line.split(" | ") for line in found.stdout.splitlines() if line.startswith("| dit")]
    assert [row[0][2:] for row in rows] == ["dit-3-uniform"]
    averaged = json.loads((tmp_path / "results/vision/digits/vit-4x3-seed0.json").read_text())
    assert 4e8 <= averaged["flops"] < 5e8  # over its three networks
    assert len(list((tmp_path / "work/digits").glob("vit-4x3-seed0*/metrics.jsonl"))) == 3
    assert all(float(row[3]) > float(row[5].rstrip(" |")) > 0 for row in rows)
    assert (tmp_path / "work/digits/dit-3-uniform-seed0.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "vit,vitt"], "unknown arm 'vitt'; choose from vit, blocks-3"),
        (["--options", "optim.lr"], "--options takes KEY=VALUE pairs"),
    ],
)
def test_a_mistake_is_one_line(script_here: Script, data: Path, tmp_path: Path, more: list[str], message: str) -> None:
    told = script_here(*words(tmp_path, "--data", data), *more)
    assert told.returncode == 2
    assert message in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
