"""Masked diffusion: the bound against exact integration, what a guess may see, blocks, sampling, a run."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import MICRO, batch, micro_config, micro_model, synthetic_data, synthetic_tokenizer
from torch import Tensor

import recurrent_db
from recurrent_db.accounting.flops import cost_per_token
from recurrent_db.config import Config, load_config
from recurrent_db.data import Batch
from recurrent_db.data.tokenizer import train as train_tokenizer
from recurrent_db.errors import UserError
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.objectives import masked
from recurrent_db.objectives.masked import Masked, both_sides, hidden_vectors, strata, time_partition, unmask
from recurrent_db.report.page import write_report
from recurrent_db.rng import Rng
from recurrent_db.store.join_blocks import join
from recurrent_db.training import trainer

MASKED = [
    "--model.n_prelude", "0", "--model.n_core", "4", "--model.n_coda", "0", "--model.expected_depth", "1",
    "--objective.name", "masked",
]  # fmt: skip
VOCAB = 61


def masked_config(n: int = 2, *more: object) -> Config:
    return micro_config(*MASKED, "--model.n_blocks", n, *more)


def built(n: int = 2, spread: float = 0.3) -> tuple[BlocksLM, Masked]:
    model, objective = micro_model(masked_config(n), VOCAB, spread)
    assert isinstance(model, BlocksLM)
    assert isinstance(objective, Masked)
    return model, objective


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_blocks_have_equal_decrements_of_alpha(n: int) -> None:
    parts = time_partition(n)
    assert parts.edges == pytest.approx([1 - b / n for b in range(n + 1)])
    assert (parts.block_of(1.0), parts.block_of(1e-9)) == (1, n)
    for block in range(1, n + 1):
        low, high = parts.range_of(block)
        assert parts.block_of(high) == block
        assert parts.block_of((low + high) / 2) == block


def log_p(model: BlocksLM, block: int, tokens_BT: Tensor, t: float) -> Tensor:
    length = tokens_BT.shape[1]
    t_B = torch.full((len(tokens_BT),), t, dtype=torch.float64)
    return model.logits(hidden_vectors(model, block, tokens_BT, t_B, both_sides(model, length, None))).log_softmax(-1)


@pytest.mark.parametrize("n", [1, 2])
def test_the_bound_is_the_integral_over_time_and_masks(n: int) -> None:
    """Against all 2^T masks and quadrature in t: E over masks of t^|S| (1-t)^(T-|S|) (1/t) sum over S of -log p."""
    model, objective = built(n)
    length, points = 3, 48
    tokens = torch.tensor([[5, 17, 40]])
    exact = {}
    with torch.no_grad():
        for block in range(1, n + 1):
            low, high = objective.partition.range_of(block)
            total = 0.0
            for t in (low + (high - low) * (torch.arange(points) + 0.5) / points).tolist():
                for hidden in itertools.product([False, True], repeat=length):
                    hide, size = torch.tensor([hidden]), sum(hidden)
                    if not size:
                        continue
                    guess = log_p(model, block, tokens.masked_fill(hide, VOCAB - 1), t)
                    loss = -(guess.gather(-1, tokens[..., None])[..., 0] * hide).sum().item()
                    total += t ** (size - 1) * (1 - t) ** (length - size) * loss / points
            exact[block] = (high - low) * total / length
        many = Batch(tokens.expand(512, -1), tokens.expand(512, -1), torch.zeros(512, 3), torch.arange(512))
        found = objective.elbo(model, [many], synthetic_tokenizer(), seed=0, draws=16)
    for block, value in exact.items():
        assert found.by_block[block] == pytest.approx(value, rel=0.02)
    assert found.nats == pytest.approx(sum(exact.values()), rel=0.02)


def test_a_model_that_knows_nothing_pays_log_v() -> None:
    model, objective = built(4)
    with torch.no_grad():
        model.embedding.weight.zero_()
    found = objective.elbo(model, [batch(16, 32)], synthetic_tokenizer(), seed=0, draws=64)
    assert found.nats == pytest.approx(math.log(VOCAB), rel=0.02)
    assert found.bits_per_character == found.nats * found.tokens / found.characters / math.log(2)


def test_a_guess_sees_both_sides_and_nothing_hidden() -> None:
    model, objective = built(2)
    micro = batch(2, 12)
    micro.doc_ids_BT[:, 8:] = 1
    hide = torch.zeros(2, 12, dtype=torch.bool)
    hide[:, 5] = True
    t_B = torch.full((2,), 0.4, dtype=torch.float64)

    def losses(tokens: Tensor) -> Tensor:
        changed = Batch(tokens, tokens, micro.doc_ids_BT, micro.sample_index_B)
        seen = tokens.masked_fill(hide, VOCAB - 1)
        with torch.no_grad():
            assert objective._losses(model, 2, changed, t_B, hide)[1].count_nonzero() == 2
            visible = both_sides(model, 12, micro.doc_ids_BT)
            return model.logits(hidden_vectors(model, 2, seen, t_B, visible))[:, 5]

    before = losses(micro.tokens_BT)
    for position, matters in ((5, False), (2, True), (7, True), (9, False)):  # 9 is of another document
        tokens = micro.tokens_BT.clone()
        tokens[:, position] = (tokens[:, position] + 1) % (VOCAB - 1)
        assert ((losses(tokens) - before).abs().amax() > 1e-6) == matters


def test_draws_are_spread_and_keyed_by_the_sequence() -> None:
    _, objective = built(2)
    micro = batch(8, 16)
    t_B, hide = objective._draw(1, micro, Rng(0, 5), 8)
    gaps = t_B.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((7,), 0.5 / 8, dtype=torch.float64))
    assert 0.5 < t_B.min() <= t_B.max() <= 1.0
    part = Batch(*(x[4:] for x in (micro.tokens_BT, micro.targets_BT, micro.doc_ids_BT, micro.sample_index_B)))
    again_B, again = objective._draw(1, part, Rng(0, 5), 8)
    assert torch.equal(again_B, t_B[4:])
    assert torch.equal(again, hide[4:])
    assert [strata(0.9, i, 4) for i in range(4)] == pytest.approx([0.9, 0.15, 0.4, 0.65])


def test_scored_sequences_share_the_times_evenly_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out sequences are spread over the split, so their sample indices are far apart and may all be multiples."""
    model, objective = built(2)
    seen: dict[int, list[float]] = {1: [], 2: []}
    losses = objective._losses

    def watched(model: BlocksLM, block: int, micro: Batch, t_B: Tensor, hide_BT: Tensor) -> tuple[Tensor, Tensor]:
        seen[block] += t_B.tolist()
        return losses(model, block, micro, t_B, hide_BT)

    monkeypatch.setattr(objective, "_losses", watched)
    tokens = torch.arange(48).view(8, 6) % VOCAB
    batches = [
        Batch(tokens[at:end], tokens[at:end], torch.zeros(end - at, 6), torch.arange(at, end) * 1024)
        for at, end in ((0, 3), (3, 8))
    ]
    found = objective.elbo(model, batches, synthetic_tokenizer(), seed=0)
    for times in seen.values():
        gaps = torch.tensor(times, dtype=torch.float64).sort().values.diff()
        torch.testing.assert_close(gaps, torch.full((7,), 0.5 / 8, dtype=torch.float64))
    assert math.fsum(found.by_sequence) / 8 == pytest.approx(found.nats)


def test_flops_know_that_both_sides_are_seen() -> None:
    config = masked_config(2)
    config.model.vocab_size = VOCAB
    passes = Masked(config).passes(Rng(0, 0), 0.0)
    core = cost_per_token(config.model, 32, passes)["core"]
    assert core.masked == 0
    assert core.attention > 0
    assert passes.core_layers == 2


def test_unmasking_fills_what_is_hidden_and_keeps_the_rest() -> None:
    model, _ = built(2)
    tokens = torch.full((2, 10), VOCAB - 1)
    tokens[:, 3], tokens[:, 7] = 11, 22
    out = unmask(model, tokens, 8, seed=1)
    assert (out != VOCAB - 1).all()
    assert (out[:, 3] == 11).all()
    assert (out[:, 7] == 22).all()
    assert torch.equal(out, unmask(model, tokens, 8, seed=1))
    assert not torch.equal(out, unmask(model, tokens, 8, seed=2))


def test_each_time_is_guessed_by_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built(2)
    asked: list[tuple[int, float]] = []

    def certain(model: BlocksLM, block: int, tokens_BT: Tensor, t_B: Tensor, visible: object) -> Tensor:
        asked.append((block, t_B[0].item()))
        return 1000 * model.embedding.weight[13].expand(*tokens_BT.shape, -1)

    monkeypatch.setattr(masked, "hidden_vectors", certain)
    assert (unmask(model, torch.full((2, 10), VOCAB - 1), 4) == 13).all()
    assert asked == [(1, 1.0), (1, 0.75), (2, 0.5), (2, 0.25)]
    for n, each in ((3, 1), (3, 2), (4, 3)):  # a third is no binary fraction
        monkeypatch.setattr(model.config, "n_blocks", n)  # the guess asks for no weights
        asked.clear()
        unmask(model, torch.full((2, 10), VOCAB - 1), n * each)
        assert [block for block, _ in asked] == [block for block in range(1, n + 1) for _ in range(each)]
        assert [t for _, t in asked] == pytest.approx([1 - i / (n * each) for i in range(n * each)])


def test_a_run_in_blocks_is_scored_joined_and_refuses_what_it_cannot_do(
    tmp_path: Path, script_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    data = synthetic_data(tmp_path / "data")
    common = [*MICRO, *MASKED, "--model.n_blocks", "2", "--data.path", str(data), "--budget.steps", "8"]
    runs = [tmp_path / "one", tmp_path / "two"]
    first = [*common, "--blocks.only", "1", "--run.dir", str(runs[0])]
    second = [*common, "--blocks.only", "2", "--run.dir", str(runs[1]), "--init.from", str(runs[0])]
    for words in (first, second):
        assert trainer.train(load_config(None, words)) == 0
    rows = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    assert "eval/loss_block_1" in rows[0]
    assert "eval/elbo" not in rows[0]
    join(runs, tmp_path / "joined")
    result = script_here("eval/masked.py", tmp_path / "joined", "--data", data, "--tokens", 512, "--steps", 4, "--draws", 2,
                         "--json", tmp_path / "out.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    scored = json.loads((tmp_path / "out.json").read_text())
    assert scored["nats"] == pytest.approx(sum(scored["by_block"].values()))
    assert len(scored["samples"]) == 2
    alone = script_here(
        "eval/masked.py", runs[0], "--data", data, "--tokens", 512, "--draws", 2, "--json", tmp_path / "1.json"
    )
    assert "term of block 1, not a bound by itself" in alone.stdout
    assert set(json.loads((tmp_path / "1.json").read_text())).isdisjoint({"bits_per_character", "nats"})
    model, tokenizer = recurrent_db.load(tmp_path / "joined", "cpu")
    with pytest.raises(UserError, match="left to right"):
        recurrent_db.generate(model, tokenizer, "ab")
    # In one process, and end-to-end.
    for n in (1, 2):
        words = [
            *common,
            "--model.n_blocks",
            str(n),
            "--run.dir",
            str(tmp_path / f"whole-{n}"),
            "--blocks.shared",
            "all",
        ]
        assert trainer.train(load_config(None, words)) == 0
        last = json.loads((tmp_path / f"whole-{n}" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["eval/bits_per_character"] > 0
        assert last["eval/elbo"] < 1.2 * math.log(300)
    write_report([tmp_path / "whole-2"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"≤ {last['eval/elbo']:.3f}<small>" in page
    assert f"≤ {last['eval/bits_per_character']:.3f}<small>per character" in page


def test_a_tokenizer_of_characters(texts: list[str]) -> None:
    tokenizer = recurrent_db.data.tokenizer.Tokenizer.from_bytes(train_tokenizer(texts[:20], 600, "char"))
    text = "def f(x):\n    return x\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size < 600
