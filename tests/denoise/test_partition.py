"""Blocks that train alone: who has which noise, the language model in blocks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import BLOCKS, ROOT, batch, blocks_config, micro_config, micro_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db import cli
from recurrent_db.accounting.flops import cost_per_token, step_cost, total
from recurrent_db.config import load_config
from recurrent_db.denoise.noise import LogNormal, LogUniform
from recurrent_db.denoise.partition import Partition, split_layers
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import draw_log_probabilities, token_log_probabilities
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.model import build_model
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.passes import Passes
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.denoise_blocks import BlockWalk, DenoiseBlocks, noise_partition
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

LAW = LogNormal(-0.4, 1.0, 0.02, 20.0)


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
# The language model in blocks


def test_one_block_is_the_two_stream_denoiser() -> None:
    """B = 1 against the looped model's own two-stream objective with the same weights: loss and walk."""
    looped_config = micro_config(*BLOCKS)
    looped, looped_objective = micro_model(looped_config)
    config = blocks_config(n=1)
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
    """The seam: every pass of a block, in training (no overlap), in scoring and in generation, is at a level that `block_of`
    gives it."""
    config = blocks_config()
    config.blocks.gamma = 0.0
    model, objective = micro_model(config)
    assert isinstance(model, BlocksLM)
    assert isinstance(objective, DenoiseBlocks)
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
    scored = len(seen)
    assert scored > trained
    assert len(list(stream(model, [[1, 2, 3]], GenerationOptions(k=8, max_new_tokens=2)))) == 2
    assert {number for number, _ in seen[scored:]} == {1, 2, 3, 4}
    for number, sigma in seen:
        at_edge = min(abs(math.log(sigma / edge)) for edge in parts.edges) < 1e-4  # fp32 rounding cannot tell
        inside = min(max(sigma, config.objective.denoise.sigma_min), config.objective.denoise.sigma_max)
        assert at_edge or parts.block_of(inside) == number
    b_step = [number for number, _ in seen[trained:scored]]
    assert sorted(set(b_step)) == [1, 2, 3, 4]


def test_a_step_moves_its_own_block_and_the_owner_the_embedding() -> None:
    for shared, block, moves in (("owned", 1, True), ("owned", 2, False), ("frozen", 1, False)):
        config = blocks_config("--blocks.shared", shared)
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
    with pytest.raises(UserError, match=r"holds only block 2 of 3, not block 1: .*blocks join"):
        alone.block(1)
    # All of the model's parameters are counted once.
    model = build_model(config.model, None, "meta")
    counts = model.parameter_counts()
    assert counts["total"] + counts["noise_conditioning"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_no_scored_logit_looks_ahead(k: int, sampler: str) -> None:
    model, _ = micro_model(blocks_config("--objective.denoise.sampler", sampler))
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
    model, objective = micro_model(blocks_config("--objective.denoise.bridge", "state"))
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
@pytest.mark.parametrize("name", ["denoise", "masked"])
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--blocks.only", 5], "blocks.only must be 0"),
        (["--blocks.only", 2, "--blocks.shared", "all"], "blocks.shared = all"),
        (["--model.block_layers", 1, 2, 2, 2], "model.block_layers"),
        (["--model.n_core", 6], "cannot be split evenly into 4"),
        (["--model.n_prelude", 1], "neither prelude nor coda"),
        (["--objective.name", "next_token"], "cannot train a model in blocks"),
        (["--objective.denoise.conditioning", "inject"], "two-stream"),
        (["--model.n_blocks", 0, "--blocks.only", 1], "needs a model in blocks"),
        (["--objective.denoise.p_mean", 50], "has no mass"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        blocks_config(*words)
    assert "\n" not in str(caught.value)
