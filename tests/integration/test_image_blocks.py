"""Blocks of networks for images in processes of their own: independence, joining, and what does not fit together."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from block_runs import launch_watched, weights
from helpers import ROOT
from image_runs import NAMES, digits, image_batch, train, words

from recurrent_db import cli
from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.config import load_config
from recurrent_db.denoise.convert import DiffusionBlocks
from recurrent_db.errors import UserError
from recurrent_db.model.build import build_network
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.denoise_class import walk_log_probabilities
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.rng import Rng
from recurrent_db.store.join_blocks import join
from recurrent_db.store.loading import load_image_run

pytest.importorskip("transformers", reason="transformers is not importable")

STEPS = ["--budget.steps", 6, "--eval.points", 1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("images") / "data", count=300)


def train_block(images: Path, run: Path, number: int, *more: object, objective: str = "denoise_class") -> Path:
    return train(images, run, objective, *STEPS, "--blocks.only", number, *more, n=3)


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three blocks of a ViT, one after another in this process, each with its own copy of the frame."""
    folder = tmp_path_factory.mktemp("alone")
    return [train_block(images, folder / f"block-{number}", number) for number in (1, 2, 3)]


def network_of(run: Path) -> DiffusionBlocks:
    network = load_image_run(run, "cpu").network
    assert isinstance(network, DiffusionBlocks)
    return network


def test_processes_at_once_share_nothing_and_equal_one_after_another(
    quick_python: str, images: Path, alone: list[Path], tmp_path: Path
) -> None:
    given = words(images, tmp_path / "none", "denoise_class", *STEPS)
    at = given.index("--run.dir")
    trainers = launch_watched(quick_python, tmp_path, 3, given[:at] + given[at + 2 :])
    seen = sorted(sorted(set(re.findall(r"/runs/(block-\d)/", log))) for log in trainers)
    assert seen == [["block-1"], ["block-2"], ["block-3"]]  # none opens another block's file
    joined = weights(tmp_path / "runs/joined")
    found: dict[str, torch.Tensor] = {}
    for number, run in enumerate(alone, 1):
        ours, theirs = weights(run), weights(tmp_path / f"runs/block-{number}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and torch.equal(ours[name], joined[name]) for name in ours)
        assert not found.keys() & ours.keys()
        found |= ours
    assert found.keys() == joined.keys()
    # The joined run is loaded, and each of its blocks computes what it does alone.
    whole, batch = network_of(tmp_path / "runs/joined"), image_batch()
    z = torch.randn(4, 32)
    for number, run in enumerate(alone, 1):
        sigma_B = torch.full((4,), whole.partition.edges[number - 1], dtype=torch.float64)
        pair = [one.logits(number, z, sigma_B, x=batch.images_BCHW) for one in (whole, network_of(run))]
        assert torch.equal(*pair)
    probabilities = walk_log_probabilities(whole, batch, 6, 2, 0)
    assert len(probabilities) == 6
    torch.testing.assert_close(probabilities[-1].exp().sum(-1), torch.ones(4))
    account = json.loads((tmp_path / "runs/joined/blocks.json").read_text())["blocks"]
    for number, run in enumerate(alone, 1):
        block = account[str(number)]
        assert (block["alone"], block["trains_shared"], block["layers"], block["steps"]) == (True, True, 1, 6)
        assert block["bytes_read_before_training"] == 0
        assert block["parameters"] == sum(value.numel() for value in weights(run).values())
        assert block["flops"] > 0 and block["loss"] > 0 and len(block["loss_by_sigma"]) == 4
        # The class embeddings have no gradients; all else of a block has.
        split = block["memory"]
        assert split["parameters_bytes"] - split["gradients_bytes"] == 4 * 10 * 32


def test_blocks_of_an_owner_read_it_alone(quick_python: str, images: Path, tmp_path: Path) -> None:
    given = words(images, tmp_path / "none", "denoise_image", *STEPS, "--blocks.shared", "owned")
    at = given.index("--run.dir")
    trainers = launch_watched(quick_python, tmp_path, 3, given[:at] + given[at + 2 :])
    seen = sorted(sorted(set(re.findall(r"/runs/(block-\d)/", log))) for log in trainers)
    assert seen == [["block-1"], ["block-1", "block-2"], ["block-1", "block-3"]]
    account = json.loads((tmp_path / "runs/joined/blocks.json").read_text())["blocks"]
    assert [account[number]["trains_shared"] for number in "123"] == [True, False, False]
    frame = sum(value.numel() for name, value in weights(tmp_path / "runs/joined").items() if name.startswith("frame."))
    assert [account[number]["bytes_read_before_training"] for number in "123"] == [0, 4 * frame, 4 * frame]
    network = network_of(tmp_path / "runs/joined")
    eps = torch.randn(2, 3, 8, 8)
    assert network.walk(eps, 6, "heun", label=torch.tensor([3, 10]), guidance=2.0).shape == eps.shape


def test_blocks_that_do_not_fit_together(images: Path, alone: list[Path], tmp_path: Path) -> None:
    """Each of these second blocks is refused in one line, and nothing is written."""
    other = digits(tmp_path / "other", count=240)
    renamed = digits(tmp_path / "renamed", ["zero", *NAMES[1:]], count=300)
    for name, data, more, message in (
        ("images", other, [], "were trained with different images"),
        ("classes", renamed, [], "were trained with different images"),
        ("seed", images, ["--seed", 1], "the fixed class embeddings differ between"),
        ("frozen", images, ["--blocks.shared", "frozen"], "blocks.shared is all in"),
        ("width", images, ["--model.d_mlp", 32], "model.d_mlp is 64 in"),
        ("noise", images, ["--objective.denoise_class.p_mean", -0.4], "objective.denoise_class.p_mean is -1.2 in"),
        ("partition", images, ["--blocks.partition", "uniform"], "blocks.partition differs"),
    ):
        run = train_block(data, tmp_path / name, 2, *more)
        for order in ([alone[0], run, alone[2]], [run, alone[0], alone[2]]):
            with pytest.raises(UserError) as error:
                join(order, tmp_path / "joined")
            assert "\n" not in str(error.value)
            told = str(error.value)
            assert (
                message in told
                or (message.startswith("blocks.shared") and "copies of what they share" in told)
                or (order[0] == run and message.partition(" is ")[0] in told)
            )
        assert not (tmp_path / "joined").exists()
    with pytest.raises(UserError, match="no run given holds block 2"):
        join([alone[0], alone[2]], tmp_path / "joined")
    plain = train(images, tmp_path / "plain", "classify", "--budget.steps", 1)
    with pytest.raises(UserError, match="is not a run of blocks"):
        join([alone[0], plain], tmp_path / "joined")


def test_one_block_is_replaced(images: Path, alone: list[Path], tmp_path: Path) -> None:
    join(alone, tmp_path / "joined")
    again = train_block(images, tmp_path / "again", 2, "--init.from", tmp_path / "joined", "--optim.lr", 1e-4)
    join([tmp_path / "joined", again], tmp_path / "replaced")
    before, after, own = (weights(run) for run in (tmp_path / "joined", tmp_path / "replaced", again))
    assert all(torch.equal(after[name], own[name] if name in own else before[name]) for name in after)
    name = "blocks.2.frame.head.weight"
    assert 0 < (after[name] - before[name]).abs().max() < 0.01  # it began as the block that it replaces
    with pytest.raises(UserError, match="does not hold block 2"):
        train_block(images, tmp_path / "bad", 2, "--init.from", alone[0])


def test_a_block_alone_says_what_is_missing(alone: list[Path]) -> None:
    with pytest.raises(UserError, match=r"only block 2 is here, not block 1: join the runs of all blocks"):
        walk_log_probabilities(network_of(alone[1]), image_batch(), 3, 1, 0)
    [probabilities] = walk_log_probabilities(network_of(alone[0]), image_batch(), 1, 1, 0)
    assert probabilities.shape == (4, 10)


def test_the_averages_are_what_is_joined(images: Path, tmp_path: Path) -> None:
    """The average of the fixed class embeddings is they themselves."""
    runs = [train_block(images, tmp_path / str(number), number, "--optim.ema_decay", 0.9) for number in (1, 2, 3)]
    join(runs, tmp_path / "joined")
    drawn = weights(runs[0])["blocks.1.frame.targets"]
    for number in (1, 2, 3):
        assert torch.equal(weights(tmp_path / "joined")[f"blocks.{number}.frame.targets"], drawn)
    assert np.isfinite(float(weights(tmp_path / "joined")["blocks.1.frame.head.weight"].sum()))


def test_the_cost_and_the_commands_are_printed_before_anything_starts(
    images: Path, quick_python: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "PYTHON": quick_python, "PYTHONPATH": str(ROOT)}
    preset = ROOT / "train/configs/vit-blocks.toml"
    command = [ROOT / "train/launch/blocks.sh", "--dry-run", preset, tmp_path / "runs", "--data.path", images]
    told = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("--blocks.only") == 3
    assert "--init.from" not in told.stdout
    assert "FLOPs per image" in told.stdout
    assert not (tmp_path / "runs").exists()
    assert cli.run(["flops", str(preset)]) == 0
    assert capfd.readouterr().out.strip() in told.stdout
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def step_bytes(preset: str, *more: object) -> float:
    """Most bytes in use while a network and its optimizer are built and take two steps, without the frame's parameters."""
    config = load_config(ROOT / f"train/configs/{preset}.toml", list(map(str, ("--blocks.only", 1, *more))))
    config.model.image_size, config.model.n_classes = [32, 32], 10
    batch, frame = image_batch(32, (32, 32)), 0

    def run() -> None:
        nonlocal frame
        network, objective = build_network(config, 0), build_objective(config)
        objective.prepare(network)
        optimizer = build_optimizer(network, config.optim)
        for step in range(2):
            objective(network, batch, Rng(0, step), 0.0)[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        frame = sum(
            p.nbytes * (4 if p.requires_grad else 1) for name, p in network.named_parameters() if ".frame." in name
        )

    return peak_live_bytes(run) - frame


@pytest.mark.parametrize("preset", ["vit-blocks", "dit-blocks"])
def test_a_blocks_memory_is_that_of_its_layers(preset: str) -> None:
    """One of three blocks needs about a third of what the network needs that is trained end to end."""
    one, three = step_bytes(preset, "--model.n_blocks", 1), step_bytes(preset)
    print(f"{preset}: {three / one:.3f}")
    assert three <= 0.36 * one
