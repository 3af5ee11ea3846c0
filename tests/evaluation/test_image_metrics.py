"""Distances between sets of images against independent formulas, and the extractor: same weights again, saved and loaded."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_db.data import ImageData
from recurrent_db.data.image_loader import from_pixels
from recurrent_db.data.image_shards import ImageWriter
from recurrent_db.errors import UserError
from recurrent_db.evaluation.image_metrics import (
    FEATURES,
    LEAST_SAMPLES,
    Extractor,
    compare,
    floor,
    frechet_distance,
    kernel_distance,
    load_extractor,
    save_extractor,
    train_extractor,
)

fast = pytest.mark.fast
needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None,
    reason="the extra `vision` is not installed",
)
Script = Callable[..., "CompletedProcess[str]"]


def features(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated features with a mean that is not 0."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 1 + shift)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """The 1797 digits of scikit-learn, 8 x 8 pixels, as RGB."""
    found = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    images = np.repeat((found.images * 15).astype(np.uint8)[..., None], 3, axis=3)
    return ImageData.from_arrays(images, found.target, [str(n) for n in range(10)])


def part(data: ImageData, start: int, stop: int) -> ImageData:
    pixels = data.read(np.arange(start, stop))
    return ImageData.from_arrays(pixels, data.labels[start:stop], data.classes)


@pytest.fixture(scope="module")
def extractor(digits: ImageData) -> Extractor:
    return train_extractor(part(digits, 0, 1100), epochs=10)


# ---------------------------------------------------------------------------------------------------------------
# Distances against independent references


def matrix_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance by the symmetric root: tr (S_a^1/2 S_b S_a^1/2)^1/2."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = matrix_root(cov_a)
    cross = np.trace(matrix_root(root @ cov_b @ root))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD, term by term."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n = len(a)
    within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(x, y) for x in a for y in b) / n**2


@needs_torchmetrics
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000), st.floats(-3, 3))
def test_frechet_distance_against_the_closed_form(width: int, seed: int, shift: float) -> None:
    a, b = features(80, width, seed), features(50, width, seed + 1, shift)
    assert frechet_distance(a, b) == pytest.approx(closed_form(a.numpy(), b.numpy()), rel=1e-6, abs=1e-6)


@needs_torchmetrics
def test_frechet_distance_of_known_distributions() -> None:
    """Points at the corners of a cube of side 2 s have covariance s^2 I (times n / (n - 1)); shifted by 3 in one of 2
    dimensions: 3^2 + 2 (1 - 2)^2 for s of 1 and 2."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).repeat(1000, 1)
    shifted = 2 * corners + torch.tensor([3.0, 0])
    assert frechet_distance(corners, shifted) == pytest.approx(9 + 2 * 4000 / 3999, rel=1e-6)


@needs_torchmetrics
@pytest.mark.parametrize("seed", range(3))
def test_kernel_distance_against_brute_force(seed: int) -> None:
    a, b = features(15, 6, seed), features(15, 6, seed + 50, 0.5)
    mean, deviation = kernel_distance(a, b, subsets=3)
    assert mean == pytest.approx(brute_force(a.numpy(), b.numpy()), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9 * abs(mean))  # each subset is the whole set
    # Features in float32 are summed in float64 too.
    a, b = a.float(), b.float()
    assert kernel_distance(a, b, 1)[0] == pytest.approx(brute_force(a.numpy(), b.numpy()), rel=1e-9)


@needs_torchmetrics
def test_properties_of_the_distances() -> None:
    a, b = features(300, FEATURES, 0), features(300, FEATURES, 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1
    assert kernel_distance(a, b, 1)[0] == pytest.approx(kernel_distance(b, a, 1)[0], rel=1e-9)
    shuffled = a[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert frechet_distance(shuffled, b) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@needs_torchmetrics
def test_the_subsets_are_the_same_in_every_call() -> None:
    """And the random numbers of the caller are left alone."""
    a, b = features(300, 8, 0), features(300, 8, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kernel_distance(a, b, 10, 50)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert kernel_distance(a, b, 10, 50) == first
    assert first[1] > 0


# ---------------------------------------------------------------------------------------------------------------
# The extractor


def test_training_twice_gives_the_same_weights(digits: ImageData) -> None:
    """Whatever the global random numbers are; another seed gives other weights."""
    few = part(digits, 0, 300)
    first = train_extractor(few, seed=1, epochs=2)
    torch.manual_seed(99)
    again, other = train_extractor(few, seed=1, epochs=2), train_extractor(few, seed=2, epochs=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert first.hash == again.hash != other.hash
    assert first.record == {"data": few.hash, "seed": 1, "epochs": 2}


def test_it_learns(digits: ImageData, extractor: Extractor) -> None:
    assert extractor.accuracy(part(digits, 1100, 1797)) > 0.8  # chance is 0.1
    lines: list[str] = []
    train_extractor(part(digits, 0, 200), epochs=2, progress=lines.append)
    assert [line.split(",")[0] for line in lines] == ["extractor: epoch 1 of 2", "extractor: epoch 2 of 2"]


@fast
@pytest.mark.parametrize("size", [(8, 8), (9, 21), (32, 32)])
def test_features_of_any_size(size: tuple[int, int]) -> None:
    network = Extractor(3, seed=0).train()
    images = torch.rand(5, 3, *size) * 2 - 1
    found = network.features(images, batch_size=2)
    assert (found.shape, found.dtype) == ((5, FEATURES), torch.float64)
    assert network.training
    assert torch.allclose(found, network.features(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(network.features(3 * images), network.features((3 * images).clamp(-1, 1)))
    assert network.eval()(images).shape == (5, 3)
    assert torch.allclose(network.double().features(images.double()), found, rtol=1e-4, atol=1e-4)


@fast
def test_its_size() -> None:
    assert 100_000 < sum(p.numel() for p in Extractor(10).parameters()) < 300_000


def test_features_of_an_image_do_not_depend_on_its_neighbours(extractor: Extractor, digits: ImageData) -> None:
    images = from_pixels(digits.read(np.arange(10)))
    assert torch.allclose(extractor.features(images)[3:4], extractor.features(images[3:4]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Saving and loading


@fast
def test_saved_and_loaded(tmp_path: Path) -> None:
    network = Extractor(4, seed=3)
    network.record = {"data": "abc", "seed": 3, "epochs": 1, "accuracy": 0.5}
    save_extractor(network, tmp_path / "new" / "e.safetensors")
    loaded = load_extractor(tmp_path / "new" / "e.safetensors")
    assert (loaded.hash, loaded.classes, loaded.record) == (network.hash, 4, network.record)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.features(images), network.features(images))
    assert not loaded.training


@fast
def test_the_hash_names_the_weights() -> None:
    network = Extractor(4)
    before = network.hash
    assert before == Extractor(4).hash != Extractor(4, seed=1).hash
    with torch.no_grad():
        network.body[1].running_mean[0] += 1e-3
    assert network.hash != before


@fast
def test_files_that_are_no_extractor(tmp_path: Path) -> None:
    path, network = tmp_path / "e.safetensors", Extractor(2)
    network.record = {"seed": 7}
    save_extractor(network, path)
    raw, seed = path.read_bytes(), b'seed\\": '
    assert seed + b"7" in raw
    weights, ours = safetensors.torch.load(raw), {"format": "recurrent_db.extractor"}
    for content, message in (
        (b"", "not safetensors, or damaged"),
        (b"\x80\x04pickle", "not safetensors, or damaged"),
        (raw[:-1], "not safetensors, or damaged"),
        (raw[:-1] + bytes([raw[-1] ^ 1]), "damaged: its checksum"),
        (raw.replace(seed + b"7", seed + b"8"), "damaged: its checksum"),
        (safetensors.torch.save({"w": torch.zeros(2)}), "not an extractor"),
        (safetensors.torch.save(weights, {"format": "pt"}), "not an extractor"),
        (safetensors.torch.save(weights, ours), "damaged: its checksum"),
        (safetensors.torch.save(weights, {**ours, "about": "[" * 9999}), "damaged: its checksum"),
        (safetensors.torch.save(weights, {**ours, "about": "[1]"}), "damaged: its checksum"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_extractor(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_extractor(tmp_path / "missing")
    with pytest.raises(UserError, match="no such file"):
        load_extractor(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        save_extractor(network, path / "inside a file")


@fast
@pytest.mark.parametrize("change", ["more classes", "lost", "half"])
def test_sealed_files_with_other_weights(change: str, tmp_path: Path) -> None:
    """Their checksums are right, so only the comparison with the network finds them."""
    network = Extractor(2)
    if change == "more classes":
        network.classes = 3
    elif change == "lost":
        del network.body[1].running_mean
    else:
        network.half()
    save_extractor(network, tmp_path / "e")
    with pytest.raises(UserError, match="other names, shapes or types"):
        load_extractor(tmp_path / "e")


# ---------------------------------------------------------------------------------------------------------------
# Scores


@needs_torchmetrics
def test_noise_raises_the_distance_with_its_strength(extractor: Extractor, digits: ImageData) -> None:
    images = from_pixels(digits.read(np.arange(len(digits))))
    real, rest = images[1100:], images[:1100]
    noise = torch.randn(rest.shape, generator=torch.Generator().manual_seed(0))
    scores = [compare(extractor, real, rest + strength * noise) for strength in (0.0, 0.2, 0.4, 0.8)]
    for measure in ("frechet", "kid"):
        values = [getattr(score, measure) for score in scores]
        assert values == sorted(set(values))
    least = scores[0]
    assert (least.samples, least.real, least.extractor) == (1100, 697, extractor.hash)
    assert least == floor(extractor, part(digits, 0, 1100), extractor.features(real), 1100)
    assert extractor.hash[:12] in str(least)
    assert "FID" not in str(least)


@fast
def test_bad_input_of_the_scores() -> None:
    network, enough = Extractor(2), torch.zeros(LEAST_SAMPLES, FEATURES)
    for real, fake, message in (
        (
            enough,
            enough[1:],
            "639 generated images, but the distance needs at least 640, ten for each of the 64 features",
        ),
        (enough[1:], enough, "639 real images"),
        (enough, enough[:, 1:], r"\(640, 64\) and \(640, 63\)"),
        (enough, enough / 0, "NaN or infinity"),
        (enough, torch.zeros(LEAST_SAMPLES, 1, 8, 8), r"shape \(N, 3, H, W\)"),
        (enough, torch.zeros(LEAST_SAMPLES, 3, 8, 7), "at least 8, not"),
        (enough, torch.zeros(LEAST_SAMPLES, 3, 8, 8, dtype=torch.uint8), r"not torch\.uint8"),
        (enough, torch.full((LEAST_SAMPLES, 3, 8, 8), torch.nan), "images contain NaN"),
    ):
        with pytest.raises(UserError, match=message):
            compare(network, real, fake)
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(UserError, match="at least 2 samples"):
            distance(enough, enough[:1])
    small = ImageData.from_arrays(np.zeros((9, 7, 8, 3), np.uint8), np.zeros(9, np.int64), ["a"])
    with pytest.raises(UserError, match="7 x 8 pixels"):
        train_extractor(small)
    with pytest.raises(UserError, match="10 training images are asked for, but data \\(train\\) has 9"):
        floor(network, small, enough, 10)


@fast
def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, None)
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(UserError, match=r"library torchmetrics .*pip install 'recurrent-db\[vision\]'$"):
            distance(torch.zeros(9, 2), torch.zeros(9, 2))


# ---------------------------------------------------------------------------------------------------------------
# The benchmark


@needs_torchmetrics
def test_the_benchmark(digits: ImageData, script_here: Script, tmp_path: Path) -> None:
    with ImageWriter(tmp_path / "data") as writer:
        for number, (image, label) in enumerate(zip(digits.read(np.arange(1797)), digits.labels.tolist(), strict=True)):
            writer.add("train" if number < 1100 else "test", image.tobytes(), label)
        writer.commit((8, 8), digits.classes, {})
    words = ("benchmarks/paper/image_metric.py", "--data", tmp_path / "data", "--extractor", tmp_path / "e.safetensors",
             "--results", tmp_path / "results")  # fmt: skip
    failed = script_here(*words, "--samples", "1101")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)  # before the extractor is trained
    assert "--samples must be from 640 to the 1100 images of" in failed.stderr
    done = script_here(*words, "--samples", "900")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results/image-metric.json").read_text())
    assert result["extractor"]["hash"] == load_extractor(tmp_path / "e.safetensors").hash
    assert result["misses"] == []
    assert len(result["scores"]) == 8
    assert (tmp_path / "results/image-metric.md").read_text() == done.stdout
    assert "FID" not in done.stdout
