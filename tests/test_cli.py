"""The recurrent-db command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recurrent_db import arguments as commandline
from recurrent_db import cli
from recurrent_db.accounting.flops import Passes, step_cost
from recurrent_db.commands import flops
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.objectives import build_objective
from recurrent_db.rng import Rng

CONFIGS = Path(__file__).parents[1] / "train/configs"


def test_flops_json_has_the_contracts_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["flops", str(CONFIGS / "pythia-70m-looped.toml"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    ways = {"next_token", "unrolled_truncated", "unrolled_full", "denoise", "denoise_two_stream"}
    assert set(table["per_token"]) == ways == set(table["ratio_to_denoise"])
    assert {"by_part", "parameters", "cache_bytes_per_token"} <= table.keys()
    for name, parts in table["by_part"].items():
        assert sum(c["forward"] + c["backward"] for c in parts.values()) == pytest.approx(table["per_token"][name])
    assert 1 < table["ratio_to_denoise"]["denoise_two_stream"] < 2
    # 2 (keys and values) x 512 x 2 bytes for each of 2 + 4 K + 2 layers.
    assert table["cache_bytes_per_token"]["8"] == 2 * 512 * 2 * 36


def test_flops_of_the_recipe_are_the_mean_of_its_steps() -> None:
    config = load_config(CONFIGS / "tiny.toml", [
        "--objective.one_step.next_token_share", "0.5", "--objective.one_step.first_probability", "0",
        "--objective.one_step.prior_iterations", "1", "--budget.tokens", "1e6",
    ])  # fmt: skip
    config.model.vocab_size = 2048
    none = step_cost(config, Passes(core_grad=0, injections_grad=1)).total
    one, two = (step_cost(config, Passes(core_no_grad=before, core_grad=1)).total for before in (0, 1))
    recipe = flops.flops_table(config, 3.0, 2)["recipe"]
    assert recipe["per_token"] == pytest.approx(0.4 * none + 0.1 * one + 0.5 * two)
    assert recipe["ratio_to_next_token"] == pytest.approx(recipe["per_token"] / one)
    assert recipe["shallow_share"] == 0.4
    config.budget.tokens = None
    assert flops.flops_table(config, 3.0, 2)["recipe"]["shallow_share"] is None
    config.budget.tokens = 10**9
    long = flops.flops_table(config, 3.0, 2)["recipe"]
    assert long["shallow_share"] == 0 < long["shallow_asked"] < 0.15


def test_flops_of_a_denoiser_with_a_level_per_token(tmp_path: Path) -> None:
    """The table is that of the configuration's own step."""
    path = tmp_path / "token.toml"
    text = (CONFIGS / "tiny.toml").read_text()
    path.write_text(text.replace("[objective.unrolled]", '[objective.denoise]\ndraw = "token"\n[objective.unrolled]'))
    config = load_config(path, ["--objective.name", "denoise"])
    config.model.vocab_size = 2048
    own = step_cost(config, build_objective(config).passes(Rng(0, 0), 0.0)).total
    assert flops.flops_table(config, 3.0, 2)["per_token"]["denoise"] == pytest.approx(own)


def test_the_papers_ratio_is_printed_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["flops", str(CONFIGS / "pythia-70m-looped.toml")])
    told = capsys.readouterr().out
    assert "Counted in iterations, as the paper does: 10.7; counted in FLOPs:" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flopz"], "unknown command 'flopz'"),
        (["flops"], "required"),
        (["flops", "nowhere.toml"], "no config file"),
        (["flops", str(CONFIGS / "tiny.toml"), "--epochs-ratio", "0"], "above 0"),
        (["flops", str(CONFIGS / "tiny.toml"), "--epochs-ratio", "nan"], "--epochs-ratio must be above 0"),
        (["flops", str(CONFIGS / "tiny.toml"), "--cache-bytes", "-2"], "--cache-bytes must be above 0"),
        (["flops", str(CONFIGS / "tiny.toml"), "--vocab-size", "0"], "--vocab-size must be above 0"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.run(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in cli.COMMANDS)
    assert cli.run([]) == 2


def test_of_several_processes_the_first_reports_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank, line, waited in (
        (None, "error: k\n", []),
        ("0", "error: k\n", []),
        ("1", "error (process 1): k\n", [20.0]),
    ):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            commandline.fail("k")
        assert stop.value.code == 2
        assert capsys.readouterr().err == line
        assert waits == waited
