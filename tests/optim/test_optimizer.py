"""Muon beside AdamW: who is updated by which, skipped steps that change nothing, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import batch, micro_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.config import Config
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.optimizer import MuonAdamW, build_optimizer, hidden_matrices, parameter_groups, update_flops
from recurrent_db.rng import Rng

pytestmark = pytest.mark.fast


def muon_config(*more: object) -> Config:
    config = micro_config("--optim.name", "muon", *more)
    config.model.vocab_size = 61
    return config


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def copies(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    states = {f"{names[id(p)]}/{k}": v.clone() for p, s in optimizer.state.items() for k, v in s.items()}
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, **states}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("injection", ["linear", "diagonal", "add"])
def test_muon_has_the_matrices_of_blocks_and_adapter(injection: str) -> None:
    config = muon_config("--model.injection", injection)
    model = build_model(config.model, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for p in hidden_matrices(model)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
    blocks = [
        f"{block}.{part}.weight"
        for block in ("prelude.0", "core.blocks.0", "core.blocks.1", "coda.0")
        for part in parts
    ]
    assert hidden == {*blocks, *(["core.injection.adapter.weight"] if injection != "add" else [])}
    optimizer = build_optimizer(model, config.optim)
    assert isinstance(optimizer, MuonAdamW)
    by_group = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(by_group) == sorted(names)
    assert {names[id(p)] for muon in optimizer.muons for p in muon.param_groups[0]["params"]} == hidden
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, m in model.named_parameters() if name.removesuffix(".weight") in
                       {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}}  # fmt: skip


def test_adamw_is_what_it_was() -> None:
    config = micro_config()
    config.model.vocab_size = 61
    optimizer = build_optimizer(build_model(config.model, 0), config.optim)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]


def separately(model: LoopedLM, config: Config) -> list[torch.optim.Optimizer]:
    """PyTorch's own Muon and AdamW over the same parameters."""
    hidden = {id(p) for p in hidden_matrices(model)}
    rest = parameter_groups(model, config.optim.weight_decay)
    for group in rest:
        group["params"] = [p for p in group["params"] if id(p) not in hidden]
    o = config.optim
    muon = torch.optim.Muon(
        hidden_matrices(model), lr=o.lr, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]


@pytest.mark.parametrize("flag", [True, False])
def test_steps_are_pytorchs_and_skipped_ones_change_nothing(flag: bool) -> None:
    """With ``found_inf`` 0 or unset bit for bit theirs; with 1 no bit moves, whatever the gradients hold."""
    config = muon_config()
    model, reference = build_model(config.model, 0), build_model(config.model, 0)
    optimizer, theirs = build_optimizer(model, config.optim), separately(reference, config)
    skipped = {0, 3, 4} if flag else set()
    for step in range(7):
        for group in [*optimizer.param_groups, *(g for other in theirs for g in other.param_groups)]:
            group["lr"] = 1e-2 * (step + 1)
        set_gradients(model, step)
        if step in skipped:
            for p, bad in zip(model.parameters(), [float("nan"), float("inf"), 1.0] * 99, strict=False):
                p.grad.view(-1)[0] = bad  # type: ignore[union-attr]
        if flag:
            optimizer.found_inf = torch.tensor(float(step in skipped))  # type: ignore[union-attr]
        before = copies(model, optimizer)
        optimizer.step()
        after = copies(model, optimizer)
        if step == 0 and flag:  # the state is made now, and is the state of no step
            assert not any(value.any() for name, value in after.items() if "/" in name)
            after = {name: value for name, value in after.items() if "/" not in name}
        if step in skipped:
            assert_equal(before, after)
            continue
        set_gradients(reference, step)
        for other in theirs:
            other.step()
        parts = {key: value for other in theirs for key, value in copies(reference, other).items()}
        assert_equal(after, parts)
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_reads_nothing_back() -> None:
    """Under fake tensors, which have no values, reading one raises: so no step makes the host wait for the device."""
    config = muon_config()
    with FakeTensorMode():
        model = LoopedLM(config.model)
        optimizer: Any = build_optimizer(model, config.optim)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()


def test_newton_schulz_is_what_the_counter_sees() -> None:
    for shape in ((24, 8), (8, 24), (16, 16), (40, 17)):
        layer = nn.Linear(shape[1], shape[0], bias=False)
        layer.weight.grad = torch.randn(shape)
        muon = torch.optim.Muon([layer.weight])
        with FlopCounterMode(display=False) as counter:
            muon.step()
        flops = update_flops(layer, muon_config().optim)
        assert flops["newton_schulz"] == pytest.approx(counter.get_total_flops(), rel=1e-3)
        assert flops["adamw"] == 0
        assert flops["muon"] == 12 * layer.weight.numel()


def test_newton_schulz_of_a_model_is_what_the_counter_sees() -> None:
    config = muon_config()
    model = build_model(config.model, 0)
    optimizer, flops = build_optimizer(model, config.optim), update_flops(model, config.optim)
    set_gradients(model, 0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert flops["newton_schulz"] == pytest.approx(counter.get_total_flops(), rel=1e-3)
    hidden = sum(p.numel() for p in hidden_matrices(model))
    assert flops["muon"] == 12 * hidden
    assert flops["adamw"] == 14 * (sum(p.numel() for p in model.parameters()) - hidden)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_learn_at_the_same_rate(name: str) -> None:
    """One batch by heart: the loss falls below half of the start's."""
    config = muon_config("--objective.name", "next_token", "--optim.lr", "1e-2", "--optim.name", name)
    model, objective, micro = build_model(config.model, 0), build_objective(config), batch()
    optimizer, losses = build_optimizer(model, config.optim), []
    for step in range(40):
        loss, _ = objective(model, micro, Rng(0, step), 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
