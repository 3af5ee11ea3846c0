"""Training on images: it learns, resumes bit for bit, stops at its budget, and answers mistakes in one line."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import many
import numpy as np
import pytest
import torch
from helpers import MICRO, HostReads, change_loss
from image_runs import (
    NAMES,
    OBJECTIVES,
    assert_same_end,
    digits,
    image_batch,
    image_config,
    rows,
    train,
    words,
    write_images,
)

import recurrent_db
from recurrent_db import cli
from recurrent_db.config import load_config
from recurrent_db.data import Slots, image_batches, open_images
from recurrent_db.denoise import convert
from recurrent_db.distributed.team import Team
from recurrent_db.errors import UserError
from recurrent_db.huggingface.export import export
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.model.vit import ViT
from recurrent_db.objectives.denoise_class import mean_probability, walk_log_probabilities
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint, list_checkpoints
from recurrent_db.store.loading import load_image_run
from recurrent_db.training import trainer
from recurrent_db.training.tasks import build_task

pytest.importorskip("transformers", reason="transformers is not importable")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data directory of scikit-learn's digits."""
    return digits(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def classified(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of `classify`."""
    return train(images, tmp_path_factory.mktemp("classified") / "run", "classify", "--budget.steps", 3)


# ---------------------------------------------------------------------------------------------------------------------
# What a run learns and leaves


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns(images: Path, tmp_path: Path, objective: str) -> None:
    """Held-out loss falls, and a classifier is right far more often than one time in ten."""
    recipe = ["--optim.lr", 3e-3, "--schedule.warmup", 0.1, "--data.batch_size", 32, "--eval.tokens", 9000]
    run = train(images, tmp_path / "run", objective, *recipe, "--budget.steps", 300, "--eval.k", 1)
    written = rows(run)
    scored = [row for row in written if any(name.startswith("eval/") for name in row)]
    assert len(scored) == 2
    if objective != "classify":
        for block in (1, 2, 3):
            name = f"eval/loss_block_{block}"
            assert scored[1][name] < 0.9 * scored[0][name]
            trained = [row[f"loss_block_{block}"] for row in written if f"loss_block_{block}" in row]
            assert 60 < len(trained) < 140  # a third of the steps
            assert np.mean(trained[-20:]) < 0.9 * np.mean(trained[:20])
    if objective != "denoise_image":
        assert scored[1]["eval/accuracy_k1"] > {"classify": 0.85, "denoise_class": 0.35}[objective]
        assert scored[1]["eval/nll_k1"] < scored[0]["eval/nll_k1"]
    loaded = load_image_run(run)
    assert (loaded.images.classes, loaded.images.size) == (tuple(NAMES), (8, 8))
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, Checkpoint(find_checkpoint(run)).weights()[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_held_out_scores_are_means_over_the_images(images: Path, tmp_path: Path, objective: str) -> None:
    """Of all 300, in batches of 128, 128 and 44, against one batch of all."""
    more = ["--budget.steps", 2, "--eval.tokens", 9000, "--eval.k", 1, 3, "--seed", 4]
    run = train(images, tmp_path / "run", objective, *more)
    network, row = load_image_run(run, "cpu").network, rows(run)[-1]
    [batch] = image_batches(open_images(images, "validation"), 1000)
    assert len(batch) == 300
    if isinstance(network, ViT):
        read = {1: network(batch.images_BCHW).log_softmax(-1)}
    elif objective == "denoise_class":
        read = {k: mean_probability(walk_log_probabilities(network, batch, k, 0, 4)) for k in (1, 3)}
    else:
        read = {}
        rng, target = Rng(4, EVALUATION_STEP), batch.images_BCHW
        eps = rng.normal(batch.sample_index_B, (3, 8, 8), "noise", target.device)
        for block in (1, 2, 3):
            losses = []
            for sigma in network.partition.levels_inside(block, 4):
                estimate = network.denoise(block, target + sigma * eps, torch.full((300,), sigma), label=batch.labels_B)
                losses.append((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * float((estimate - target).square().mean()))
                assert row[f"eval/loss_sigma_{sigma:.3g}"] == pytest.approx(losses[-1], rel=1e-4)
            assert row[f"eval/loss_block_{block}"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert row["eval/loss"] == pytest.approx(np.mean([row[f"eval/loss_block_{b}"] for b in (1, 2, 3)]))
    for k, log_p_BC in read.items():
        assert row[f"eval/accuracy_k{k}"] == pytest.approx((log_p_BC.argmax(-1) == batch.labels_B).float().mean())
        assert row[f"eval/nll_k{k}"] == pytest.approx(-log_p_BC[range(300), batch.labels_B].mean().item(), rel=1e-4)


def test_another_seed_is_another_order_of_the_data(images: Path, tmp_path: Path) -> None:
    config = load_config(None, words(images, tmp_path / "run", "classify"))
    task = build_task(config, Team("none", torch.device("cpu")))
    first, same, other = (next(iter(next(task.batches(3, seed, Slots())))) for seed in (0, 0, 1))
    assert torch.equal(first.images_BCHW, same.images_BCHW)
    assert not torch.equal(first.images_BCHW, other.images_BCHW)
    assert task.floor == pytest.approx(np.log(10), abs=0.01)


def test_held_out_scores_are_of_the_averaged_weights(images: Path, tmp_path: Path) -> None:
    run = train(images, tmp_path / "run", "classify", "--budget.steps", 6, "--optim.ema_decay", 0.9)
    plain, averaged = (load_image_run(run, averaged=flag).network.state_dict() for flag in (False, True))
    shadow = Checkpoint(find_checkpoint(run)).weights(averaged=True)
    assert all(torch.equal(value, shadow[name]) for name, value in averaged.items())
    assert not torch.equal(plain["head.weight"], averaged["head.weight"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_flops_budget_ends_a_run(images: Path, tmp_path: Path, objective: str) -> None:
    spent = [row["flops"] for row in rows(train(images, tmp_path / "run", objective, "--budget.flops", 2e8))]
    assert spent[-1] >= 2e8 > spent[-2]
    assert len(spent) > 3
    assert all(row["tokens"] == row["step"] * 8 * (16 if objective == "denoise_image" else 17)
               for row in rows(tmp_path / "run"))  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_change_rounding_alone(images: Path, tmp_path: Path, objective: str) -> None:
    ends = []
    for size in (8, 3):
        more = ["--budget.steps", 4, "--data.micro_batch_size", size, "--data.flip", "True", "--data.crop_padding", 1]
        run = train(images, tmp_path / str(size), objective, *more)
        ends.append([(row["loss"], row["grad_norm"]) for row in rows(run)])
    assert ends[1] == [pytest.approx(pair, rel=1e-4) for pair in ends[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions, several processes, bad steps

AVERAGED = ["--optim.ema_decay", 0.9, "--run.log_every", 3, "--data.flip", "True", "--data.crop_padding", 1]


@pytest.mark.parametrize("shared", ["all", "owned"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_equals_an_uninterrupted_one(images: Path, tmp_path: Path, objective: str, shared: str) -> None:
    if (objective, shared) == ("classify", "owned"):
        pytest.skip("it has no blocks")
    options = [*AVERAGED, "--blocks.shared", shared, "--budget.steps", 12, "--run.checkpoint_every", 6]
    whole = train(images, tmp_path / "whole", objective, *options)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(list_checkpoints(tmp_path / "cut")[-1])
    train(images, tmp_path / "cut", objective, *options, resume="newest")
    assert_same_end(whole, tmp_path / "cut")


def test_kill_9_then_resume_equals_an_uninterrupted_run(images: Path, tmp_path: Path) -> None:
    options = [*AVERAGED, "--budget.steps", 100, "--run.checkpoint_every", 10]
    whole = train(images, tmp_path / "whole", "denoise_class", *options)
    run, moments, kills = tmp_path / "killed", random.Random(0), 0
    command = words(images, run, "denoise_class", *options)
    process = many.start(tmp_path / "logs", many.train, command).processes[0]
    while kills < 2:
        before = list_checkpoints(run)[-1:] if run.exists() else []
        deadline = time.monotonic() + 300
        while process.exitcode is None and list_checkpoints(run)[-1:] == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        process = many.start(tmp_path / "logs", many.train, [*command, "--resume"]).processes[0]
    process.join(120)
    assert process.exitcode == 0
    assert kills >= 1
    assert_same_end(whole, run)


def test_two_processes_train_what_one_does(images: Path, tmp_path: Path) -> None:
    options = ["--budget.steps", 6, "--optim.ema_decay", 0.9, "--data.micro_batch_size", 2]
    one = train(images, tmp_path / "one", "classify", *options)
    two = train(images, tmp_path / "two", "classify", *options, world=2)
    for name in ("loss", "grad_norm", "accuracy", "eval/accuracy_k1", "eval/nll_k1"):
        ours, theirs = ([row[name] for row in rows(run) if name in row] for run in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-4), name
        assert ours
    for name in ("tokens", "flops", "flops_update", "lr", "skipped"):
        assert [row[name] for row in rows(one)] == [row[name] for row in rows(two)]
    # A run of several processes is loaded, and continued by one.
    logits = [load_image_run(run).network(image_batch().images_BCHW) for run in (one, two)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    train(images, two, "classify", *options, "--budget.steps", 8, resume="newest")
    assert rows(two)[-1]["step"] == 8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_in_bfloat16_follows_the_one_in_float32(images: Path, tmp_path: Path, objective: str) -> None:
    options = ["--budget.steps", 12, "--optim.ema_decay", 0.9]
    exact, rounded = (
        [row["loss"] for row in rows(train(images, tmp_path / dtype, objective, *options, "--run.dtype", dtype))]
        for dtype in ("float32", "bfloat16")
    )
    assert exact != rounded == pytest.approx(exact, rel=0.03)
    checkpoint = Checkpoint(find_checkpoint(tmp_path / "bfloat16"))
    assert {value.dtype for value in (checkpoint.weights() | checkpoint.optimizer()).values()} == {torch.float32}


def test_muon_updates_the_matrices_of_the_layers(images: Path, tmp_path: Path) -> None:
    options = ["--optim.name", "muon", "--budget.steps", 12, "--run.checkpoint_every", 6, "--optim.ema_decay", 0.9]
    for objective in ("classify", "denoise_image"):
        whole = train(images, tmp_path / objective, objective, *options)
        names = [name for name in Checkpoint(find_checkpoint(whole)).optimizer() if name.startswith("momentum_buffer/")]
        assert names
        layers = re.compile(r"momentum_buffer/(blocks\.\d\.)?layers\.\d+\..*weight")
        assert all(layers.fullmatch(name) for name in names), names
        shutil.copytree(whole, tmp_path / f"{objective}-cut")
        shutil.rmtree(list_checkpoints(tmp_path / f"{objective}-cut")[-1])
        train(images, tmp_path / f"{objective}-cut", objective, *options, resume="newest")
        assert_same_end(whole, tmp_path / f"{objective}-cut")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_makes_the_host_wait_for_nothing(
    images: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 12 steps reads as many values of the device as one of 4. Classes are checked on a CPU alone."""
    monkeypatch.setattr(convert, "_check_classes", lambda *_: None)
    counts = []
    for steps in (4, 12):
        options = ["--budget.steps", steps, "--eval.points", 0, "--run.log_every", 100, "--optim.ema_decay", 0.9]
        with HostReads() as reads:
            train(images, tmp_path / f"run-{steps}", objective, *options)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_sharded_parameters_are_for_language_models() -> None:
    config = image_config("classify")
    with pytest.raises(
        UserError, match=r"parallel\.mode = fsdp does not shard networks for images: use parallel\.mode = ddp"
    ):
        Team("fsdp", torch.device("cpu")).wrap(build_image_network(config, 0), config, False)
    config = image_config("denoise_class")
    for mode in ("ddp", "fsdp"):
        with pytest.raises(UserError, match=r"train each block in its own process with train/launch/blocks\.sh"):
            Team(mode, torch.device("cpu")).wrap(build_image_network(config, 0), config, False)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_without_a_finite_loss_is_skipped(
    images: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_loss(monkeypatch, lambda loss, rng: loss * float("nan") if rng.step in (3, 4) else loss)
    run = train(images, tmp_path / "run", objective, "--budget.steps", 8)
    assert [row["skipped"] for row in rows(run)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert all(torch.isfinite(value).all() for value in Checkpoint(find_checkpoint(run)).weights().values())


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: one line, status 2


def complain(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("classify", ["--model.patch_size", 3], "images of 8 x 8 pixels cannot be cut into patches of model.patch_size = 3"),
        ("classify", ["--model.patch_size", 16], "cannot be cut into patches"),
        ("denoise_class", ["--model.n_blocks", 4], "model.n_core = 3 layers cannot be cut into 4 blocks"),
        ("denoise_image", ["--model.n_blocks", 4, "--model.block_layers", 1, 1, 1, 0], "cannot be cut into 4 blocks"),
        ("denoise_class", ["--blocks.only", 4], "blocks.only must be 0 (all) or a block from 1 to 3"),
        ("classify", ["--model.n_blocks", 3], "set model.n_blocks = 0, or use denoise_class"),
        ("classify", ["--model.n_prelude", 1], "has neither prelude nor coda"),
        ("denoise_class", ["--model.n_blocks", 0], "objective denoise_class needs blocks: set model.n_blocks"),
        ("denoise_image", ["--model.n_blocks", 0], "objective denoise_image needs blocks: set model.n_blocks"),
        ("classify", ["--data.mixture", "a", 1], "data.mixture is for language models; objective classify trains on images"),
        ("classify", ["--run.compile", "True"], "run.compile is for language models"),
        ("denoise_class", ["--run.activation_checkpointing", "True"], "activation_checkpointing is for language models"),
        ("denoise_image", ["--objective.denoise_image.label_dropout", 1], "label_dropout must be"),
        ("denoise_class", ["--objective.denoise_class.p_std", 0], "p_std must be above 0"),
        ("classify", ["--data.crop_padding", 9], "crop_padding must be 0 to 8"),
        ("classify", ["--data.path", ""], "data.path is not set: name a folder made by train/prepare_images.py"),
        ("next_token", ["--model.n_blocks", 0], "not a manifest of token shards"),
    ],
)  # fmt: skip
def test_mistakes(
    script_here: Run, images: Path, tmp_path: Path, objective: str, options: Sequence[object], message: str
) -> None:
    given = words(images, tmp_path / "run", objective, "--budget.steps", 2, *options)
    assert message in complain(script_here("train/pretrain.py", *given))
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit(script_here: Run, images: Path, data: Path, tmp_path: Path) -> None:
    other = digits(tmp_path / "other", ["zero", *NAMES[1:]], 60)
    large = digits(tmp_path / "large", count=60, zoom=2)
    unheld = write_images(tmp_path / "unheld", np.zeros((12, 8, 8, 3), np.uint8), np.arange(12) % 2, NAMES[:2], "test")
    for path, val_path, message in (
        (images, other, "have images of different classes"),
        (images, large, "have images of different sizes"),
        (data, "", "not a manifest of images"),
        (images, data, "not a manifest of images"),
        (unheld, "", "no 'validation' split"),
        (tmp_path / "none", "", "no such data directory; make one with train/prepare_images.py"),
    ):
        given = words(path, tmp_path / "run", "classify", "--budget.steps", 2, "--data.val_path", val_path)
        assert message in complain(script_here("train/pretrain.py", *given))
        assert not (tmp_path / "run").exists()


def test_resume_refuses_other_data(script_here: Run, images: Path, classified: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(classified, tmp_path / "run"))
    other, large = digits(tmp_path / "other", count=60), digits(tmp_path / "large", count=60, zoom=2)
    for path, options, message in (
        (other, [], "the run and data.path have different images"),
        (large, [], "the run and data.path have different images"),
        (images, ["--model.patch_size", 4], "model.patch_size was 2 and is now 4"),
    ):
        given = words(path, run, "classify", "--budget.steps", 6, *options)
        assert message in complain(script_here("train/pretrain.py", *given, "--resume"))
    train(images, run, "classify", "--budget.steps", 6, resume="newest")


def test_weights_to_start_from_that_do_not_fit(
    script_here: Run, images: Path, classified: Path, tmp_path: Path
) -> None:
    for objective, options in (
        ("denoise_class", []),
        ("denoise_image", []),
        ("classify", ["--model.d_mlp", 32]),
        ("classify", ["--model.n_core", 2]),
    ):
        given = words(images, tmp_path / "run", objective, "--budget.steps", 1, "--init.from", classified, *options)
        complain(script_here("train/pretrain.py", *given))
    run = train(
        images, tmp_path / "tuned", "classify", "--budget.steps", 1, "--init.from", classified, "--optim.lr", 1e-12
    )
    tuned, before = (Checkpoint(find_checkpoint(one)).weights() for one in (run, classified))
    torch.testing.assert_close(tuned, before, rtol=0, atol=1e-8)


def test_commands_for_text_say_that_a_run_was_trained_on_images(
    script_here: Run, data: Path, classified: Path, tmp_path: Path
) -> None:
    message = r"was trained on images, not on text"
    for action in (
        lambda: recurrent_db.load(classified),
        lambda: cli.run(["repl", str(classified)]),
        lambda: cli.run(["export", str(classified), str(tmp_path / "out")]),
        lambda: export(classified, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=message):
            action()
    assert not (tmp_path / "out").exists()
    for command in (
        ["eval/depth_curve.py", classified, "--data", data],
        ["eval/generation.py", classified, "--data", data, "--judge", classified],
        ["eval/masked.py", classified, "--data", data],
    ):
        assert message in complain(script_here(*command))


def test_the_harness_says_that_a_run_was_trained_on_images(classified: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM

    with pytest.raises(UserError, match="was trained on images, not on text"):
        RecurrentDBLM(str(classified), device="cpu")


def test_a_run_on_text_is_not_loaded_as_images(data: Path, tmp_path: Path) -> None:
    config = load_config(
        None, [*MICRO, "--data.path", str(data), "--run.dir", str(tmp_path / "run"), "--budget.steps", "1"]
    )
    trainer.train(config)
    with pytest.raises(UserError, match="was trained on text, not on images"):
        load_image_run(tmp_path / "run")


@pytest.mark.parametrize("failure", [ImportError, RuntimeError])
def test_without_transformers_a_dit_trains_and_a_vit_says_what_is_missing(
    script_here: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    """transformers is absent, or cannot be imported because of another library."""

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "transformers.models.vit.modeling_vit":
                raise failure("torchvision is broken")

    monkeypatch.delitem(sys.modules, "transformers.models.vit.modeling_vit", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for objective in ("classify", "denoise_class"):
        told = complain(
            script_here("train/pretrain.py", *words(images, tmp_path / "run", objective, "--budget.steps", 1))
        )
        assert "a ViT needs Hugging Face transformers" in told and "pip install 'recurrent-db[hf]'" in told
    train(images, tmp_path / "run", "denoise_image", "--budget.steps", 1)


def test_the_checkpoints_record_of_its_images_may_be_damaged(classified: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(classified, tmp_path / "run"))
    record = find_checkpoint(run) / "images.json"
    for content in (b"{", b"[]", b'{"classes": ["a"], "size": [8], "data": "x"}', b'{"classes": [], "size": [8, 8]}'):
        record.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged"):
            load_image_run(run)
