"""Planned memory of a training step against what steps really hold."""

from __future__ import annotations

import pytest
from helpers import ROOT, load_script

from recurrent_db.accounting.step_memory import PARTS, Sizes, Step
from recurrent_db.config import load_config
from recurrent_db.model import build_model

benchmark = load_script("benchmarks/speed/footprint.py")


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: f"{case[0]}: {case[1]} {case[2] or ''}")
def test_planned_memory_is_what_a_step_holds(case: tuple[str, str, dict[str, object]]) -> None:
    shape, step, more = case
    measured, predicted, state = benchmark.measure(shape, step, **more)
    assert predicted == pytest.approx(measured, rel=0.05)
    assert predicted - state == pytest.approx(measured - state, rel=0.05)  # weights and optimizer hide nothing


@pytest.mark.parametrize("step", ["next_token", "denoise, two-stream"])
@pytest.mark.parametrize(
    "options",
    [
        "--model.layer llama --model.n_kv_heads 2 --model.qk_norm true --model.tied false",
        "--model.layer llama --model.v_bias true",
        "--model.layer neox",
    ],
)
def test_memory_of_other_layers(monkeypatch: pytest.MonkeyPatch, step: str, options: str) -> None:
    shape = "d 128, 2/4/2"
    monkeypatch.setitem(benchmark.SHAPES, shape, f"{benchmark.SHAPES[shape]} {options}")
    measured, predicted, state = benchmark.measure(shape, step)
    assert predicted - state == pytest.approx(measured - state, rel=0.05)


def test_sizes_are_the_models() -> None:
    config = load_config(ROOT / "train/configs/pythia-70m-looped.toml")
    sizes, counts = Sizes.of(config), build_model(config.model, None, "meta").parameter_counts()
    assert sizes.total == counts["total"] + counts["noise_conditioning"]
    assert sizes.core == counts["core"] + counts["adapter"]
    assert sizes.ends * sizes.block == counts["prelude"] + counts["coda"]


def test_shards_divide_what_is_kept_and_not_what_is_computed_with() -> None:
    config = load_config(ROOT / "train/configs/pythia-70m-looped.toml")
    whole = Step(config, 4, 2, mode="ddp", half=True, cuda=True).timeline()
    eight = Step(config, 4, 2, mode="fsdp", shards=8, half=True, cuda=True).timeline()
    for part in ("parameters", "optimizer"):
        assert eight.peak[part] == pytest.approx(whole.peak[part] / 8, abs=8)
    assert eight.peak["activations"] == whole.peak["activations"]
    assert eight.peak["gathered"] > 0
    assert set(eight.peak) <= set(PARTS)
    for line in (whole, eight):  # all that a step took for itself is given back
        left = {part for part, size in line.held.items() if abs(size) > 64}
        assert left == {"parameters", "optimizer"}
