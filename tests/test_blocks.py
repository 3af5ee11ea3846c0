"""Blocks that train alone: who has which noise, the conversion, the language model in blocks, runs of one block."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import MICRO, ROOT, batch, load_script, micro_config, micro_model, synthetic_data
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import recurrent_db
from recurrent_db import cli
from recurrent_db.blocks import Partition, convert, split_layers
from recurrent_db.checkpoint import Checkpoint, find_checkpoint
from recurrent_db.config import load_config
from recurrent_db.denoise.noise import LogNormal, LogUniform, draw_sigma
from recurrent_db.errors import UserError
from recurrent_db.flops import Passes, cost_per_token, step_cost, total
from recurrent_db.generate import Decoder
from recurrent_db.hf_export import export
from recurrent_db.join import join
from recurrent_db.likelihood import draw_log_probabilities, token_log_probabilities
from recurrent_db.model import build_model
from recurrent_db.model.blocks import BlocksLM
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.blocks import BlockDenoise, BlockWalk, noise_partition
from recurrent_db.recurrence import NoiseSource, Probe
from recurrent_db.repl import ReplArgs, Session
from recurrent_db.repl import main as repl_main
from recurrent_db.reply import Settings
from recurrent_db.report import write_report
from recurrent_db.report.data import read_runs
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.trace import table, trace

LAW = LogNormal(-0.4, 1.0, 0.02, 20.0)
BLOCKS = [
    "--objective.name", "denoise-token",
    "--model.n_prelude", "0", "--model.n_core", "4", "--model.n_coda", "0", "--model.expected_depth", "1",
    "--objective.token.conditioning", "two-stream", "--objective.token.grid", "edges",
]  # fmt: skip


def blocks_config(*overrides: object, n: int = 4):
    return micro_config(*BLOCKS, "--model.n_blocks", n, *overrides)


# ---------------------------------------------------------------------------------------------------------------------
# Who has which noise


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("uniform", [False, True])
def test_every_noise_level_has_one_block_and_high_noise_the_first(n: int, uniform: bool) -> None:
    parts = Partition.cut(LAW, n, uniform=uniform)
    assert parts.block_of(LAW.sigma_max) == 1
    assert parts.block_of(LAW.sigma_min) == n
    levels = torch.logspace(math.log10(LAW.sigma_max), math.log10(LAW.sigma_min), 301, dtype=torch.float64).tolist()
    found = [parts.block_of(min(max(sigma, LAW.sigma_min), LAW.sigma_max)) for sigma in levels]
    assert found == sorted(found)
    assert set(found) == set(range(1, n + 1))
    for block in range(1, n + 1):  # the seam: training's ranges are those that scoring and sampling ask for
        low, high = parts.range_of(block)
        assert parts.block_of(high) == block
        assert parts.block_of(math.nextafter(low, math.inf)) == block
        if block < n:
            assert parts.block_of(low) == block + 1
    law = LogUniform(LAW.sigma_min, LAW.sigma_max) if uniform else LAW
    masses = law.cdf(torch.tensor(parts.edges, dtype=torch.float64)).diff().neg()
    torch.testing.assert_close(masses, torch.full((n,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="outside"):
        parts.block_of(LAW.sigma_max * 1.01)


def test_overlap_widens_in_log_space_and_stays_in_the_range() -> None:
    plain, wide = Partition.cut(LAW, 4), Partition.cut(LAW, 4, gamma=0.1)
    assert plain.edges == wide.edges
    for block in (2, 3):
        (low, high), (lower, higher) = plain.range_of(block), wide.range_of(block)
        assert math.log(higher / high) == pytest.approx(0.1 * math.log(high / low))
        assert math.log(low / lower) == pytest.approx(0.1 * math.log(high / low))
    assert wide.range_of(1)[1] == LAW.sigma_max
    assert wide.range_of(4)[0] == LAW.sigma_min


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 4), (4, 8), (3, 12), (6, 6), (3, 4)])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_walk_gives_each_block_its_steps_in_order(n: int, k: int, uniform: bool) -> None:
    parts = Partition.cut(LAW, n, gamma=0.1, uniform=uniform)
    levels = parts.levels(k)
    assert levels[0] == LAW.sigma_max
    assert all(a > b for a, b in itertools.pairwise(levels))
    visited = [parts.block_of(sigma) for sigma in levels]
    assert visited == sorted(visited)
    if k % n == 0:
        assert visited == [block for block in range(1, n + 1) for _ in range(k // n)]


def test_split_of_layers() -> None:
    assert split_layers(12, 4) == [3, 3, 3, 3]
    assert split_layers(7, 3) == [3, 2, 2]
    assert split_layers(6, 2, [1, 5]) == [1, 5]
    for bad in ((2, 3, ()), (6, 2, (1, 4)), (6, 2, (6, 0)), (6, 0, ())):
        with pytest.raises(UserError):
            split_layers(*bad)


# ---------------------------------------------------------------------------------------------------------------------
# Any residual stack


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return x + self.out(torch.tanh(self.into(x + shift)))


def test_a_fresh_conversion_computes_what_the_layers_compute() -> None:
    torch.manual_seed(0)
    layers = [Residual(3) for _ in range(5)]
    blocks = convert(layers, 2, LAW, width=3, sd=0.5, layers=[2, 3])
    z, sigma = torch.randn(4, 7, 3), torch.full((4,), 0.7)
    for number, part in ((1, layers[:2]), (2, layers[2:])):
        expected = blocks.precond.view(z, sigma[:, None, None])
        for layer in part:
            expected = layer(expected, 0.25)
        expected = blocks.precond.combine(z, expected, sigma[:, None, None])
        torch.testing.assert_close(blocks.denoise(number, z, sigma, 0.25), expected)
    assert [layer is blocks.block(2).layers[i] for i, layer in enumerate(layers[2:])] == [True] * 3


def test_a_block_trains_alone_and_the_walk_of_blocks_finds_the_data() -> None:
    """Two points on a line: each block is trained by itself, the other's weights never move, and the walk ends on both."""
    torch.manual_seed(0)
    law = LogNormal(-0.4, 1.2, 0.02, 10.0)
    blocks = convert([Residual(1, 32) for _ in range(4)], 2, law, width=1, sd=1.0, gamma=0.1)
    generator = torch.Generator().manual_seed(1)
    for number in (1, 2):
        before = {name: p.clone() for name, p in blocks.named_parameters()}
        optimizer = torch.optim.Adam(blocks.block(number).parameters(), lr=1e-2)
        for _ in range(400):
            y = torch.randint(2, (128, 1), generator=generator) * 2.0 - 1.0
            u, eps = torch.rand(128, generator=generator), torch.randn(128, 1, generator=generator)
            optimizer.zero_grad()
            blocks.loss(number, y, u, eps).backward()
            optimizer.step()
        moved = {name.split(".")[1] for name, p in blocks.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {str(number - 1)}
    samples = blocks.walk(torch.randn(512, 1, generator=generator), 16)[:, 0]
    assert 0.35 < (samples > 0).double().mean() < 0.65
    assert (samples.abs() - 1).abs().mean() < 0.15
    draws = blocks.draw(1, torch.rand(1000, generator=generator))
    low, high = blocks.partition.range_of(1)
    assert low <= draws.min()
    assert draws.max() <= high


# ---------------------------------------------------------------------------------------------------------------------
# The language model in blocks


def test_one_block_is_the_two_stream_denoiser() -> None:
    """B = 1 against the looped model's own two-stream objective with the same weights: loss and walk."""
    looped_config = micro_config(*BLOCKS, "--objective.token.draw", "token")
    looped, looped_objective = micro_model(looped_config)
    config = blocks_config("--objective.token.draw", "token", n=1)
    model, objective = micro_model(config)
    with torch.no_grad():
        theirs = dict(looped.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs[name.removeprefix("blocks.1.")])
    micro, rng = batch(), Rng(0, 3)
    loss = objective(model, micro, rng, 0.0)[0]
    torch.testing.assert_close(loss, looped_objective(looped, micro, rng, 0.0)[0], rtol=1e-12, atol=0)
    for k in (1, 3):
        with torch.no_grad():
            ours, reference = (
                token_log_probabilities(m, micro.tokens_BT, micro.targets_BT, [k], rng, micro.sample_index_B)[k]
                for m in (model, looped)
            )
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


def test_training_scoring_and_walk_agree_on_who_has_which_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam: every pass of a block, in training (no overlap) and in a walk, is at a level that `block_of` gives it."""
    config = blocks_config("--blocks.gamma", "0", "--objective.token.draw", "token")
    model, objective = micro_model(config)
    assert isinstance(model, BlocksLM)
    assert isinstance(objective, BlockDenoise)
    parts = noise_partition(config)
    seen: list[tuple[int, float]] = []
    for number in model.held():
        block = model.block(number)

        def noted(c_noise, number=number, embed=block.noise_embedding.forward):
            seen.extend((number, math.exp(4 * c)) for c in c_noise.flatten().double().tolist())
            return embed(c_noise)

        monkeypatch.setattr(block.noise_embedding, "forward", noted)
    micro = batch()
    for step in range(12):
        objective(model, micro, Rng(0, step), 0.0)
    assert {number for number, _ in seen} == {1, 2, 3, 4}
    trained = len(seen)
    with torch.no_grad():
        token_log_probabilities(model, micro.tokens_BT, micro.targets_BT, [1, 4, 8], Rng(0, -1), micro.sample_index_B)
    assert len(seen) > trained
    for number, sigma in seen:
        at_edge = min(abs(math.log(sigma / edge)) for edge in parts.edges) < 1e-4  # fp32 rounding cannot tell
        inside = min(max(sigma, config.objective.token.sigma_min), config.objective.token.sigma_max)
        assert at_edge or parts.block_of(inside) == number
    b_step = [number for number, _ in seen[trained:]]
    assert sorted(set(b_step)) == [1, 2, 3, 4]


def test_a_step_moves_its_own_block_and_the_owner_the_embedding() -> None:
    for shared, owner, block, moves in (
        ("owned", 1, 1, True), ("owned", 1, 2, False), ("owned", 3, 3, True), ("frozen", 1, 1, False),
    ):  # fmt: skip
        config = blocks_config("--blocks.shared", shared, "--blocks.owner", owner)
        model, _ = micro_model(config)
        config.blocks.only = block
        objective = build_objective(config)
        objective(model, batch(), Rng(0, 0), 0.0)[0].backward()
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert ("embedding.weight" in with_gradient) == moves
        assert {name.split(".")[1] for name in with_gradient - {"embedding.weight"}} == {str(block)}


def test_one_block_is_built_alone_with_the_values_it_has_among_the_others() -> None:
    config = blocks_config("--model.block_layers", 1, 2, 1, n=3)
    config.model.vocab_size = 61
    whole = build_model(config.model, 7).state_dict()
    alone = build_model(config.model, 7, only_block=2)
    names = {name for name in whole if name.startswith(("blocks.2.", "embedding."))}
    assert alone.state_dict().keys() == names
    for name, value in alone.state_dict().items():
        assert torch.equal(value, whole[name])
    assert any(name.startswith("blocks.2.core.blocks.1.") for name in names)
    with pytest.raises(UserError, match=r"block 2 of 3 alone.*blocks join"):
        alone.block(1)
    # All of the model's parameters are counted once.
    model = build_model(config.model, None, "meta")
    counts = model.parameter_counts()
    assert counts["total"] + counts["noise_conditioning"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_no_scored_logit_looks_ahead(k: int, sampler: str) -> None:
    model, _ = micro_model(blocks_config("--objective.token.sampler", sampler))
    micro, rng = batch(2, 12), Rng(0, EVALUATION_STEP)
    noise = NoiseSource(rng, micro.sample_index_B, 32)

    def hidden(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            [(_, found)] = model.recurrence.hidden(model, tokens, model.encode(tokens), [k], noise)
        return model.logits(found)

    changed = micro.tokens_BT.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 61
    before, after = hidden(micro.tokens_BT), hidden(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-9, atol=1e-9)
    assert (before[:, 6:] - after[:, 6:]).abs().amax() > 1e-3  # the positive control


def test_a_walk_of_blocks_by_hand() -> None:
    """The B-step walk against the equations, written out with a mask over one sequence of clean and noisy positions."""
    model, objective = micro_model(blocks_config("--objective.token.bridge", "state"))
    assert isinstance(model, BlocksLM)
    walk = objective.recurrence
    assert isinstance(walk, BlockWalk)
    micro = batch(2, 8)
    noise = NoiseSource(Rng(0, -1), micro.sample_index_B, 32)
    probe = Probe()
    with torch.no_grad():
        e = model.encode(micro.tokens_BT)
        [(_, hidden)] = walk.hidden(model, micro.tokens_BT, e, [4], noise, probe)
        z, sd = noise.normal(8, 32, "noise", e.device) * 20.0, 1 / math.sqrt(32)
        edges = [*noise_partition(blocks_config()).edges[:4]]
        mask = torch.full((16, 16), False)
        mask[:8, :8] = torch.ones(8, 8).tril().bool()  # clean sees clean up to itself
        mask[8:, :8], mask[8:, 8:] = torch.ones(8, 8).tril().bool(), torch.eye(8).bool()
        for number, (sigma, following) in enumerate(itertools.pairwise([*edges, 0.0]), 1):
            block = model.block(number)
            c_in, mute = 1 / math.sqrt(sigma**2 + sd**2), 1 / (1 + sigma**2)
            view = (c_in * mute * z.double()).float().double()
            x = torch.cat((block.core.injection(0 * e, e), block.core.injection(view, e)), dim=1)
            c_noise = torch.full((2, 1), sigma, dtype=torch.float32).log() / 4
            assert block.noise_embedding is not None
            for layer, modulation in zip(block.core.blocks, block.noise_embedding(c_noise), strict=True):
                both = tuple(torch.cat((0 * e, m.expand(2, 8, 32)), dim=1) for m in modulation)
                cos, sin = model.rope(8)
                q, key, v = layer.before(x, (cos.repeat(2, 1), sin.repeat(2, 1)), both)
                mixed = torch.nn.functional.scaled_dot_product_attention(q, key, v, attn_mask=mask)
                x = layer.after(x, mixed.transpose(1, 2).flatten(2), both)
            estimate = sd**2 / (sigma**2 + sd**2) * z + sigma * sd / math.sqrt(sigma**2 + sd**2) * x[:, 8:]
            torch.testing.assert_close(probe.states[number - 1].double(), estimate.double(), rtol=1e-4, atol=1e-5)
            z = following / sigma * z + (1 - following / sigma) * estimate if following else z
        torch.testing.assert_close(hidden, model.block(4).decode(estimate / sd), rtol=1e-4, atol=1e-4)


def test_the_mixture_is_over_noise_and_beats_its_worst_draw() -> None:
    model, _ = micro_model(blocks_config())
    micro = batch()
    with torch.no_grad():
        arguments = model, micro.tokens_BT, micro.targets_BT, [4], Rng(0, -1), micro.sample_index_B
        each = draw_log_probabilities(*arguments, 3)[4]
        mixed = token_log_probabilities(*arguments, 3)[4]
    assert each.std(0).max() > 1e-4
    torch.testing.assert_close(mixed, each.exp().mean(0).log(), rtol=1e-4, atol=1e-4)


def test_flops_are_those_of_the_block() -> None:
    """A step costs its block; a walk of B steps all blocks once; both counted by parts of the whole."""
    config = blocks_config("--model.block_layers", 1, 3, "--blocks.shared", "all", n=2)
    config.model.vocab_size = 61
    objective = build_objective(config)
    whole = dataclasses.replace(config.model, n_blocks=0, block_layers=[])
    costs = {}
    for step in range(16):
        passes = objective.passes(Rng(0, step), 0.0)
        costs[passes.core_layers] = total(cost_per_token(config.model, 32, passes)).total
        alone = dataclasses.replace(whole, n_core=int(passes.core_layers))
        plain = dataclasses.replace(passes, core_layers=0, clean_layers=0)
        assert costs[passes.core_layers] == total(cost_per_token(alone, 32, plain)).total
    assert set(costs) == {1, 3}
    walk = objective.recurrence.passes(2)
    assert (walk.core_layers * walk.core_no_grad, walk.clean_layers * walk.clean_no_grad) == (4, 4)
    frozen = blocks_config("--blocks.only", 2, "--blocks.shared", "frozen", n=2)
    passes = build_objective(frozen).passes(Rng(0, 0), 0.0)
    head = cost_per_token(config.model, 32, passes)["head"]
    assert head.backward_weight == 0
    assert head.backward_input == head.forward > 0


@pytest.mark.parametrize("only", [0, 1, 2])
@pytest.mark.parametrize("name", ["denoise-token", "masked"])
def test_what_a_block_says_it_runs_is_what_it_runs(name: str, only: int) -> None:
    """A step, forward and backward, against PyTorch's own counter; a frozen table's gradient is not counted."""
    words = ["--objective.name", name, "--blocks.shared", "owned", "--model.block_layers", 1, 3]
    config = blocks_config(*words, n=2)
    config.model.vocab_size, config.blocks.only = 61, only
    model, objective = build_model(config.model, 0, only_block=only), build_objective(config)
    micro = batch(2, 32)
    for step in range(3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            objective(model, micro, Rng(0, step), 0.0)[0].backward()
        ours = step_cost(config, objective.passes(Rng(0, step), 0.0)).total
        assert ours == pytest.approx(counter.get_total_flops() / 64, rel=1e-3)


def test_flops_command_of_a_model_in_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "train/configs/gpt-blocks.toml")
    assert cli.run(["flops", config, "--json", "--vocab-size", "1024"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {"per_token", "by_part", "parameters", "cache_bytes_per_token"} <= table.keys()
    own = load_config(Path(config))
    own.model.vocab_size = 1024
    layers = total(cost_per_token(own.model, 128, Passes(core_grad=1)))
    assert table["plain_flops_per_token"] == layers.total
    for number, block in table["blocks"].items():
        held = build_model(own.model, None, "meta", int(number))
        assert block["parameters"] == sum(p.numel() for p in held.parameters())
        assert block["trained_parameters"] == block["parameters"] - (
            held.embedding.weight.numel() if number != "1" else 0
        )
        assert block["training_bytes"] == 4 * block["parameters"] + 12 * block["trained_parameters"]
        assert 0.24 < block["flops_per_token"] / table["end_to_end_flops_per_token"] < 0.28
    assert cli.run(["flops", config]) == 0
    assert "exchange nothing" in capsys.readouterr().out


def test_a_fitted_density_stays_in_the_blocks_own_range() -> None:
    config = blocks_config("--objective.token.density", "adaptive", "--objective.token.draw", "token")
    model, objective = micro_model(config)
    assert isinstance(objective, BlockDenoise)
    for step in range(8):
        objective(model, batch(), Rng(0, step), 0.0)
        objective.after_step(torch.tensor(True), lambda t: t)
    restored = build_objective(config)
    restored.load_state_dict(objective.state_dict())
    assert restored.state_dict() == objective.state_dict()
    for block, part in objective.blocks.items():
        low, high = objective.partition.range_of(block)
        draws = draw_sigma(part.density, 0.0, torch.linspace(0, 1, 50, dtype=torch.float64))
        assert draws.min() >= low * 0.999
        assert draws.max() <= high * 1.001


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--blocks.only", 5], "blocks.only must be 0"),
        (["--blocks.only", 2, "--blocks.shared", "all"], "blocks.shared = all"),
        (["--model.block_layers", 1, 2, 2, 2], "model.block_layers"),
        (["--model.n_core", 6], "do not split evenly into 4"),
        (["--model.n_prelude", 1], "no prelude"),
        (["--objective.name", "next_token"], "cannot train a model in blocks"),
        (["--objective.token.conditioning", "inject"], "two-stream"),
        (["--model.n_blocks", 0, "--blocks.only", 1], "needs a model in blocks"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        blocks_config(*words)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Runs of one block


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_data(tmp_path_factory.mktemp("synthetic") / "data")


def options(data: Path, n: int, *more: object) -> list[str]:
    return [
        *MICRO, *BLOCKS, "--model.n_blocks", str(n), "--data.path", str(data), "--budget.steps", "6", "--eval.points", "1",
        *map(str, more),
    ]  # fmt: skip


def train(data: Path, run: Path, n: int, *more: object, resume: str = "") -> int:
    config = load_config(None, [*options(data, n, *more), "--run.dir", str(run)])
    return load_script("train/pretrain.py").train(config, resume)


def weights(run: Path) -> dict[str, Tensor]:
    return Checkpoint(find_checkpoint(run)).weights()


@pytest.fixture(scope="module")
def frozen_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two blocks over a frozen embedding, one after another in this process."""
    root = tmp_path_factory.mktemp("frozen")
    runs = [root / "one", root / "two"]
    for number, run in enumerate(runs, 1):
        assert train(data, run, 2, "--blocks.only", number, "--blocks.shared", "frozen") == 0
    return runs


# What the processes of `blocks.sh` may not do. The files that one opens are kept, to see that no other's are among them.
WATCH = """
import atexit, os, sys
opened = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        raise SystemExit(f"a block spoke to somebody: {event}")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))
sys.addaudithook(watch)
def report():
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        opened.append("PROCESS GROUP")
    with open(os.path.join(os.environ["OPENED"], str(os.getpid())), "w") as file:
        file.write("\\n".join(opened))
atexit.register(report)
"""


def test_processes_at_once_share_nothing_and_equal_one_after_another(
    data: Path, frozen_runs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "opened").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "c.toml").write_text("")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "OPENED": str(tmp_path / "opened")}
    words = [ROOT / "train/launch/blocks.sh", tmp_path / "c.toml", tmp_path / "runs"]
    result = subprocess.run(
        [*map(str, words), *options(data, 2, "--blocks.shared", "frozen")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for number, alone in enumerate(frozen_runs, 1):
        theirs = weights(tmp_path / "runs" / f"block-{number}")
        ours = weights(alone)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [path.read_text() for path in (tmp_path / "opened").iterdir()]
    trainers = [log for log in logs if "train/pretrain.py" in log]
    assert len(trainers) == 2
    assert not any("PROCESS GROUP" in log for log in trainers)
    assert all(("/runs/block-1/" in log) != ("/runs/block-2/" in log) for log in trainers)
    # The joined model holds each block's own bits, and scores and generates.
    joined = weights(tmp_path / "runs/joined")
    assert joined.keys() == weights(frozen_runs[0]).keys() | weights(frozen_runs[1]).keys()
    for alone in frozen_runs:
        assert all(torch.equal(value, joined[name]) for name, value in weights(alone).items())
    account = json.loads((tmp_path / "runs/joined/blocks.json").read_text())["blocks"]
    assert {number: block["alone"] for number, block in account.items()} == {"1": True, "2": True}
    assert all(block["flops"] > 0 and block["memory"]["parameters_bytes"] > 0 for block in account.values())


def test_the_joined_model_is_like_any_other(frozen_runs: list[Path], tmp_path: Path) -> None:
    join(frozen_runs, tmp_path / "joined")
    model, tokenizer = recurrent_db.load(tmp_path / "joined", "cpu")
    assert recurrent_db.generate(model, tokenizer, "ab", k=2, max_new_tokens=4, temperature=0.0)
    # What generation draws from its cache is what scoring gives without one.
    ids = torch.tensor([[20, 31, 42, 53, 64]])
    noise = NoiseSource(Rng(0, EVALUATION_STEP), torch.tensor([0]), model.config.max_seq_len)
    with torch.no_grad():
        [(_, whole)] = model.recurrence.hidden(model, ids, model.encode(ids), [2], noise)
        decoder = Decoder(model, [[20]], 2, 5, Rng(0, EVALUATION_STEP), [0])
        for position, token in enumerate([31, 42, 53, 64, 0]):
            step = decoder.logits()[0]
            torch.testing.assert_close(step, model.logits(whole)[0, position], rtol=1e-3, atol=1e-3)
            decoder.ids[0].append(token)
    config = Checkpoint(find_checkpoint(tmp_path / "joined")).config()
    assert config.blocks.only == 0


def test_lm_eval_and_the_repl_take_a_joined_model(
    frozen_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join(frozen_runs, tmp_path / "joined")
    model, tokenizer = recurrent_db.load(tmp_path / "joined", "cpu")
    harness = pytest.importorskip("recurrent_db.lm_eval_model", reason="lm-eval is not installed")
    lm = harness.RecurrentDBLM(str(tmp_path / "joined"), k=2, draws=2, device="cpu")
    context, continuation = [20, 31, 42], [53, 64]
    [(total, _)] = lm._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    ids = torch.tensor([context + continuation])
    log_p = token_log_probabilities(
        model, ids[:, :-1], ids[:, 1:], [2], Rng(0, EVALUATION_STEP), torch.tensor([0]), draws=2
    )
    assert total < 0
    assert math.isfinite(total)
    assert abs(total - log_p[2][0, -2:].sum().item()) < 3  # other noise
    found = trace(model, context + continuation, 3, 4)
    assert found.log_p_NKV.shape[:2] == (3, 4)
    lines = table(found, 0, model, tokenizer)
    assert any(f"{noise_partition(blocks_config(n=2)).edges[1]:.3g}"[:4] in line for line in lines)
    session = Session(model, tokenizer, Settings(k=2, max_new_tokens=4))
    session.answer("ab")
    session.answer("/compare 1 2")
    assert capsys.readouterr().out


def test_a_block_alone_says_so_when_others_are_asked_for(frozen_runs: list[Path]) -> None:
    model, tokenizer = recurrent_db.load(frozen_runs[0], "cpu")
    recurrent_db.generate(model, tokenizer, "ab", k=1, max_new_tokens=2)  # the first is a model at sigma_max
    model, tokenizer = recurrent_db.load(frozen_runs[1], "cpu")
    with pytest.raises(UserError, match="block 2 of 2 alone"):
        recurrent_db.generate(model, tokenizer, "ab", k=2, max_new_tokens=2)
    for run, k in ((frozen_runs[1], 1), (frozen_runs[0], 2)):
        with pytest.raises(UserError, match=r"block . of 2 alone"):
            repl_main(ReplArgs(run, k=k, device="cpu"))


def test_a_model_in_blocks_is_not_exported(frozen_runs: list[Path], tmp_path: Path) -> None:
    join(frozen_runs, tmp_path / "joined")
    with pytest.raises(UserError, match="model in blocks, which the exported format has no code for"):
        export(tmp_path / "joined", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_block_is_stopped_continued_and_replaced(data: Path, frozen_runs: list[Path], tmp_path: Path) -> None:
    frozen = ["--blocks.only", 2, "--blocks.shared", "frozen", "--seed", 0, "--optim.lr", 1e-3]
    assert train(data, tmp_path / "whole", 2, *frozen, "--run.checkpoint_every", 3) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "two")
    shutil.rmtree(find_checkpoint(tmp_path / "two"))  # as if it had been killed after the third step
    assert find_checkpoint(tmp_path / "two").name == "step-00000003"
    assert train(data, tmp_path / "two", 2, *frozen, "--run.checkpoint_every", 3, resume="newest") == 0
    resumed, whole = weights(tmp_path / "two"), weights(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    join(frozen_runs, tmp_path / "joined")
    join([tmp_path / "joined", tmp_path / "whole"], tmp_path / "again")
    again, before = weights(tmp_path / "again"), weights(tmp_path / "joined")
    for name, value in again.items():
        assert torch.equal(value, whole[name] if name.startswith("blocks.2.") else before[name])
    account = json.loads((tmp_path / "again/blocks.json").read_text())["blocks"]
    assert [account[number]["run"] for number in "12"] == [str(frozen_runs[0]), str(tmp_path / "whole")]
    join([frozen_runs[0], tmp_path / "two"], tmp_path / "again", overwrite=True)
    assert torch.equal(weights(tmp_path / "again")["blocks.2.final_norm.weight"], resumed["blocks.2.final_norm.weight"])


def test_the_owner_of_the_embedding_is_trained_first(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "one", 2, "--blocks.only", 1) == 0
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, "--init.from", tmp_path / "one") == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert torch.equal(one["embedding.weight"], two["embedding.weight"])
    start = build_model(
        load_config(None, options(data, 2, "--model.vocab_size", len(one["embedding.weight"]))).model, 0
    )
    assert not torch.equal(one["embedding.weight"], start.embedding.weight)
    # The memory of a block: nothing of the other, and no moments for a table that is not trained.
    assert not any(name.startswith("blocks.1.") for name in two)
    moments = Checkpoint(find_checkpoint(tmp_path / "two")).optimizer()
    assert not any("embedding.weight" in name.split("/")[1].split(".noise_")[0] and name.endswith("/embedding.weight")
                   for name in moments)  # fmt: skip
    account = join([tmp_path / "two", tmp_path / "one"], tmp_path / "joined")["blocks"]
    assert (account["1"]["bytes_read_before_training"], account["1"]["trains_shared"]) == (0, True)
    assert account["2"]["bytes_read_before_training"] == one["embedding.weight"].numel() * 4
    # An owner that was trained anew no longer fits.
    assert train(data, tmp_path / "anew", 2, "--blocks.only", 1, "--seed", 1) == 0
    with pytest.raises(UserError, match="shared embedding differs"):
        join([tmp_path / "two", tmp_path / "anew"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(UserError, match="block 1 owns: give that block"):
        train(data, tmp_path / "lone", 2, "--blocks.only", 2)


def test_a_plain_model_becomes_blocks(data: Path, tmp_path: Path) -> None:
    plain = ["--model.n_blocks", 0, "--objective.name", "next_token", "--objective.token.grid", "edges"]
    assert train(data, tmp_path / "plain", 2, *plain) == 0
    before = weights(tmp_path / "plain")
    assert train(data, tmp_path / "two", 2, "--blocks.only", 2, "--init.from", tmp_path / "plain", "--blocks.shared",
                 "frozen", "--optim.lr", "1e-12") == 0  # fmt: skip
    after = weights(tmp_path / "two")
    for ours, theirs in (("embedding.weight", "embedding.weight"), ("blocks.2.final_norm.weight", "final_norm.weight"),
                         ("blocks.2.core.blocks.1.attn.qkv.weight", "core.blocks.3.attn.qkv.weight")):  # fmt: skip
        torch.testing.assert_close(after[ours], before[theirs], rtol=0, atol=1e-8)


def test_the_report_shows_blocks(frozen_runs: list[Path], tmp_path: Path) -> None:
    join(frozen_runs, tmp_path / "joined")
    write_report([tmp_path / "joined", *frozen_runs], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('id="blocks"') : page.index('id="machine"')]
    assert section.count("block 1") == section.count("block 2") == 2  # of the joined run, and of its own
    losses = read_runs([tmp_path / "joined"])[0]
    account = json.loads((tmp_path / "joined/blocks.json").read_text())["blocks"]
    assert len(losses.loss_by_sigma) == sum(len(block["loss_by_sigma"]) for block in account.values()) == 9
    assert f"{account['1']['loss']:.3f}" in section
    assert "none" in section


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
    with pytest.raises(UserError, match="one run or more"):
        cli.run(["blocks", "join", str(one)])


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark

SMALL = (
    "model.d_model=32 model.n_heads=2 model.d_mlp=48 model.d_condition=16 model.max_seq_len=32 data.sequence_length=32"
    " data.batch_size=4"
)


def test_a_blocks_memory_is_that_of_its_layers(
    script_here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    result = script_here("benchmarks/blocks.py", "--memory", "--options", SMALL, "--results", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "blocks-memory.json").read_text())["rows"]}
    assert rows["B = 1, block 1"]["ratio"] == 1
    for number in (1, 2):
        assert rows[f"B = 4, block {number}"]["rest_ratio"] <= 0.33
        assert rows[f"B = 4, block {number}"]["rest_ratio"] < rows[f"B = 2, block {number}"]["rest_ratio"] <= 0.6
    assert rows["B = 2, block 1"]["tables_bytes"] == 4 * rows["B = 2, block 2"]["tables_bytes"] == 4 * 1024 * 32 * 4


@pytest.mark.long
def test_the_comparison_runs_and_goes_on(
    script: Callable[..., subprocess.CompletedProcess[str]], data: Path, tmp_path: Path
) -> None:
    places = ["--work", tmp_path / "work", "--results", tmp_path / "results", "--data", data, "--device", "cpu"]
    sizes = ["--seeds", 0, "--budget-flops", 2e8, "--score-tokens", 512, "--draws", 2]
    words = ["benchmarks/blocks.py", *places, *sizes, "--options", SMALL + " data.verify=False"]
    first = script(*words, "--arms", "next_token,blocks-4")
    assert first.returncode == 0, first.stderr
    whole = script(*words, "--arms", "next_token,blocks-4,blocks-4-swap,masked-3")
    assert whole.returncode == 0, whole.stderr
    assert "start blocks-4-seed0" not in whole.stderr  # it is done
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results/blocks").glob("*.json")}
    assert set(results) == {f"{arm}-seed0" for arm in ("next_token", "blocks-4", "blocks-4-swap", "masked-3")}
    swapped, before = results["blocks-4-swap-seed0"], results["blocks-4-seed0"]
    assert swapped["nll_by_k"]["1"] == before["nll_by_k"]["1"]
    assert swapped["nll_by_k"]["4"] != before["nll_by_k"]["4"]
    assert len(before["blocks"]) == 4
    assert results["masked-3-seed0"]["bits_per_character"] > 0
    wrong = script(*words, "--arms", "next_token", "--draws", 3)
    assert wrong.returncode == 2
    assert "another draws" in wrong.stderr
