"""`recurrent-db plan`: its JSON, and mistakes on its command line."""

from __future__ import annotations

import json
import re

import pytest
from helpers import ROOT

from recurrent_db import cli
from recurrent_db.errors import UserError

HUGINN, TINY = (str(ROOT / f"train/configs/{name}.toml") for name in ("huginn-3.5b", "tiny"))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", TINY, "--gpus", "2", "--gpu", "h100", "--json", "--data.batch-size", "16", "--seed", "3"]
    assert cli.run(words) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["fits"]
    assert [row["mode"] for row in table["modes"]] == ["ddp", "fsdp"]
    assert table["tokens_per_step"] == 16 * 128
    for row in table["modes"]:
        assert sum(row["memory"].values()) == row["peak_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "--gpu", "H2000"], "did you mean H200"),
        (["--gpus", "0", "--gpu", "H200"], "--gpus must be 1 or more, got 0"),
        (["--gpus", "3", "--gpu", "H200"], "is not a multiple of 3 GPUs"),
        (["--gpus", "8", "--gpu", "H200", "--mfu", "1.5"], "at most 1"),
        (["--gpus", "8", "--gpu", "H200", "--mfu", "0"], "--mfu must be above 0"),
        (["--gpus", "8"], "required"),
        (["--gpus", "8", "--gpu", "H200", "--data.batch-sise", "3"], "batch"),
        (["--gpus", "8", "--gpu", "H200", "--parallel.mode", "none"], "runs one process"),
        (["--gpus", "8", "--gpu", "H200", "--parallel.shard-size", "4"], "needs parallel.mode = fsdp"),
        (
            ["--gpus", "8", "--gpu", "H200", "--parallel.mode", "fsdp", "--parallel.shard-size", "3"],
            "does not divide 8",
        ),
        (
            ["--gpus", "8", "--gpu", "H200", "--parallel.mode", "fsdp", "--optim.name", "muon"],
            "muon does not run on sharded matrices",
        ),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        cli.run(["plan", HUGINN, *words])
    assert "\n" not in str(error.value)


def test_networks_for_images_are_not_planned() -> None:
    with pytest.raises(UserError, match=r"plan knows language models only, and .*dit-blocks\.toml trains on images"):
        cli.run(["plan", str(ROOT / "train/configs/dit-blocks.toml"), "--gpus", "1", "--gpu", "H200"])
