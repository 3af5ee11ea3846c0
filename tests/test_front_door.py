"""`import recurrent_db`: the public names, and that they are imported when they are used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import recurrent_db
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import generate
from recurrent_db.store.loading import load

PUBLIC = {"Config", "GenerationOptions", "UserError", "generate", "generate_texts", "load", "load_config", "train"}


def test_the_public_names() -> None:
    assert set(recurrent_db.__all__) == PUBLIC <= set(dir(recurrent_db))
    assert recurrent_db.UserError is UserError
    assert recurrent_db.generate is generate
    assert recurrent_db.load is load
    assert recurrent_db.load_config is load_config
    with pytest.raises(AttributeError, match="module 'recurrent_db' has no attribute 'lod'"):
        _ = recurrent_db.lod


def test_train_is_the_trainers() -> None:
    from recurrent_db.training.trainer import train

    assert recurrent_db.train is train


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, recurrent_db; recurrent_db.UserError; recurrent_db.load_config(None); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "False\n"


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    code = "import os, recurrent_db; print(os.environ['OMP_WAIT_POLICY'])"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert told == f"{expected}\n"


SCRIPTS = [path for folder in ("train", "eval", "tokenizers") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_the_package_before_torch(path: Path) -> None:
    """The wait policy is read when torch is loaded."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append((node.module or "").split(".")[0])
    loads_torch = {"torch", "safetensors", "transformers", "lm_eval"} & set(names)
    assert all(names.index("recurrent_db") < names.index(name) for name in loads_torch)
