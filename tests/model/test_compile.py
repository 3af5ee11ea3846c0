"""Compiled parts: the same numbers, and no graph is compiled twice."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from helpers import micro_config

from recurrent_db.data import Batch
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.rng import Rng


@pytest.mark.parametrize(("options", "half"), [(["next_token"], False), (["unrolled"], False), (["denoise"], False),
    (["denoise", "--objective.denoise.conditioning", "two-stream"], False), (["unrolled"], True),
    (["denoise"], True)],
    ids=lambda o: str(o) if isinstance(o, bool) else o[-1])  # fmt: skip
def test_compiles_once_whatever_changes(options: list[str], half: bool) -> None:
    """50 steps of new noise levels, depths, tokens and documents: each part is compiled in the first steps, no
    graph twice. The graphs run as they are (eager back end); what compiles is counted, not what a compiler makes of it."""
    config = micro_config("--objective.name", *options, "--data.sequence_length", "16")
    config.model.vocab_size = 61
    model, objective = build_model(config.model, 0), build_objective(config)
    plain = build_model(config.model, 0)
    model.compile_parts(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator, after = torch.Generator().manual_seed(0), {}
    for step in range(50):
        ids = torch.randint(61, (3, 17), generator=generator)
        docs = torch.randint(2, (3, 16), generator=generator).cumsum(1) * (step % 3 > 0)
        made = Batch(ids[:, :-1], ids[:, 1:], docs, torch.arange(3) + 3 * step)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = objective(model, made, Rng(0, step), 0.0)[0]
            if step < 2:
                exact = objective(plain, made, Rng(0, step), 0.0)[0]
                torch.testing.assert_close(loss, exact, **({"rtol": 1e-2, "atol": 0.0} if half else {}))
        loss.backward()
        if step == 29:  # half precision meets its last graph at step 25, the first whose depth is all gradient
            after = dict(torch._dynamo.utils.counters["stats"])
    assert after["unique_graphs"] <= {"next_token": 4, "unrolled": 8 if half else 6}.get(options[0], 8)
    assert dict(torch._dynamo.utils.counters["stats"]) | {"calls_captured": 0} == after | {"calls_captured": 0}
    assert not torch._dynamo.utils.counters["graph_break"]
