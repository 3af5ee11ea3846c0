"""`import recurrent_db`: the public names, and that they are imported when they are used."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import recurrent_db
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.generation.generate import generate
from recurrent_db.store.loading import load

PUBLIC = {"Config", "UserError", "generate", "generate_texts", "load", "load_config", "train"}


def test_the_public_names() -> None:
    assert set(recurrent_db.__all__) == PUBLIC <= set(dir(recurrent_db))
    assert recurrent_db.UserError is UserError
    assert recurrent_db.generate is generate
    assert recurrent_db.load is load
    assert recurrent_db.load_config is load_config
    with pytest.raises(AttributeError, match="module 'recurrent_db' has no attribute 'lod'"):
        _ = recurrent_db.lod


@pytest.mark.skipif(
    importlib.util.find_spec("recurrent_db.training.trainer") is None, reason="the trainer is still a script"
)
def test_train_is_the_trainers() -> None:
    from recurrent_db.training.trainer import train

    assert recurrent_db.train is train


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, recurrent_db; recurrent_db.UserError; recurrent_db.load_config(None); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "False\n"
