"""Sequences in one row as a prefix tree compute what each would compute alone: every objective, at every position."""

from __future__ import annotations

import pytest
import torch
from helpers import micro_config, micro_model

from recurrent_db.evaluation.prefix_tree import PrefixTree, TreeNoise, batch_trees, shared_prefix_length
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

PAGE = 8  # pages of noise shorter than the sequences, so that these cross their borders
RNG = Rng(0, EVALUATION_STEP)


def denoise(**options: str) -> list[str]:
    return [
        "denoise",
        *(word for name, value in options.items() for word in (f"--objective.denoise.{name}", value)),
    ]


KINDS = [
    ["next_token"],
    ["unrolled", "--model.injection", "diagonal"],
    ["denoise_paper"],
    *(denoise(bridge=bridge) for bridge in ("soft", "hard", "sample", "state")),
    *(denoise(sampler=sampler) for sampler in ("heun", "ancestral")),
    denoise(conditioning="two-stream", sampler="heun", bridge="sample"),
]

TRUNKS = [
    [
        (1, 2, 3, 4),
        (1, 2, 3, 4, 5),
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11),
        (1, 2, 3, 9),
        (1, 2, 8, 9),
        (1, 7),
        (5, 7),
        (5, 8),
    ],
    [(3, 1, 4), (3, 1, 4, 1, 5, 9, 2, 6)],
    [(2, 7, 1, 8)],
]
"""Sorted sequences of three rows."""


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(o for o in options if not o.startswith("--")))
@torch.no_grad()
def test_every_position_is_as_it_would_be_alone(options: list[str]) -> None:
    config = micro_config("--objective.name", *options, "--model.n_core", "2", "--model.n_coda", "2")
    model = micro_model(config, spread=0.1)[0]
    k = 3
    trees = [PrefixTree.of(sequences) for sequences in TRUNKS]
    assert sum(len(tree.tokens) for tree in trees) < sum(len(s) for sequences in TRUNKS for s in sequences)
    tokens, places, visible = batch_trees(model, trees, pad=0)
    assert visible is not None
    for draw in (0, 1):
        noise = TreeNoise(RNG, torch.tensor([7, 8, 7]), PAGE, draw, places_BT=places)
        e = model.encode(tokens, visible)
        [(_, together)] = model.recurrence.hidden(model, tokens, e, [k], noise, visible=visible)
        assert torch.isfinite(together).all()
        for number, (request, tree, sequences) in enumerate(zip((7, 8, 7), trees, TRUNKS, strict=True)):
            for sequence, path in zip(sequences, tree.paths, strict=True):
                alone = torch.tensor([sequence])
                noise = NoiseSource(RNG, torch.tensor([request]), PAGE, draw)
                [(_, expected)] = model.recurrence.hidden(model, alone, model.encode(alone), [k], noise)
                torch.testing.assert_close(together[number, path], expected[0], rtol=0, atol=1e-9)


def test_a_row_holds_what_is_common_once() -> None:
    tree = PrefixTree.of([(5, 4), (5, 6, 7), (5, 6, 8, 9)])
    assert tree.tokens == [5, 4, 6, 7, 8, 9]
    assert tree.paths == [[0, 1], [0, 2, 3], [0, 2, 4, 5]]
    assert tree.has_branches
    assert not PrefixTree.of([(5, 6), (5, 6, 7)]).has_branches  # one continues the other
    assert [shared_prefix_length((1, 2, 3), other) for other in ((1, 2, 4), (1, 2, 3, 4), (1, 2), (9,))] == [2, 3, 2, 0]


def test_rows_without_branches_take_the_plain_rule() -> None:
    model = micro_model(micro_config("--objective.name", "next_token"))[0]
    tokens, places, visible = batch_trees(model, [PrefixTree.of([(1, 2, 3)]), PrefixTree.of([(4, 5)])], pad=9)
    assert visible is None
    assert tokens.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert places.tolist() == [[0, 1, 2]]
