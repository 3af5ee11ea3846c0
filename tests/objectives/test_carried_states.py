"""States that are carried between steps: what a step computes, what it keeps, and what a checkpoint has of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import batch, micro_config, micro_model
from torch import Tensor, nn

from recurrent_db.config import Config
from recurrent_db.data import Batch, Slots
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import build_objective, load_objective_state
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

CARRIED = ["--objective.name", "one_step", "--objective.one_step.state", "carried"]
FROM_THE_START = [*CARRIED, "--objective.one_step.next_token_share", "0"]
START, VISITS = 5, 3
"""First step of the slots in these tests, and the visits of the default prior_iterations."""


def batch_at(step: int, size: int = 4) -> Batch:
    """The batch of a step, whose tokens are a function of the positions that the slots hold."""
    positions = Slots(VISITS, START).positions(step, np.arange(size), size)
    rows = [torch.randint(61, (17,), generator=torch.Generator().manual_seed(p)) for p in positions.tolist()]
    ids = torch.stack(rows)
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]), torch.from_numpy(positions))


def test_a_run_is_that_of_a_loop_by_hand() -> None:
    """Losses, gradients and metrics in float64 while the weights change, against a loop that keeps a list of states."""
    model, objective = micro_model(micro_config(*FROM_THE_START))
    held: dict[int, tuple[int, int, Tensor]] = {}
    for step in range(START, START + 8):
        data = batch_at(step)
        found, metrics = objective(model, data, Rng(0, step), 0.5)
        found.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)

        e_BTD = model.encode(data.tokens_BT)
        starts, visits = [], []
        for slot, position in enumerate(data.sample_index_B.tolist()):
            before, visit, state_TD = held.get(slot, (-1, 0, torch.zeros(16, 32)))
            goes_on = before == position
            starts.append(state_TD if goes_on else torch.zeros(16, 32, dtype=torch.float64))
            visits.append(visit + 1 if goes_on else 1)
        state_BTD = model.iterate(torch.stack(starts), e_BTD)
        losses_TB = nn.functional.cross_entropy(
            model.logits(model.decode(state_BTD)).mT, data.targets_BT, reduction="none"
        )
        losses_TB.mean().backward()
        assert found.item() == pytest.approx(losses_TB.mean().item(), rel=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
        for slot, visit in enumerate(visits):
            held[slot] = int(data.sample_index_B[slot]), visit, state_BTD[slot].detach()

        for visit in range(1, VISITS + 1):
            at = torch.tensor([v == visit for v in visits])
            loss, weight = metrics[f"loss_visit_{visit}"].tolist()
            assert weight == at.sum() and loss == pytest.approx(losses_TB.mean(1)[at].sum().item(), rel=1e-5)
            rms, _ = metrics[f"state_rms_visit_{visit}"].tolist()
            each_B = state_BTD.detach().square().mean(-1).sqrt().mean(-1)
            assert rms == pytest.approx(each_B[at].sum().item(), rel=1e-5)
        if step >= START + VISITS - 1:
            assert set(visits) == {1, 2, 3}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad  # type: ignore[operator]
        model.zero_grad(set_to_none=True)


def test_in_the_iteration_phase_every_step_is_one_pass() -> None:
    config = micro_config(*CARRIED, "--objective.one_step.prior_iterations", 3)
    objective = build_objective(config)
    assert {objective.passes(Rng(0, step), 0.95) for step in range(50)} == {Passes(core_grad=1)}
    assert [objective.visits(progress) for progress in (0.0, 0.899, 0.9, 1.0)] == [1, 1, 4, 4]
    assert objective.default_k == 4
    assert build_objective(micro_config("--objective.name", "one_step")).visits(1.0) == 1
    model, objective = micro_model(config)
    metrics = objective(model, batch(), Rng(0, 0), 0.5)[1]  # the next-token phase
    assert "loss_visit_1" not in metrics and not objective.slot_tensors()
    assert objective.passes_of({"depth": objective(model, batch(), Rng(0, 0), 1.0)[1]["depth"]}) == Passes(core_grad=1)


def test_a_sample_with_another_seed_or_length_starts_from_zero() -> None:
    model, objective = micro_model(micro_config(*FROM_THE_START))

    def loss(data: Batch, seed: int, step: int) -> float:
        return objective(model, data, Rng(seed, step), 0.5)[0].item()

    data = batch()
    first, second = loss(data, 0, 0), loss(data, 0, 1)
    assert first != second
    assert loss(data, 1, 2) == first  # the guard went back: the same positions, but other samples
    assert loss(data, 1, 3) == second
    short = replace(data, tokens_BT=data.tokens_BT[:, :8], targets_BT=data.targets_BT[:, :8],
                    doc_ids_BT=data.doc_ids_BT[:, :8])  # fmt: skip
    assert loss(short, 1, 4) == micro_model(micro_config(*FROM_THE_START))[1](model, short, Rng(0, 0), 0.5)[0].item()


def test_what_is_not_a_step_or_not_finite_leaves_no_state() -> None:
    model, objective = micro_model(micro_config(*FROM_THE_START))
    objective(model, batch(), Rng(0, EVALUATION_STEP), 0.5)
    assert objective.slot_tensors() == {}
    broken = batch()
    broken.tokens_BT[1] = 60  # no other sequence has it
    broken.tokens_BT[[0, 2, 3]] %= 60
    with torch.no_grad():
        model.embedding.weight[60] = torch.nan
    objective(model, broken, Rng(0, 0), 0.5)
    kept = objective.slot_tensors()
    assert not kept["state.1"].any() and all(kept[f"state.{slot}"].any() for slot in (0, 2, 3))
    assert all(torch.isfinite(kept[name]).all() for name in kept)


def test_states_come_back_from_a_checkpoint_to_the_bit() -> None:
    model, objective = micro_model(micro_config(*FROM_THE_START))
    for step in range(2):
        objective(model, batch(), Rng(7, step), 0.5)
    other = micro_model(micro_config(*FROM_THE_START))[1]
    other.load_slot_tensors({name: tensor.clone() for name, tensor in objective.slot_tensors().items()})
    ours, theirs = (one(model, batch(), Rng(7, 2), 0.5) for one in (objective, other))
    assert ours[0] == theirs[0] and ours[1]["loss_visit_3"][1] == theirs[1]["loss_visit_3"][1] == 4
    other.load_slot_tensors({})
    assert other.slot_tensors() == {}


HELD, STATE = torch.tensor([0, 1, 1]), torch.zeros(16, 32)


@pytest.mark.parametrize("tensors", [
    {"held.0": HELD}, {"state.0": STATE}, {"held.0": HELD, "state.1": STATE}, {"held.x": HELD, "state.x": STATE},
    {"held.0": HELD.float(), "state.0": STATE}, {"held.0": HELD[:2], "state.0": STATE}, {"other.0": STATE},
    {"held.0": HELD, "state.0": STATE[0]}, {"held.0": HELD, "state.0": STATE.long()},
])  # fmt: skip
@pytest.mark.parametrize("how", ["carried", "recomputed"])
def test_states_that_do_not_fit(tensors: dict[str, Tensor], how: str) -> None:
    objective = build_objective(micro_config("--objective.name", "one_step", "--objective.one_step.state", how))
    with pytest.raises(UserError, match="run: the saved state of the objective does not fit OneStep") as error:
        load_objective_state(objective, {"core_runs": True}, "run", tensors)
    assert "\n" not in str(error.value)


def test_mistakes() -> None:
    def config(*words: object) -> Config:
        return micro_config(*CARRIED, *words)

    with pytest.raises(
        UserError, match=r"data\.batch_size = 4 must be above objective\.one_step\.prior_iterations = 4"
    ):
        config("--objective.one_step.prior_iterations", 4)
    assert config("--objective.one_step.prior_iterations", 3)
    with pytest.raises(UserError, match=r"state takes one of recomputed, carried, got 'kept'"):
        micro_config("--objective.one_step.state", "kept")
