"""The section on blocks that are trained separately: the cost and the loss of each."""

from __future__ import annotations

from typing import Any

from recurrent_db.objectives.block_choice import trains_shared
from recurrent_db.report.comparison import Comparison
from recurrent_db.report.cost import memory_by_holder
from recurrent_db.report.figure import scientific
from recurrent_db.report.html import DASH, count, fixed, memory, table, text
from recurrent_db.report.runs import Run, number
from recurrent_db.store.metrics import counted_where

FLOPS = ("flops", "flops_forward", "flops_backward")
"""FLOP columns of metrics.jsonl in the table."""


def accounts(run: Run) -> dict[str, dict[str, Any]]:
    """Cost of each block of a run, by block number: from blocks.json for a joined run, else from the run's own metrics."""
    if run.blocks:
        return run.blocks
    only = run.config.blocks.only
    if not run.config.model.n_blocks or not run.rows:
        return {}
    if not only:  # one process trains all blocks; each step trains one of them
        return {
            str(block): {
                "layers": layers, "trains_shared": trains_shared(run.config, block),
                "loss": run.last(f"eval/loss_block_{block}"),
                **counted_where(run.rows, f"loss_block_{block}", ("tokens", *FLOPS)),
            }
            for block, layers in enumerate(run.config.model.block_layers, 1)
        }  # fmt: skip
    split = memory_by_holder(run) or {}
    return {
        str(only): {
            "alone": True, "layers": run.config.model.block_layers[only - 1], "tokens": run.last("tokens"),
            **{column: run.last(column) for column in FLOPS}, "trains_shared": trains_shared(run.config, only),
            "memory": {f"{holder}_bytes": value for holder, value in split.items()},
            "peak_memory_bytes": run.most("peak_memory_bytes"), "loss": run.last(f"eval/loss_block_{only}"),
        }
    }  # fmt: skip


def blocks(comparison: Comparison) -> str:
    """One row for each block of each run; empty if no run has blocks."""
    rows: list[list[str]] = []
    for run in comparison.runs:
        found = accounts(run)
        if found:
            rows.append([comparison.label(run)])
        for name, block in found.items():
            split = block.get("memory") or {}
            held = sum(v for v in (number(value) for value in split.values()) if v is not None)
            flops = [number(block.get(key)) for key in FLOPS]
            read = number(block.get("bytes_read_before_training"))
            others = "trained with others"
            if block.get("alone"):
                others = DASH if read is None else memory(read) if read else "nothing"
            rows.append(
                [
                    f"block {text(name)}" + ("<small>and the embedding</small>" if block.get("trains_shared") else ""),
                    text(block.get("layers", DASH)),
                    count(number(block.get("tokens"))),
                    *(scientific(value) if value is not None else DASH for value in flops),
                    memory(held) if held else DASH,
                    memory(number(block.get("peak_memory_bytes"))),
                    others,
                    fixed(number(block.get("loss"))),
                ]
            )
    if not rows:
        return ""  # no run has blocks, so the section is left out
    units = {run.loss_unit for run in comparison.runs if accounts(run)}
    head = ["Block", "Layers", "Tokens", "FLOPs", "forward", "backward", "Memory<br>held", "Peak of<br>the process",
            "Read from<br>others", f"Loss in its range<br>({units.pop() if len(units) == 1 else 'own units'})"]  # fmt: skip
    caption = (
        "Read from others: size of the embedding tables that a block reads once, before training, from the block that "
        "trains them. Blocks that are trained separately send nothing. Memory held: parameters, gradients, optimizer, "
        "average and activations of the block's process. Loss: held-out loss with the answer noised at the noise levels "
        "of the block's range. Less noise gives a lower loss, and only the first block's loss at sigma_max is a "
        "likelihood; “Loss by noise level” shows each level. For masked diffusion, the loss is the block's term of the "
        "bound on the NLL, and the terms of all blocks sum to the bound."
    )
    return table(head, rows, caption)
