"""`recurrent-db flops`: the keys of its JSON, the cost of each way of training, the paper's ratio."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ROOT

from recurrent_db import cli
from recurrent_db.accounting.flops import step_cost
from recurrent_db.commands import flops
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes

CONFIGS = ROOT / "train/configs"


def test_flops_json_has_the_contracts_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["flops", str(CONFIGS / "pythia-70m-looped.toml"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    ways = {"next_token", "unrolled_truncated", "unrolled_full", "denoise", "denoise_two_stream", "one_step"}
    assert set(table["per_token"]) == ways == set(table["ratio_to_denoise"])
    assert {"by_part", "parameters", "cache_bytes_per_token"} <= table.keys()
    for name, parts in table["by_part"].items():
        assert sum(c["forward"] + c["backward"] for c in parts.values()) == pytest.approx(table["per_token"][name])
    assert 1 < table["ratio_to_denoise"]["denoise_two_stream"] < 2
    # 2 (keys and values) x 512 x 2 bytes for each of 2 + 4 K + 2 layers.
    assert table["cache_bytes_per_token"]["8"] == 2 * 512 * 2 * 36


def test_one_step_costs_the_mean_of_its_steps() -> None:
    config = load_config(CONFIGS / "tiny.toml", [
        "--objective.one_step.next_token_share", "0.5", "--objective.one_step.first_probability", "0",
        "--objective.one_step.prior_iterations", "1", "--budget.tokens", "1e6",
    ])  # fmt: skip
    config.model.vocab_size = 2048
    none = step_cost(config, Passes(core_grad=0, injections_grad=1)).total
    one, two = (step_cost(config, Passes(core_no_grad=before, core_grad=1)).total for before in (0, 1))
    table = flops.table(config, 3.0, 2)
    assert table["per_token"]["one_step"] == pytest.approx(0.4 * none + 0.1 * one + 0.5 * two)
    assert table["per_token"]["next_token"] == pytest.approx(one)
    by_kind = table["by_kind"]["one_step"]
    assert by_kind["forward"] + by_kind["backward"] == pytest.approx(table["per_token"]["one_step"])


def test_the_skip_core_phase_of_one_step() -> None:
    config = load_config(CONFIGS / "tiny.toml", ["--budget.tokens", "1e6"])
    config.model.vocab_size = 2048
    assert flops.table(config, 3.0, 2)["one_step"] == {"skip_core_share": 0.4, "skip_core_asked": 0.4}
    config.budget.tokens = None
    assert flops.table(config, 3.0, 2)["one_step"] == {"skip_core_share": None, "skip_core_asked": None}
    config.budget.tokens = 10**9
    long = flops.table(config, 3.0, 2)["one_step"]
    assert long["skip_core_share"] == 0 < long["skip_core_asked"] < 0.15


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "(without the skip-core phase, because the configuration has no budget)"),
        ("tokens = 1e6", "(skip-core phase: 40% of the budget)"),
        ("tokens = 1e9", "of the budget, is too short and left out)"),
    ],
)
def test_the_skip_core_phase_is_printed(
    options: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f"{(CONFIGS / 'tiny.toml').read_text()}\n[budget]\n{options}\n")
    assert cli.run(["flops", str(path)]) == 0
    assert told in capsys.readouterr().out


def test_the_papers_ratio_is_printed_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["flops", str(CONFIGS / "pythia-70m-looped.toml")])
    told = capsys.readouterr().out
    assert "Counted in iterations, as the paper does: 10.7; counted in FLOPs:" in told


@pytest.mark.parametrize("preset", ["vit-blocks", "vit-blocks-128", "dit-blocks", "dit-s2"])
def test_networks_for_images(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """FLOPs are per image; each block costs about a third of the network trained end to end."""
    if preset.startswith("vit"):
        pytest.importorskip("transformers", reason="transformers is not importable")
    path = CONFIGS / f"{preset}.toml"
    assert cli.run(["flops", str(path), "--json", "--image-size", "16", "--classes", "7"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["image_size"], table["classes"]) == ([16, 16], 7)
    config = load_config(path)
    config.model.image_size, config.model.n_classes = [16, 16], 7
    assert list(table["steps"]) == ["block 1", "block 2", "block 3", "end to end"]
    for name, step in table["steps"].items():
        layers = 12 if name == "end to end" else 4
        cost = step_cost(config, Passes(noise_levels=1, core_layers=layers))
        assert step["layers"] == layers
        assert step["flops_per_image"] == pytest.approx(table["positions"] * cost.total)
        kinds = step["by_kind"]
        assert kinds["forward"] + kinds["backward"] == pytest.approx(step["flops_per_image"])
        assert sum(part["attention"] for part in step["by_part"].values()) == pytest.approx(kinds["attention"])
        assert (
            step["flops_per_image"]
            < table["steps"]["end to end"]["flops_per_image"] * (1 if layers == 12 else 0.36) + 1
        )
        assert step["training_bytes"] == 4 * (step["parameters"] + 3 * step["trained_parameters"])
        fixed = 7 * config.model.d_model if config.model.network == "vit" else 0
        assert step["parameters"] - step["trained_parameters"] == fixed
    assert cli.run(["flops", str(path)]) == 0
    told = capsys.readouterr().out
    assert "FLOPs per image of a training step, images of 32 x 32 pixels, 10 classes" in told
    assert "end to end" in told


def test_the_frame_costs_what_its_owner_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for shared in ("all", "owned", "frozen"):
        path = tmp_path / f"{shared}.toml"
        path.write_text((CONFIGS / "dit-blocks.toml").read_text().replace('shared = "all"', f'shared = "{shared}"'))
        assert cli.run(["flops", str(path), "--json"]) == 0
        steps = json.loads(capsys.readouterr().out)["steps"]
        found[shared] = [steps[f"block {block}"] for block in (1, 2)]
    for key in ("flops_per_image", "trained_parameters"):
        one, two = ({shared: pair[block][key] for shared, pair in found.items()} for block in (0, 1))
        assert one["all"] == one["owned"] > one["frozen"] == two["frozen"]
        assert two["all"] > two["owned"] == two["frozen"]


def test_a_plain_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not importable")
    path = tmp_path / "plain.toml"
    text = (CONFIGS / "vit-blocks.toml").read_text().replace("n_blocks = 3", "n_blocks = 0")
    path.write_text(text.replace('"denoise_class"', '"classify"'))
    assert cli.run(["flops", str(path), "--json"]) == 0
    [(name, step)] = json.loads(capsys.readouterr().out)["steps"].items()
    assert (name, step["layers"], step["by_part"]["conditioning"]["forward"]) == ("classify", 12, 0)
    assert cli.run(["flops", str(path)]) == 0
    assert "x end to end" not in capsys.readouterr().out


def test_images_that_cannot_be_cut() -> None:
    with pytest.raises(UserError, match="images of 30 x 30 pixels cannot be cut into patches"):
        cli.run(["flops", str(CONFIGS / "dit-blocks.toml"), "--image-size", "30"])
