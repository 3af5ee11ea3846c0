"""Sequences packed into one row as a tree are what each would be alone: every objective's inference, at every position."""

from __future__ import annotations

import pytest
import torch
from helpers import micro_config, micro_model

from recurrent_db.evaluation.prefix_tree import PlacedNoise, Row, common_length, lay_out
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
    rows = [Row.of(sequences) for sequences in TRUNKS]
    assert sum(len(row.tokens) for row in rows) < sum(len(s) for sequences in TRUNKS for s in sequences)
    tokens, places, visible = lay_out(model, rows, pad=0)
    assert visible is not None
    for draw in (0, 1):
        noise = PlacedNoise(RNG, torch.tensor([7, 8, 7]), PAGE, draw, places_BT=places)
        e = model.encode(tokens, visible)
        [(_, together)] = model.recurrence.hidden(model, tokens, e, [k], noise, visible=visible)
        assert torch.isfinite(together).all()
        for number, (request, row, sequences) in enumerate(zip((7, 8, 7), rows, TRUNKS, strict=True)):
            for sequence, path in zip(sequences, row.paths, strict=True):
                alone = torch.tensor([sequence])
                noise = NoiseSource(RNG, torch.tensor([request]), PAGE, draw)
                [(_, expected)] = model.recurrence.hidden(model, alone, model.encode(alone), [k], noise)
                torch.testing.assert_close(together[number, path], expected[0], rtol=0, atol=1e-9)


def test_a_row_holds_what_is_common_once() -> None:
    row = Row.of([(5, 4), (5, 6, 7), (5, 6, 8, 9)])
    assert row.tokens == [5, 4, 6, 7, 8, 9]
    assert row.paths == [[0, 1], [0, 2, 3], [0, 2, 4, 5]]
    assert row.branches
    assert not Row.of([(5, 6), (5, 6, 7)]).branches  # one continues the other
    # A position that holds the token after it is common only where that token is.
    assert [common_length((1, 2, 3), other, True) for other in ((1, 2, 4), (1, 2, 3, 4), (1, 2), (9,))] == [1, 3, 2, 0]


def test_rows_without_branches_take_the_plain_rule() -> None:
    model = micro_model(micro_config("--objective.name", "next_token"))[0]
    tokens, places, visible = lay_out(model, [Row.of([(1, 2, 3)]), Row.of([(4, 5)])], pad=9)
    assert visible is None
    assert tokens.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert places.tolist() == [[0, 1, 2]]
