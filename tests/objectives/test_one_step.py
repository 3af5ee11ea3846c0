"""The recipe's objective: which iteration a step trains, what its gradient is, what it costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import batch, micro_config, micro_model
from torch import nn

from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import drawn_passes
from recurrent_db.objectives.one_step import OneStep
from recurrent_db.rng import Rng

pytestmark = pytest.mark.fast

SHALLOW, FLAT = Passes(core_grad=0, injections_grad=1), Passes(core_grad=1)
DEEP = (
    "--objective.name",
    "one_step",
    "--objective.one_step.next_token_share",
    "0",
    "--objective.one_step.first_probability",
    "0",
)


def test_the_law_of_the_trained_iteration() -> None:
    objective = OneStep(micro_config("--objective.name", "one_step", "--objective.one_step.next_token_share", "0.5",
                                     "--objective.one_step.first_probability", "0.25",
                                     "--objective.one_step.prior_iterations", "3",
                                     "--budget.tokens", "1000"))  # fmt: skip
    for progress, passes in ((0.0, SHALLOW), (0.399, SHALLOW), (0.401, FLAT), (0.499, FLAT)):
        assert {objective.passes(Rng(0, step), progress) for step in range(200)} == {passes}
    counts = Counter(objective.passes(Rng(0, step), 0.5).core_no_grad for step in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    for before in counts:  # a quarter each: 1,000 with a standard deviation of 27
        assert abs(counts[before] - 1000) < 5 * 27, counts


@pytest.mark.parametrize("depth", [1, 3])
def test_the_gradient_is_that_of_the_last_iteration_alone(depth: int) -> None:
    """Against autograd through a copy whose earlier iterations use other parameters; with them shared it differs."""
    config = micro_config(*DEEP, "--objective.one_step.prior_iterations", depth)
    model, objective = micro_model(config)
    rng = next(Rng(0, step) for step in range(99) if objective.passes(Rng(0, step), 1.0).core_no_grad == depth)
    data = batch()
    loss, metrics = objective(model, data, rng, 1.0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def reference(stop: bool) -> dict[str, torch.Tensor]:
        e_BTD = model.encode(data.tokens_BT)
        state_BTD = model.iterate(torch.zeros_like(e_BTD), e_BTD, depth)
        state_BTD = model.iterate(state_BTD.detach() if stop else state_BTD, e_BTD)
        logits_BTV = model.logits(model.decode(state_BTD))
        expected = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), data.targets_BT.flatten())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return gradients

    stopped, through = reference(True), reference(False)
    assert found.keys() == stopped.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, stopped[name], rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(found[name], through[name], rtol=1e-3) for name in found)
    assert metrics["depth"] == depth + 1


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
def test_without_an_iteration_the_coda_reads_what_the_blocks_would_be_given(injection: str) -> None:
    config = micro_config("--objective.name", "one_step", "--model.injection", injection, "--budget.steps", "10")
    model, objective = micro_model(config)
    data = batch()
    loss, metrics = objective(model, data, Rng(0, 0), 0.0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    e_BTD = model.encode(data.tokens_BT)
    state_BTD = model.core.injection(torch.zeros_like(e_BTD), e_BTD)
    logits_BTV = model.logits(model.decode(state_BTD))
    expected = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), data.targets_BT.flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["depth"] == 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # everything has a gradient in a step, for those who wait for all of them
            assert name.startswith("core.")
            assert not found[name].any()
        else:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    blocks = [name for name, p in model.named_parameters() if name.startswith("core.blocks.")]
    assert blocks and all(dict(model.named_parameters())[name].grad is None for name in blocks)


def test_the_core_starts_as_copies_of_what_is_around_it() -> None:
    config = micro_config("--objective.name", "one_step", "--objective.one_step.next_token_share", "0.25",
                          "--model.n_core", "4", "--budget.steps", "10")  # fmt: skip
    model, objective = micro_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert objective.grow(model, 0.249) == []
    assert {id(p) for p in objective.grow(model, 0.25)} == {id(p) for p in model.core.blocks.parameters()}
    assert objective.grow(model, 0.3) == []
    after = model.state_dict()
    for name, value in after.items():
        if not name.startswith("core.blocks."):
            assert torch.equal(value, before[name]), name
    (prelude,), (coda,) = model.prelude, model.coda
    for block, source in zip(model.core.blocks, (prelude, prelude, coda, coda), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), source.parameters(), strict=True))

    # What has grown stays: a larger budget does not take the blocks away, nor does one who continues copy them again.
    assert objective.passes(Rng(0, 0), 0.1) == FLAT
    other = OneStep(config)
    assert other.passes(Rng(0, 0), 0.1) == SHALLOW
    other.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    assert other.passes(Rng(0, 0), 0.1) == FLAT and not other.grow(model, 0.9)
    for bad in ({"core_runs": 1}, {"more": True}, {}):
        with pytest.raises(ValueError, match="core_runs must be true or false"):
            other.load_state_dict(bad)


def test_without_blocks_around_it_the_core_runs_at_once() -> None:
    config = micro_config(
        "--objective.name", "one_step", "--model.n_prelude", "0", "--model.n_coda", "0", "--budget.steps", "10"
    )
    model, objective = micro_model(config)
    assert objective.passes(Rng(0, 0), 0.0) == FLAT and objective.grow(model, 0.0) == []


def test_of_a_budget_in_flops_cheap_steps_are_the_more() -> None:
    """A run of that budget, step by step, against the shares that its plan has; in steps they are those of the budget."""
    config = micro_config(
        "--objective.name", "one_step", "--objective.one_step.skip_core", "100", "--budget.flops", "1e9"
    )
    config.model.vocab_size = 61
    spent, steps, objective = 0.0, Counter[Passes](), OneStep(config)
    while spent < 1e9:
        passes = objective.passes(Rng(0, steps.total()), spent / 1e9)
        steps[passes] += 1
        spent += step_cost(config, passes).total * config.data.batch_size * config.data.sequence_length
    planned = drawn_passes(config, 4000)
    assert planned.keys() == steps.keys()
    for passes, share in planned.items():
        assert share == pytest.approx(steps[passes] / steps.total(), abs=0.02)
    config.budget.flops, config.budget.steps = None, 1000
    assert drawn_passes(config, 1000)[SHALLOW] == pytest.approx(0.4)
    assert planned[SHALLOW] > 0.42
    assert sum(planned.values()) == pytest.approx(1)


def test_blocks_that_a_run_starts_with_are_not_overwritten() -> None:
    config = micro_config("--objective.name", "one_step", "--init.from", "somewhere", "--budget.steps", "10")
    model, objective = micro_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert objective.passes(Rng(0, 0), 0.0) == FLAT
    assert not objective.grow(model, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("budget", "share"), [
    (["--budget.tokens", "2e5"], lambda weights, per_token: 3 * weights / 2e5),
    (["--budget.flops", "3e10"], lambda weights, per_token: 3 * weights * per_token / 3e10),
    (["--budget.steps", "1500"], lambda weights, per_token: 3 * weights / (8 * 16) / 1500),
    (["--budget.steps", "1500", "--budget.tokens", "1e9"], lambda weights, per_token: 3 * weights / (8 * 16) / 1500),
    (["--budget.tokens", "1000"], lambda weights, per_token: 0.4),
    (["--budget.tokens", "1000", "--objective.one_step.next_token_share", "0.3"], lambda weights, per_token: 0.3),
    (["--budget.seconds", "10"], lambda weights, per_token: 0.0),
    (["--budget.tokens", "1000", "--objective.one_step.skip_core", "0"], lambda weights, per_token: 0.0),
])  # fmt: skip
def test_how_long_the_core_stays_out(budget: list[str], share: Callable[[int, float], float]) -> None:
    """Three tokens for each weight of the rest's matrices."""
    words = ["--objective.name", "one_step", "--objective.one_step.skip_core", "3", "--data.batch_size", "8"]
    config = micro_config(*words, "--data.sequence_length", "16", *budget)
    config.model.vocab_size = 61
    model = config.model
    block, scores = 4 * model.d_model**2 + 3 * model.d_model * model.d_mlp, 4 * model.d_model * 16
    assert (model.n_prelude, model.n_coda) == (1, 1)
    weights = 2 * block + 2 * model.d_model**2 + 61 * model.d_model  # adapter and head
    expected = share(weights, 6 * weights + 3 * 2 * scores)
    assert OneStep(config).skipped_core.share == pytest.approx(expected) and (expected == 0 or 0.15 <= expected <= 0.4)


def test_a_long_run_has_its_core_from_the_start_and_is_told_so() -> None:
    model = micro_model(micro_config("--objective.name", "one_step"))[0]

    def run(tokens: float, *words: str) -> OneStep:
        config = micro_config("--objective.name", "one_step", "--budget.tokens", str(int(tokens)), *words)
        config.model.vocab_size = 61
        return OneStep(config)

    weights = run(1e15).skipped_core.asked * 1e15
    shorter, longer = run(weights / 0.151), run(weights / 0.149)
    assert shorter.skipped_core.share == pytest.approx(0.151, rel=1e-3) and not shorter.core_trained
    assert "skip-core phase until 15.1% of the budget" in shorter.describe(model)[0]
    assert longer.skipped_core.share == 0 and longer.core_trained
    assert longer.passes(Rng(0, 0), 0.0) == FLAT and longer.grow(model, 1.0) == []
    assert "from the first step: the skip-core phase would take 14.9% of the budget" in longer.describe(model)[0]
    assert run(1000, "--objective.one_step.skip_core", "0").describe(model) == []
    # A short run with a flat part that is shorter than any first phase: as long as that.
    short = run(1000, "--objective.one_step.next_token_share", "0.1")
    assert short.skipped_core.share == 0.1 and not short.core_trained

    # Of a run that goes on it says what it does now.
    longer.load_state_dict({"core_runs": True})
    assert longer.describe(model) == []
    longer.load_state_dict({"core_runs": False})
    assert longer.describe(model)[0].startswith("the core starts now, with copies of the layers around it: ")
    assert longer.grow(model, 0.05) and longer.describe(model) == []


def test_noise_replaces_its_share_of_the_context_and_nothing_of_the_answers() -> None:
    config = micro_config(*DEEP, "--objective.one_step.corrupt_share", "0.1")
    config.model.vocab_size = 500
    objective, tokens_BT = OneStep(config), torch.zeros(2000, 32, dtype=torch.int64)
    noised_BT = objective.corrupted(tokens_BT, torch.arange(2000), 500, Rng(0, 0))
    changed_B = (noised_BT != 0).float().mean(-1)
    # Rates are uniform on [0, 0.2]: mean 0.1, standard deviation 0.2 / sqrt(12), beside the binomial one of 32 tokens.
    assert changed_B.mean().item() == pytest.approx(0.1, abs=5 * 0.08 / 2000**0.5)
    assert changed_B.std().item() == pytest.approx((0.2**2 / 12 + 0.1 * 0.9 / 32) ** 0.5, rel=0.1)
    values = noised_BT[noised_BT != 0]
    assert values.max() < 500 and len(values.unique()) > 450
    assert torch.equal(noised_BT[7:9], objective.corrupted(tokens_BT[7:9], torch.arange(7, 9), 500, Rng(0, 0)))

    model, objective = micro_model(micro_config(*DEEP, "--objective.one_step.corrupt_share", "0.5"))  # type: ignore[assignment]
    quiet, _ = micro_model(micro_config(*DEEP))
    data = batch()
    targets_BT = data.targets_BT.clone()
    noisy_loss = objective(model, data, Rng(0, 0), 0.0)[0]
    assert torch.equal(data.targets_BT, targets_BT)
    assert noisy_loss != OneStep(micro_config(*DEEP))(quiet, data, Rng(0, 0), 0.0)[0]


def test_memory_does_not_depend_on_the_iterations_before(monkeypatch: pytest.MonkeyPatch) -> None:
    config = micro_config(*DEEP)
    model, objective = micro_model(config)
    data, peaks = batch(), {}
    for before in (1, 2, 16):
        monkeypatch.setattr(OneStep, "_depth", lambda *_, before=before: before + 1)
        model.zero_grad(set_to_none=True)
        peaks[before] = peak_live_bytes(lambda: objective(model, data, Rng(0, 0), 1.0)[0].backward())
    assert peaks[16] == peaks[2] <= 1.01 * peaks[1]


def test_the_mean_step_of_the_defaults_costs_at_most_1_6_single_passes() -> None:
    config = micro_config("--objective.name", "one_step")
    config.model.vocab_size = 61
    objective = OneStep(config)
    draws = [objective.passes(Rng(0, step), (step + 0.5) / 2000) for step in range(2000)]
    mean = sum(step_cost(config, passes).total for passes in draws) / len(draws)
    assert 1 < mean / step_cost(config, FLAT).total < 1.6  # no budget, so no cheaper steps at the beginning


@pytest.mark.parametrize(("key", "value", "message"), [
    ("next_token_share", "1.5", "objective.one_step.next_token_share must be in [0, 1], got 1.5"),
    ("skip_core", "-1", "objective.one_step.skip_core must be 0 or more, got -1.0"),
    ("first_probability", "-0.1", "objective.one_step.first_probability must be in [0, 1], got -0.1"),
    ("prior_iterations", "0", "objective.one_step.prior_iterations must be above 0, got 0"),
    ("corrupt_share", "0.6", "objective.one_step.corrupt_share must be at most 0.5"),
])  # fmt: skip
def test_mistakes(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("]", r"\]")):
        micro_config(f"--objective.one_step.{key}", value)
