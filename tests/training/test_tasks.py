"""The task of training on text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import MICRO, synthetic_data

from recurrent_db.config import Config, load_config
from recurrent_db.distributed.team import Team
from recurrent_db.model.attention import Need
from recurrent_db.objectives import build_objective
from recurrent_db.training import tasks
from recurrent_db.training.tasks import TextTask

pytestmark = pytest.mark.fast

ALONE = Team("none", torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_data(tmp_path_factory.mktemp("data") / "data")


def config_of(data: Path, *more: object) -> Config:
    return load_config(None, [*MICRO, "--data.path", str(data), *map(str, more)])


@pytest.mark.parametrize(("asked", "short"), [(64, False), (2048, False), (100_000, True)])
def test_a_validation_split_shorter_than_asked_is_said(data: Path, asked: int, short: bool) -> None:
    config = config_of(data, "--eval.tokens", asked)
    task = TextTask(config, ALONE)
    line = " ".join(task.describe(task.build_model(build_objective(config), False)))
    assert ("the validation split is short: " in line and "eval.tokens = 100,000" in line) == short


@pytest.mark.parametrize("options", [(), ("--model.head-size", 10)])
def test_attention_is_chosen_for_the_size_of_a_head(
    data: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    needs, choose = list[Need](), tasks.choose
    monkeypatch.setattr(tasks, "choose", lambda name, need: (needs.append(need), choose(name, need))[1])
    config = config_of(data, *options)
    TextTask(config, ALONE).build_model(build_objective(config), False)
    expected = 10 if options else config.model.d_model // config.model.n_heads
    assert [need.head_size for need in needs] == [expected]
