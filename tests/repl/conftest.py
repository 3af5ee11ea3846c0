"""Untrained runs of each objective, for sessions on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import OBJECTIVES, make_checkpoint
from repl_runs import WINDOW, Loaded

from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.store.loading import load


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: make_checkpoint(root / name, tokenizer, name, WINDOW) for name in OBJECTIVES}


@pytest.fixture(scope="session")
def loaded(runs: dict[str, Path]) -> dict[str, Loaded]:
    return {name: load(run, "cpu") for name, run in runs.items()}
