"""Blocks that were trained apart, joined: what is kept, what is said of them, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from block_runs import rows, train

from recurrent_db import cli
from recurrent_db.errors import UserError
from recurrent_db.files import locked
from recurrent_db.report.page import write_report
from recurrent_db.report.runs import read_runs
from recurrent_db.report.sections.blocks import accounts
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.join_blocks import join


def test_a_join_again_loses_nothing(
    data: Path, frozen_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same blocks: the folder stays. Others: what was evaluated or trained further in it is moved aside."""
    one, out = frozen_runs[0], tmp_path / "joined"
    joined = join(frozen_runs, out)
    (out / "eval").mkdir()
    (out / "eval/depth_curve.json").write_text("mine")
    before = sorted(out.rglob("*"))
    assert join(frozen_runs, out, overwrite=True) == joined
    assert sorted(out.rglob("*")) == before
    assert "left unchanged" in capsys.readouterr().err
    assert train(data, tmp_path / "new", 2, "--blocks.only", 2, "--blocks.shared", "frozen", "--optim.lr", 1e-3) == 0
    capsys.readouterr()
    join([one, tmp_path / "new"], out, overwrite=True)
    assert f"was evaluated or trained further: moved to {out}-before-1" in capsys.readouterr().err
    assert (tmp_path / "joined-before-1/eval/depth_curve.json").read_text() == "mine"
    assert not (out / "eval").exists()

    # Trained further: what it cost is counted on, and it is no longer what was joined.
    assert train(data, out, 2, "--blocks.shared", "frozen", "--budget.steps", 14, resume="newest") == 0
    further = join([out], tmp_path / "further")["blocks"]
    was, end = json.loads((out / "blocks.json").read_text()), Checkpoint(find_checkpoint(out)).training()[0]
    for name in ("tokens", "flops", "flops_causal", "seconds"):
        more = sum(further[n][name] - was["blocks"][n][name] for n in "12")
        assert more == pytest.approx(end.row()[name] - was["joined"][name])
        assert more > 0
    assert all(further[n]["weights"] != was["blocks"][n]["weights"] for n in "12")
    assert further["1"]["steps"] + further["2"]["steps"] == 6 + 6 + 8
    with locked(out), pytest.raises(UserError, match="is in use by"):
        join(frozen_runs, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    join([one, tmp_path / "new"], out, overwrite=True)  # the same blocks, which are no longer what is there
    assert len(rows(tmp_path / "joined-before-2")) == 8
    assert not (out / "metrics.jsonl").exists()
    for bad in (
        "{",
        "[]",
        '{"blocks": [1]}',
        '{"blocks": {"1": {}}, "joined": {}}',
        '{"joined": {"weights": 1}, "blocks": {}}',
    ):
        (out / "blocks.json").write_text(bad)
        with pytest.raises(UserError, match=r"blocks\.json is damaged"):
            join([out], tmp_path / "bad")
    # The joined run's counters are those of the blocks that are in it.
    join([tmp_path / "joined-before-1", tmp_path / "new"], tmp_path / "swapped")
    state = Checkpoint(find_checkpoint(tmp_path / "swapped")).training()[0]
    account = json.loads((tmp_path / "swapped/blocks.json").read_text())["blocks"]
    for name in ("tokens", "flops", "flops_backward_weight", "seconds"):
        assert state.row()[name] == pytest.approx(sum(block[name] for block in account.values()))


def test_the_account_is_of_the_checkpoint_that_was_taken(data: Path, frozen_runs: list[Path], tmp_path: Path) -> None:
    words = ["--blocks.only", 2, "--blocks.shared", "frozen", "--eval.points", 2, "--run.checkpoint_every", 3]
    assert train(data, tmp_path / "two", 2, *words, "--optim.lr", 1e-2) == 0
    measured = [row["eval/loss_block_2"] for row in rows(tmp_path / "two") if "eval/loss_block_2" in row]
    assert len(measured) == 2 and measured[0] != measured[1]
    for name, loss in (("step-00000003", measured[0]), ("step-00000006", measured[1])):
        account = join([frozen_runs[0], tmp_path / "two/checkpoints" / name], tmp_path / name)["blocks"]["2"]
        assert account["loss"] == loss


def test_the_account_of_blocks_that_trained_in_one_process(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "whole", 2, "--blocks.shared", "all", "--model.block_layers", 1, 3) == 0
    account = join([tmp_path / "whole"], tmp_path / "joined")["blocks"]
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    steps = {number: sum(f"loss_block_{number}" in row for row in rows) for number in "12"}
    assert min(steps.values()) > 0
    for name in ("tokens", "flops", "seconds"):
        assert sum(block[name] for block in account.values()) == pytest.approx(rows[-1][name])
    each = {number: account[number]["flops"] / steps[number] for number in "12"}
    assert each["2"] > 1.5 * each["1"]
    assert {number: block["steps"] for number, block in account.items()} == steps
    assert all(block["budget_spent"] == 1 and not block["alone"] for block in account.values())
    # Where the run's metrics are gone it says so, and does not take the run's counters for the block's.
    shutil.copytree(tmp_path / "whole", tmp_path / "bare", ignore=shutil.ignore_patterns("metrics.jsonl"))
    assert cli.run(["blocks", "join", str(tmp_path / "bare"), str(tmp_path / "of-bare")]) == 0
    assert "unknown tokens, unknown FLOPs" in capsys.readouterr().out
    # A run that was stopped joins as well, and it is said.
    assert (
        train(data, tmp_path / "one", 2, "--blocks.only", 1, "--blocks.shared", "frozen", "--run.checkpoint_every", 3)
        == 0
    )
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, "--blocks.shared", "frozen") == 0
    shutil.rmtree(find_checkpoint(tmp_path / "one"))
    capsys.readouterr()
    assert cli.run(["blocks", "join", str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "some")]) == 0
    assert "one was stopped at 50% of its budget" in capsys.readouterr().err


def test_the_report_shows_blocks(frozen_runs: list[Path], tmp_path: Path) -> None:
    join(frozen_runs, tmp_path / "joined")
    write_report([tmp_path / "joined", *frozen_runs], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('id="blocks"') : page.index('id="throughput"')]
    assert section.count("block 1") == section.count("block 2") == 2  # of the joined run, and of its own
    losses = read_runs([tmp_path / "joined"])[0]
    account = json.loads((tmp_path / "joined/blocks.json").read_text())["blocks"]
    assert len(losses.loss_by_sigma) == sum(len(block["loss_by_sigma"]) for block in account.values()) == 9
    assert f"{account['1']['loss']:.3f}" in section
    assert "nothing" in section


def test_the_report_shows_blocks_of_one_process(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "whole", 2, "--blocks.shared", "all", "--model.block_layers", 1, 3) == 0
    [run] = read_runs([tmp_path / "whole"])
    joined = join([tmp_path / "whole"], tmp_path / "joined")["blocks"]
    for number, block in accounts(run).items():
        for name in ("layers", "tokens", "flops", "flops_forward", "flops_backward"):
            assert block[name] == pytest.approx(joined[number][name])
    write_report([tmp_path / "whole"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('id="blocks"') : page.index('id="throughput"')]
    assert section.count("trained with others") == 2


def test_mistakes_in_joining_are_one_line(data: Path, frozen_runs: list[Path], tmp_path: Path) -> None:
    one, two = frozen_runs
    assert train(data, tmp_path / "other", 2, "--blocks.only", 2, "--blocks.shared", "frozen", "--seed", 5) == 0
    for paths, message in (
        ([one], "no run given holds block 2"),
        ([one, two, tmp_path / "copy"], "hold block 1"),
        ([one, tmp_path / "other"], "shared embedding differs"),
        ([one, tmp_path / "nowhere"], "no run directory"),
    ):
        if paths[-1].name == "copy":
            shutil.copytree(one, tmp_path / "copy")
        with pytest.raises(UserError, match=message) as caught:
            join(paths, tmp_path / "out")
        assert "\n" not in str(caught.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists"):
            join(frozen_runs, tmp_path / "mine", overwrite)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert cli.run(["blocks", "join", str(one), str(two), str(tmp_path / "out")]) == 0
    with pytest.raises(UserError, match="at least one run"):
        cli.run(["blocks", "join", str(one)])
