"""Scores of classifiers and samples of generators, against walks written out by hand in float64."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from doc_pages import Runner, blocks
from helpers import ROOT, load_script, make_checkpoint
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.config import load_config
from recurrent_db.data import ImageData
from recurrent_db.data.image_shards import ImageWriter
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.errors import UserError
from recurrent_db.evaluation.image_metrics import FEATURES, Extractor, save_extractor
from recurrent_db.evaluation.images import (
    GRID_COLUMNS,
    average,
    classify_images,
    default_steps,
    draw_grid,
    sample_images,
    sampling_levels,
    score_samples,
    walk_flops,
)
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.checkpoint import save_checkpoint
from recurrent_db.store.loading import ImageRun, load_image_run
from recurrent_db.store.train_state import TrainState

fast = pytest.mark.fast
Script = Callable[..., "CompletedProcess[str]"]
CLASSES = tuple(str(n) for n in range(10))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """60 of scikit-learn's digits, 8 x 8 pixels, as RGB."""
    found = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    images = np.repeat((found.images[:60] * 15).astype(np.uint8)[..., None], 3, axis=3)
    return ImageData.from_arrays(images, found.target[:60], CLASSES)


def image_run(objective: str, n_blocks: int = 2, layers: tuple[int, ...] = (), *options: str) -> ImageRun:
    """A run that was never trained, whose every parameter matters."""
    words = [
        "--objective.name", objective, "--model.n-prelude", "0", "--model.n-coda", "0", "--model.d-model", "12",
        "--model.n-heads", "2", "--model.d-mlp", "20", "--model.d-condition", "6", "--model.n-core", "3",
        "--model.patch-size", "4", "--model.n-blocks", str(n_blocks), "--budget.steps", "1", "--run.device", "cpu",
        "--model.block-layers", *map(str, layers or ((2, 1) if n_blocks == 2 else (3,) * (n_blocks > 0))),
        "--blocks.shared", "all", *options,
    ]  # fmt: skip
    if not n_blocks:
        at = words.index("--model.block-layers")
        del words[at : at + 1]
    config = load_config(None, words)
    config.model.image_size, config.model.n_classes = [8, 8], 10
    network = build_image_network(config, 0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("targets"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return ImageRun(network, ImageClasses(CLASSES, (8, 8), "data"), config, Path("runs/fake"))


def saved(run: ImageRun, folder: Path) -> Path:
    """A run directory of the run."""
    optimizer = torch.optim.AdamW(run.network.parameters())
    save_checkpoint(folder, run.config, run.images, run.network, optimizer, None, TrainState(), {})
    return folder


def blocks_of(run: ImageRun) -> DiffusionBlocks:
    assert isinstance(run.network, DiffusionBlocks)
    return run.network


def levels_by_hand(network: DiffusionBlocks, steps: int) -> list[float]:
    """Upper ends of intervals of equal probability, by bisection of the noise density's distribution function."""
    found = []
    for i in range(steps):
        low, high = network.density.sigma_min, network.density.sigma_max
        for _ in range(200):
            middle = math.sqrt(low * high)
            below = float(network.density.cdf(torch.tensor(middle, dtype=torch.float64))) < 1 - i / steps
            low, high = (middle, high) if below else (low, middle)
        found.append(high)
    return found


# -- classifiers ----------------------------------------------------------------------------------------------------------


def walk_by_hand(run: ImageRun, images: Tensor, eps_BD: Tensor, steps: int) -> list[Tensor]:
    """Probabilities of the classes at each step of a walk, in float64."""
    network, z = blocks_of(run), eps_BD.double() * 80.0
    levels = [*levels_by_hand(network, steps), 0.0]
    found = []
    for i, sigma in enumerate(levels[:-1]):
        number = 1 if i * len(network.held()) < steps else 2
        probabilities = network.logits(number, z, torch.full((len(z),), sigma, dtype=torch.float64), images).softmax(-1)
        targets = network.targets(number, torch.arange(10))
        estimate = probabilities @ targets
        z = estimate + levels[i + 1] / sigma * (z - estimate)
        found.append(probabilities)
    return found


@torch.no_grad()
def test_scores_are_those_of_a_walk_by_hand(digits: ImageData) -> None:
    run = image_run("denoise_class")
    scores = classify_images(run, digits, (1, 4), draws=2, seed=5, batch_size=7)
    images = torch.from_numpy(digits.read(np.arange(60))).permute(0, 3, 1, 2).double() / 127.5 - 1
    eps = [Rng(5, EVALUATION_STEP).normal(range(60), (12,), f"walk {draw}") for draw in range(2)]
    run.network.double()
    for steps, alone in ((1, []), (4, []), (2, [1, 2])):
        walks = torch.stack([torch.stack(walk_by_hand(run, images, one, steps)) for one in eps])
        expected = {block: walks[:, block - 1].mean(0) for block in alone} or {0: walks.mean((0, 1))}
        for block, probabilities in expected.items():
            found = scores.by_block[block] if block else scores.by_steps[steps]
            torch.testing.assert_close(found.double(), probabilities.log(), atol=2e-4, rtol=0)
    assert list(scores.by_steps) == [1, 4]
    assert list(scores.by_block) == [1, 2]
    # The steps differ, so the test would see if one stood in for another.
    assert not torch.allclose(scores.by_block[1], scores.by_block[2], atol=0.01)


def test_summary_and_correct(digits: ImageData) -> None:
    scores = classify_images(image_run("denoise_class"), digits, (2,))
    p_NC = scores.by_steps[2].double().exp().numpy()
    right = p_NC.argmax(1) == digits.labels
    nll = -np.log(p_NC[np.arange(60), digits.labels])
    s = scores.summary(scores.by_steps[2])
    assert scores.correct(2).tolist() == right.tolist()
    assert 0 < s.accuracy < 1
    assert (s.accuracy, s.nll) == pytest.approx((right.mean(), nll.mean()))
    assert s.accuracy_stderr == pytest.approx(math.sqrt(s.accuracy * (1 - s.accuracy) / 60))
    assert s.nll_stderr == pytest.approx(nll.std() / math.sqrt(60))
    assert torch.equal(scores.labels_N, torch.from_numpy(digits.labels))


def test_a_network_without_blocks(digits: ImageData) -> None:
    run = image_run("classify", 0)
    seen: list[int] = []
    scores = classify_images(run, digits, draws=3, batch_size=25, progress=seen.append)
    images = torch.from_numpy(digits.read(np.arange(60))).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = run.network(images).log_softmax(-1)
    torch.testing.assert_close(scores.by_steps[1], expected)
    assert seen == [25, 25, 10]
    assert scores.by_block == {}
    with pytest.raises(UserError, match="classify run, which has no walk"):
        classify_images(run, digits, (1, 3))


def test_one_block_alone(digits: ImageData) -> None:
    whole, alone, last = (image_run("denoise_class") for _ in range(3))
    blocks_of(alone).keep(1)
    blocks_of(last).keep(2)
    scores = classify_images(alone, digits, draws=2)
    torch.testing.assert_close(scores.by_steps[1], classify_images(whole, digits, (1,), draws=2).by_steps[1])
    assert list(scores.by_block) == [1]
    assert (default_steps(whole), default_steps(alone)) == ((1, 2, 4), (1,))
    with pytest.raises(UserError, match=r"only block 1 of 2: join the runs.*recurrent-db blocks join"):
        classify_images(alone, digits, (1, 2))
    with pytest.raises(UserError, match=r"only block 2 of 2: join"):
        classify_images(last, digits)


def test_average(digits: ImageData) -> None:
    one = classify_images(image_run("denoise_class"), digits, (1, 2))
    other = classify_images(image_run("denoise_class"), digits, (2, 3), seed=9)
    mean = average(one, other)
    assert list(mean.by_steps) == [2]
    expected = (one.by_steps[2].double().exp() + other.by_steps[2].double().exp()).div(2).log()
    torch.testing.assert_close(mean.by_steps[2].double(), expected, atol=1e-5, rtol=0)
    assert list(mean.by_block) == [1, 2]
    assert mean.flops == {2: one.flops[2] + other.flops[2]}
    with pytest.raises(UserError, match="different images"):
        average(one, dataclasses.replace(other, labels_N=other.labels_N.flip(0)))
    with pytest.raises(UserError, match="no scores"):
        average()


def test_data_that_does_not_fit(digits: ImageData) -> None:
    run = image_run("denoise_class")
    fewer = dataclasses.replace(digits, classes=CLASSES[:9])
    with pytest.raises(UserError, match=r"other classes than runs/fake was trained on \(9 and 10\)"):
        classify_images(run, fewer)
    with pytest.raises(UserError, match=r"runs/fake was trained on \('nine' and '9'\)"):
        classify_images(run, dataclasses.replace(digits, classes=(*CLASSES[:9], "nine")))
    larger = ImageData.from_arrays(np.zeros((2, 12, 8, 3), np.uint8), np.zeros(2), CLASSES)
    with pytest.raises(UserError, match="images of 12 x 8 pixels, but runs/fake was trained on 8 x 8"):
        classify_images(run, larger)
    with pytest.raises(UserError, match="denoise_image run, which generates images"):
        classify_images(image_run("denoise_image"), digits)


# -- samples --------------------------------------------------------------------------------------------------------------


def samples_by_hand(run: ImageRun, count: int, guidance: float, steps: int, heun: bool, seed: int) -> Tensor:
    """Images of a guided walk, in float64."""
    network = blocks_of(run)
    eps = Rng(seed, EVALUATION_STEP).normal(range(count), (3, 8, 8), "sample")
    label, free = torch.arange(count) % 10, torch.full((count,), 10)
    levels, z = [*levels_by_hand(network, steps), 0.0], eps.double() * 80.0

    def estimate(z: Tensor, sigma: float) -> Tensor:
        number, sigma_B = 1 if sigma > network.partition.edges[1] + 1e-9 else 2, torch.full((count,), sigma).double()
        with_class, without = (network.denoise(number, z, sigma_B, label=which) for which in (label, free))
        return (1 - guidance) * without + guidance * with_class

    for sigma, following in itertools.pairwise(levels):
        d = estimate(z, sigma)
        ahead = d + following / sigma * (z - d)
        if heun and following:
            d = (d + estimate(ahead, following)) / 2
            ahead = d + following / sigma * (z - d)
        z = ahead
    return z


@fast
@torch.no_grad()
@pytest.mark.parametrize(("guidance", "steps", "sampler"), [(1.0, 4, "euler"), (2.5, 4, "euler"), (2.0, 3, "heun")])
def test_samples_are_those_of_a_walk_by_hand(guidance: float, steps: int, sampler: str) -> None:
    run = image_run("denoise_image")
    found = sample_images(run, 12, guidance, steps, sampler, seed=3, batch_size=5)
    run.network.double()
    images = samples_by_hand(run, 12, guidance, steps, sampler == "heun", seed=3)
    expected = ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() < 0.51  # rounded to whole numbers
    assert found.dtype == np.uint8
    assert (images.abs() < 1).double().mean() > 0.1  # not everything is clamped


@fast
def test_count_and_batch_size_change_no_sample() -> None:
    run = image_run("denoise_image")
    many = sample_images(run, 23, 2.0, 3, batch_size=23).astype(int)
    few = sample_images(run, 11, 2.0, 3, batch_size=4).astype(int)
    assert np.abs(many[:11] - few).max() <= 1
    other = sample_images(run, 11, 2.0, 3, seed=1, batch_size=4).astype(int)
    assert np.abs(other - few).max() > 1


def test_samples_that_are_refused(digits: ImageData) -> None:
    plain = image_run("denoise_image", 2, (), "--objective.denoise-image.label-dropout", "0")
    assert len(sample_images(plain, 2, steps=1)) == 2
    with pytest.raises(UserError, match="trained without label dropout, which guidance needs"):
        sample_images(plain, 2, guidance=2.0)
    run = image_run("denoise_image")
    with pytest.raises(UserError, match="no sampler 'ancestral' of images: choose from euler, heun"):
        sample_images(run, 2, sampler="ancestral")
    with pytest.raises(UserError, match="guidance must be a finite number, not nan"):
        sample_images(run, 2, guidance=math.nan)
    with pytest.raises(UserError, match="denoise_class run, which names classes"):
        sample_images(image_run("denoise_class"), 2)
    blocks_of(run).keep(2)
    with pytest.raises(UserError, match="only block 2 of 2: join"):
        sample_images(run, 2)
    few = np.zeros((10 * FEATURES - 1, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="639 generated images, but the distance needs at least 640"):
        score_samples(Extractor(10).eval(), torch.randn(640, FEATURES), few)


@fast
def test_the_grid_has_a_row_for_each_class() -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    values = np.arange(21, dtype=np.uint8)
    samples = np.ones((21, 8, 8, 3), np.uint8) * values[:, None, None, None]
    grid = np.asarray(image.open(io.BytesIO(draw_grid(samples, 10))))
    side = 64 + 2
    assert grid.shape == (10 * side + 2, GRID_COLUMNS * side + 2, 3)
    cells = grid[2 + 32 :: side, 2 + 32 :: side, 0]
    assert cells[:, 0].tolist() == list(range(10))
    assert cells[:2, 1:4].tolist() == [[10, 20, 255], [11, 255, 255]]
    tall = np.asarray(image.open(io.BytesIO(draw_grid(samples, 5000))))
    assert tall.shape[0] <= 4096


# -- FLOPs ----------------------------------------------------------------------------------------------------------------


def counted(call: Callable[[], object]) -> int:
    """FLOPs by PyTorch's own counter. The math back end of attention computes all products in the open."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@fast
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_flops_of_a_sample(sampler: str, guidance: float) -> None:
    """The blocks have different sizes, so an evaluation by the wrong block would be seen."""
    run = image_run("denoise_image")
    found = counted(lambda: sample_images(run, 6, guidance, 5, sampler, batch_size=3))
    assert 6 * walk_flops(run, 5, sampler, guidance) == pytest.approx(found, rel=1e-9)


def test_flops_of_a_classification(digits: ImageData) -> None:
    run, plain = image_run("denoise_class"), image_run("classify", 0)
    one, walks = (counted(lambda s=steps: classify_images(run, digits, s)) for steps in ((2,), (2, 3)))
    scores = classify_images(run, digits, (2, 3))
    assert 60 * scores.flops[2] == pytest.approx(one, rel=1e-9)
    assert 60 * (scores.flops[2] + scores.flops[3]) == pytest.approx(walks, rel=1e-9)
    assert 60 * walk_flops(plain, 1) == pytest.approx(counted(lambda: classify_images(plain, digits)), rel=1e-9)


# -- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of random images, with the splits train (700) and test (650)."""
    out = tmp_path_factory.mktemp("images") / "data"
    rng = np.random.default_rng(0)
    with ImageWriter(out) as writer:
        for split, count in (("train", 700), ("test", 650)):
            for number in range(count):
                writer.add(split, rng.integers(0, 256, (8, 8, 3), np.uint8).tobytes(), number % 10)
        writer.commit((8, 8), CLASSES, {})
    return out


def run_command(*words: object) -> int:
    """The status of eval/images.py, in this process."""
    script = load_script("eval/images.py")
    from recurrent_db.arguments import parse

    return int(script.main(parse(script.Args, [str(word) for word in words])))


def test_the_command_scores_a_classifier(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    run = saved(image_run("denoise_class"), tmp_path / "run")
    assert run_command(run, "--data", folder, "--steps", "1,2", "--draws", 2, "--device", "cpu") == 0
    written = json.loads((run / "eval/images.json").read_text())
    assert (written["split"], written["images"], written["draws"]) == ("test", 650, 2)
    assert list(written["by_steps"]) == list(written["by_block"]) == ["1", "2"]
    assert written["by_steps"]["2"]["flops_per_image"] == walk_flops(load_image_run(run, "cpu"), 2)
    assert f"steps    2 {written['by_steps']['2']['accuracy']:>9.4f}" in capsys.readouterr().out
    for words, message in (
        (("--split", "validation"), "no 'validation' split"),
        (("--extractor", tmp_path / "none"), "--extractor is for generators, but .* is a denoise_class run"),
        (("--samples", 10), "--samples is for generators"),
        (("--sampler-steps", 10), "--sampler-steps is for generators"),
    ):
        with pytest.raises(UserError, match=message):
            run_command(run, "--data", folder, "--device", "cpu", *words)
    text = make_checkpoint(tmp_path / "text", tokenizer, "next_token", 32)
    with pytest.raises(UserError, match="was trained on text, not on images"):
        run_command(text, "--data", folder, "--device", "cpu")


def test_the_command_samples(folder: Path, tmp_path: Path, script: Script) -> None:
    pytest.importorskip("torchmetrics", reason="the extra `vision` is not installed")
    run, extractor = saved(image_run("denoise_image"), tmp_path / "run"), tmp_path / "extractor.safetensors"
    save_extractor(Extractor(10).eval(), extractor)
    words = ["eval/images.py", run, "--data", folder, "--extractor", extractor, "--sampler-steps", 2]
    found = script(*words, "--samples", 640, "--guidance", 2, "--grid", tmp_path / "samples.png")
    assert found.returncode == 0, found.stderr
    written = json.loads((run / "eval/images.json").read_text())
    assert written["distance"]["extractor"] == Extractor(10).hash == written["floor"]["extractor"]
    assert written["distance"]["frechet"] > written["floor"]["frechet"]
    assert (tmp_path / "samples.png").read_bytes() == (run / "eval/images.png").read_bytes()
    assert "floor (real training images): Fréchet distance" in found.stdout
    assert Extractor(10).hash[:12] in found.stdout
    assert "FID" not in found.stdout
    with pytest.raises(UserError, match=r"--draws is for classifiers, but .* is a denoise_image run"):
        run_command(run, "--data", folder, "--device", "cpu", "--draws", 2)
    found = script(*words, "--samples", 639)
    assert found.returncode == 2
    assert found.stderr.strip() == (
        "error: --samples 639 is too few for a distance: at least 640 are needed, ten for each of the 64 features"
    )


def test_the_commands_of_the_guide(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="the extra `vision` is not installed")
    for name in ("recurrent_db", "train", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    with ImageWriter(tmp_path / "data/images") as writer:
        for split, count in (("train", 640), ("validation", 20), ("test", 640)):
            for number in range(count):
                pixels = digits.read(np.array([number % 60])) + np.uint8(number // 60)
                writer.add(split, pixels.tobytes(), int(digits.labels[number % 60]))
        writer.commit((8, 8), CLASSES, {})
    save_extractor(Extractor(10).eval(), tmp_path / "extractor.safetensors")
    runner = Runner(tmp_path, monkeypatch)
    here = [
        block
        for block in blocks(ROOT / "docs/guides/images.md")
        if block.run_by == "tests/evaluation/test_image_scores.py"
    ]
    for block in here:
        runner.run(block)
    assert (tmp_path / "samples.png").is_file()
    assert "Samples of dit" in (tmp_path / "report.html").read_text()


def test_networks_with_other_ranges_are_sampled_at_the_same_levels() -> None:
    """A comparison of partitions compares what the blocks have learned, not the sampler's levels."""
    equal, uniform = (
        image_run("denoise_image", 2, (), "--blocks.partition", how) for how in ("equal-probability", "uniform")
    )
    levels = sampling_levels(equal.network, 6)
    assert levels == sampling_levels(uniform.network, 6)
    assert levels[0] == 80
    assert levels == sorted(levels, reverse=True)
    assert equal.network.partition.levels(6) == levels != uniform.network.partition.levels(6)
