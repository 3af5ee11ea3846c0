"""`recurrent-db plan`: communication and time against hand counts, remedies, mistakes."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

from recurrent_db import cli
from recurrent_db.accounting import plan, plan_text
from recurrent_db.commands import plan as command
from recurrent_db.errors import UserError

HUGINN = str(ROOT / "train/configs/huginn-3.5b.toml")


def planner(*words: str) -> plan.Planner:
    return command.make_planner(command.arguments(list(words), "recurrent-db plan"))


def test_what_a_step_sends_by_hand() -> None:
    found = planner(HUGINN, "--gpus", "512", "--gpu", "H100", "--objective.name", "next_token")
    sizes = found.sizes
    network = plan.Network(450e9, 50e9, 8, 0.8)
    (reduced,) = plan.collectives(sizes, "ddp", 512, 1, 8, 2, network)
    assert reduced.wire_bytes == pytest.approx(2 * 511 / 512 * 4 * sizes.total)
    hops = reduced.count * plan.HOP * 9
    assert reduced.seconds == pytest.approx(reduced.wire_bytes / (0.8 * 400e9) + hops)  # eight cards of 50 GB/s
    gathered, scattered = plan.collectives(sizes, "fsdp", 512, 512, 8, 2, network)
    assert gathered.count == 9 * 4 + 1 + 1  # four blocks: one forward and eight backwards; the core; the rest
    assert scattered.count == 4 + 1 + 1
    assert scattered.bytes == 4 * sizes.total
    kinds = [c.kind for c in plan.collectives(sizes, "hsdp", 512, 8, 8, 2, network)]
    assert kinds == ["all-gather", "reduce-scatter", "all-reduce"]
    assert plan.collectives(sizes, "none", 1, 1, 8, 2, network) == []


def test_what_is_sent_does_not_depend_on_depth() -> None:
    sent = []
    for depth in ("1", "8"):
        options = ["--objective.unrolled.truncation", depth, "--objective.unrolled.mean_depth", depth]
        sent.append(planner(HUGINN, "--gpus", "8", "--gpu", "H200", *options).estimate(8, "fsdp", 8).collectives)
    assert sent[0] == sent[1]


def test_time_follows_from_flops() -> None:
    found = planner(HUGINN, "--gpus", "8", "--gpu", "H200", "--mfu", "0.5", "--budget.steps", "10")
    estimate = found.best(8)
    assert estimate.compute_seconds == pytest.approx(found.step_flops / (8 * 989e12 * 0.5))
    row = plan.table(found, 8)["modes"][0]
    assert row["budget_seconds"] == pytest.approx(10 * row["step_seconds"])
    assert row["tokens_per_s"] == pytest.approx(4096 * 4096 / row["step_seconds"])
    assert [r["gpus"] for r in plan.table(found, 8)["by_gpus"]] == list(plan.COUNTS)


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = [HUGINN, "--gpus", "8", "--gpu", "H100", "--data.micro-batch-size", "2"]
    assert cli.run(["plan", *words]) == 0
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit"))
    assert "--run.activation-checkpointing" in told
    remedies = plan.table(planner(*words), 8)["remedies"]
    for remedy in remedies:  # each one does make it fit
        options = re.sub(r" ?\(with \w+\)", "", remedy)
        if options.startswith("--"):
            given = options.replace("checkpointing", "checkpointing true").split()
            assert planner(*words, *given).best(8).fits
    assert remedies


def test_modes_are_those_that_the_configuration_allows() -> None:
    words = [
        str(ROOT / "train/configs/pythia-70m-looped.toml"),
        "--gpus",
        "16",
        "--gpu",
        "H200",
        "--data.batch_size",
        "64",
    ]
    modes = lambda *more: planner(*words, *more).modes(16)  # noqa: E731
    assert modes() == [("ddp", 1), ("fsdp", 16), ("hsdp", 8)]
    assert modes("--optim.name", "muon") == modes("--parallel.mode", "ddp") == [("ddp", 1)]
    assert modes("--parallel.mode", "fsdp") == [("fsdp", 16), ("hsdp", 8)]
    assert modes("--parallel.mode", "fsdp", "--parallel.shard-size", "4") == [("hsdp", 4)]
    assert planner(*words, "--parallel.mode", "fsdp", "--parallel.shard-size", "4").modes(2) == [("fsdp", 2)]


def test_a_model_in_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="recurrent-db flops"):
        planner(str(ROOT / "train/configs/gpt-blocks.toml"), "--gpus", "2", "--gpu", "A100")


def test_the_guide_quotes_what_a_plan_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/guides/several-gpus.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```sh\nrecurrent-db plan ([^\n]*)\n```\n.*?```text\n(.*?)\n```", text, re.DOTALL)
    assert quoted
    for words, output in quoted:
        args = command.arguments(words.split(), "recurrent-db plan")
        printed = iter(plan_text.lines(command.make_planner(args), args.gpus, str(args.config)))
        missing = [line for line in output.splitlines() if line != "..." and line not in printed]  # in the plan's order
        assert missing == []
