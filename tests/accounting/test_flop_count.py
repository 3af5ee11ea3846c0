"""The record of FLOPs spent."""

from __future__ import annotations

from recurrent_db.accounting.flop_count import FLOP_COLUMNS, FlopCount
from recurrent_db.accounting.flops import Cost


def test_a_step_is_added_per_token_and_its_update_once() -> None:
    count = FlopCount()
    count.add(Cost(forward=2, backward_input=3, backward_weight=1, recomputed=4, masked=1), update=7, tokens=10)
    count.add(Cost(forward=1), update=1, tokens=5)
    assert count == FlopCount(forward=25, backward=40, backward_weight=10, recomputed=40, causal=55, update=8)
    assert count.total == 65


def test_its_row_has_the_columns_of_the_metrics_and_reads_back() -> None:
    count = FlopCount(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    row = count.row()
    assert tuple(row) == FLOP_COLUMNS == (
        "flops", "flops_forward", "flops_backward", "flops_backward_weight", "flops_recomputed", "flops_causal",
        "flops_update",
    )  # fmt: skip
    assert row["flops"] == 3.0
    assert FlopCount.from_row({**row, "step": 9.0}) == count
