"""Objectives: what they draw, that they learn, and that draws depend on nothing but (seed, step, sample)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import OBJECTIVES, batch, micro_config, micro_model

from recurrent_db.denoise.precond import Precond
from recurrent_db.evaluation.likelihood import token_log_probabilities
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.denoise import mean_pairwise_cosine, noised
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

DRAWN_PER_SAMPLE = ("unrolled", "one_step", "denoise")
"""Objectives that draw numbers for each sample. Others draw one number for a whole step, or none."""


@pytest.mark.parametrize("objective", [*OBJECTIVES, "denoise_paper"])
def test_micro_batches_change_no_draw(objective: str) -> None:
    config = micro_config("--objective.name", objective)
    model, train = micro_model(config, spread=0.1)
    whole = batch()
    loss, _ = train(model, whole, Rng(0, 5), 0.0)
    parts = [train(model, whole.slice(i, i + 2), Rng(0, 5), 0.0)[0] for i in (0, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_is_a_function_of_seed_step_and_sample(objective: str) -> None:
    noise = ["--objective.one_step.corrupt_share", "0.2"]
    model, train = micro_model(micro_config("--objective.name", objective, *noise), spread=0.1)
    first = train(model, batch(), Rng(0, 5), 0.0)[0]
    assert torch.equal(first, train(model, batch(), Rng(0, 5), 0.0)[0])
    if objective in DRAWN_PER_SAMPLE:
        assert not torch.equal(first, train(model, batch(), Rng(0, 6), 0.0)[0])
        assert not torch.equal(first, train(model, batch(), Rng(1, 5), 0.0)[0])
        assert not torch.equal(first, train(model, batch(start=4), Rng(0, 5), 0.0)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
def test_every_parameter_gets_a_gradient(objective: str, injection: str) -> None:
    """No parameter is left out of any objective, or data-parallel training would need to search for it."""
    config = micro_config("--objective.name", objective, "--model.injection", injection)
    model, train = micro_model(config, spread=0.1)
    train(model, batch(), Rng(0, 5), 0.0)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_repeated_batch_is_learned_through_the_context(objective: str) -> None:
    """Scored from noise (for `one_step` at sigma_max), so only the context can carry the answer: below 0.1 nats."""
    config = micro_config("--objective.name", objective)
    config.model.vocab_size = 61
    model = build_model(config.model, 0)
    train = build_objective(config)
    model.recurrence = train.recurrence
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    data = batch()
    data.tokens_BT[:, 0] = torch.arange(4)  # sequences that start alike could not be told apart
    k = 1 if objective == "one_step" else train.default_k  # `one_step` begins with the first iteration
    for step in range(400):
        loss, _ = train(model, data, Rng(0, step), 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                scored = token_log_probabilities(
                    model, data.tokens_BT, data.targets_BT, [k], Rng(0, EVALUATION_STEP), data.sample_index_B
                )
            nll = -scored[k].mean().item()
            if nll < 0.1:
                break
    assert nll < 0.1


def test_denoise_loss_splits_off_its_next_token_part() -> None:
    config = micro_config("--objective.name", "denoise", "--objective.denoise.atom", "1")
    model, train = micro_model(config, spread=0.1)
    loss, metrics = train(model, batch(), Rng(0, 0), 0.0)
    total, weight = metrics["loss_sigma_max"].tolist()
    assert total / weight == pytest.approx(loss.item(), rel=1e-5)
    config.objective.denoise.atom = 0.0
    assert build_objective(config)(model, batch(), Rng(0, 0), 0.0)[1]["loss_sigma_max"].tolist() == [0.0, 0.0]


def test_a_noised_target_is_the_unit_row_and_its_noise() -> None:
    rows, eps = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[1.0, -1.0], [0.5, 0.0]]])
    z = noised(rows, eps, torch.tensor([[10.0]]))
    torch.testing.assert_close(z, torch.tensor([[[10.6, -9.2], [5.0, 1.0]]]))


def test_the_noisy_target_fades_with_sigma() -> None:
    """At tiny sigma an untrained denoiser already reads the answer off z; at sigma_max it cannot."""
    config = micro_config("--objective.name", "denoise")
    config.model.vocab_size = 61
    model = build_model(config.model, 0)
    losses = {}
    for name, low, high in (("low", 0.001, 0.002), ("high", 1e4, 2e4)):
        config.objective.denoise.sigma_min, config.objective.denoise.sigma_max = low, high
        config.objective.denoise.p_mean, config.objective.denoise.atom = math.log(low), 0.0
        losses[name] = build_objective(config)(model, batch(), Rng(0, 0), 0.0)[0].item()
    assert losses["low"] < 1.5 < 3.5 < losses["high"]


def test_the_trainer_warns_when_most_draws_teach_copying() -> None:
    config = micro_config("--objective.name", "denoise_paper")
    config.objective.denoise_paper.p_mean = -4.0
    config.model.vocab_size = 61
    lines = build_objective(config).describe(build_model(config.model, 0))
    assert lines[1].startswith("warning: ")
    quiet = micro_config("--objective.name", "denoise")
    quiet.model.vocab_size = 61
    assert len(build_objective(quiet).describe(build_model(quiet.model, 0))) == 1


@pytest.mark.parametrize("conditioning", ["inject", "two-stream"])
def test_the_method_trains_every_parameter(conditioning: str) -> None:
    config = micro_config("--objective.name", "denoise", "--objective.denoise.conditioning", conditioning)
    model, train = micro_model(config, spread=0.1)
    loss, metrics = train(model, batch(), Rng(0, 5), 0.0)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.isfinite(loss)
    assert {"loss_sigma_max", "loss_cross_entropy", "target_cosine"} <= metrics.keys()
    parts = [train(model, batch().slice(i, i + 2), Rng(0, 5), 0.0)[0] for i in (0, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("conditioning", ["inject", "two-stream"])
def test_noise_stays_fp32_under_bfloat16_autocast(conditioning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sigma, z, the scalings, the modulation and the loss are fp32, and all that comes before the network is bit for bit
    that of an fp32 step; the network is not."""
    config = micro_config("--objective.name", "denoise", "--objective.denoise.conditioning", conditioning)
    model, train = micro_model(config, spread=0.1)
    model = model.float()
    embed = model.noise_embedding
    assert embed is not None
    noted: dict[bool, dict[str, list[torch.Tensor]]] = {False: {}, True: {}}

    def note(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            results = [part for block in out for part in block] if isinstance(out, list) else [out]
            given = [one for one in args if isinstance(one, torch.Tensor)]
            noted[torch.is_autocast_enabled("cpu")].setdefault(name, []).extend([*given, *results])
            return out

        monkeypatch.setattr(owner, name, noting)

    for name in ("view", "c_noise", "c_skip", "c_out", "c_in", "loudness", "combine"):
        note(Precond, name)
    note(embed, "forward")
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(train(model, batch(), Rng(0, 3), 0.0)[0])
    exact, rounded = noted[False], noted[True]
    assert (
        exact.keys()
        == rounded.keys()
        == {"view", "c_noise", "c_skip", "c_out", "c_in", "loudness", "combine", "forward"}
    )
    for name in exact.keys() - {"combine"}:
        for ours, theirs in zip(rounded[name], exact[name], strict=True):
            assert ours.dtype == torch.float32, name
            assert torch.equal(ours, theirs), name
    z, state, sigma, estimate = rounded["combine"]
    assert {z.dtype, sigma.dtype, estimate.dtype, losses[1].dtype} == {torch.float32}
    precond = train.precond  # type: ignore[attr-defined]
    assert torch.equal(estimate, precond.c_skip(sigma) * z + precond.c_out(sigma) * state.float())
    assert not torch.equal(state.float(), exact["combine"][1])
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


def test_collapse_is_what_the_cosine_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(200, 32, generator=generator)
    unit = torch.nn.functional.normalize(spread, dim=-1)
    cosines = (unit @ unit.T)[~torch.eye(200, dtype=torch.bool)]
    assert mean_pairwise_cosine(spread).item() == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert mean_pairwise_cosine(spread * 0.01 + 1).item() > 0.99


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_refuses_state_that_is_not_its_own(objective: str) -> None:
    train = build_objective(micro_config("--objective.name", objective))
    train.load_state_dict(train.state_dict())
    with pytest.raises((ValueError, KeyError, TypeError)):
        train.load_state_dict({"x": 1})
