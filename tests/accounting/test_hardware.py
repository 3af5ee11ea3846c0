"""Peak rates by device name, what utilisation is a share of, and the energy meter with a stand-in for NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import micro_config, synthetic_data

from recurrent_db.accounting.hardware import (
    EnergyMeter,
    UpdateClock,
    choose_device,
    measured_matmul_flops,
    peak_flops,
    table_peak_flops,
)
from recurrent_db.errors import UserError
from recurrent_db.store.metrics import read_metrics
from recurrent_db.training import trainer

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        # A longer name is another device, and a slice is not the whole.
        ("NVIDIA A10G", None),
        ("NVIDIA H20", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4070", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peak_rates_by_name(monkeypatch: pytest.MonkeyPatch, name: str, tera: float | None) -> None:
    assert table_peak_flops(name) == (None if tera is None else pytest.approx(tera * 1e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA) == table_peak_flops(name)
    assert peak_flops(CUDA, override=7e12) == 7e12


def test_utilisation_is_a_share_of_the_given_peak(tmp_path: Path) -> None:
    data = synthetic_data(tmp_path / "data")
    for peak in (1e9, 8e9):
        run = tmp_path / f"{peak}"
        trainer.train(
            micro_config("--data.path", data, "--run.dir", run, "--run.peak_flops", peak, "--budget.steps", 3,
                         "--eval.points", 0)
        )  # fmt: skip
        rows = read_metrics(run / "metrics.jsonl")
        for before, row in zip([{"flops": 0, "flops_recomputed": 0, "tokens": 0}, *rows], rows, strict=False):
            tokens = row["tokens"] - before["tokens"]
            flops, again = (row[key] - before[key] for key in ("flops", "flops_recomputed"))
            assert row["mfu"] == pytest.approx(flops / tokens * row["tokens_per_s"] / peak)
            assert row["hfu"] == pytest.approx((flops + again) / tokens * row["tokens_per_s"] / peak)
            assert row["hfu"] > row["mfu"]


# ---------------------------------------------------------------------------------------------------------------------
# Energy


class NVML:
    """A stand-in for pynvml: a counter in millijoules that the test turns, and that fails where told."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.millijoules, self.asked = fails, 5_000, ""

    def _at(self, place: str) -> None:
        if place == self.fails:
            raise RuntimeError(f"NVML: {place}")

    def nvmlInit(self) -> None:
        self._at("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._at("handle")
        self.asked = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        self._at("read")
        return self.millijoules


def install(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))


def test_joules_are_differences_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = NVML()
    install(monkeypatch, nvml)
    meter = EnergyMeter(CUDA)
    assert nvml.asked == "GPU-12-34"
    used = []
    for millijoules in (7_500, 7_500, 1_007_500):
        nvml.millijoules = millijoules
        used.append(meter.joules())
    assert used == [2.5, 0.0, 1000.0]


@pytest.mark.parametrize("fails", ["init", "handle", "read"])
def test_energy_is_unknown_where_nvml_fails(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    install(monkeypatch, NVML(fails))
    assert EnergyMeter(CUDA).joules() is None


def test_energy_is_unknown_without_the_package_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)  # import pynvml raises ImportError
    assert EnergyMeter(CUDA).joules() is None
    install(monkeypatch, NVML())
    assert EnergyMeter(torch.device("cpu")).joules() is None


def test_a_counter_that_fails_midway_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = NVML()
    install(monkeypatch, nvml)
    meter = EnergyMeter(CUDA)
    nvml.millijoules += 1_000
    assert meter.joules() == 1.0
    nvml.fails = "read"
    assert meter.joules() is None
    nvml.fails, nvml.millijoules = "", nvml.millijoules + 9_000
    assert meter.joules() is None  # what it missed would be counted as one step's


def test_a_runs_energy_adds_up_over_resumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = synthetic_data(tmp_path / "data")
    monkeypatch.setattr(trainer, "EnergyMeter", lambda device: SimpleNamespace(joules=lambda: 2.5))
    options = ["--data.path", data, "--run.dir", tmp_path / "run", "--run.log_every", 2, "--eval.points", 0,
               "--objective.name", "next_token"]  # whose steps all take the same  # fmt: skip
    trainer.train(micro_config(*options, "--budget.steps", 4))
    trainer.train(micro_config(*options, "--budget.steps", 8), resume="newest")
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["energy_joules"] for row in rows] == pytest.approx([1.25 * n for n in range(1, 9)])


class Event:
    """A CUDA event of a device that lags behind the host: recorded at once, done a second of its own time later."""

    now, waited = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


def test_the_updates_share_is_the_devices_and_is_read_at_log_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = UpdateClock(CUDA)
    for forward, update, between in ((6, 2, 50), (9, 3, 50), (1, 3, 50)):
        for pause in (forward, update, between):
            clock.mark()
            Event.now += pause
        if forward == 9:
            assert Event.waited == 0
            assert clock.share() == pytest.approx(5 / 20)
    assert clock.share() == pytest.approx(3 / 4)
    assert Event.waited == 2
    assert (clock.update_seconds, clock.step_seconds) == pytest.approx((8, 24))


@pytest.mark.parametrize(
    "name",
    [
        "mps", "mps:0", "xpu", "meta", "hpu", "privateuseone", "xla", "vulkan", "cpu:1", "cuda:99", "cuda:-1", "cuda:",
        "cuda:0:0", "cuda:99999999999999999999", "CUDA", "cpu ", "gpu", "0", "", "cuda:\u0661",
    ],
)  # fmt: skip
def test_other_devices_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^device .* (not supported: use cpu, cuda|does not exist: this machine has)"):
        choose_device(name)


def test_devices_of_this_machine() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_busy_machine_has_a_measured_peak_too() -> None:
    """Even if the time is up before the first product."""
    assert measured_matmul_flops(size=8, seconds=0.0) > 0
