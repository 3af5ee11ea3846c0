"""Folders of checkpoints: what is found, what is refused, what is removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import micro_config

from recurrent_db.data import load_tokenizer
from recurrent_db.errors import UserError
from recurrent_db.model import build_model
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.store.checkpoint import save_checkpoint
from recurrent_db.store.folder import (
    begin_checkpoint,
    clean_leftovers,
    content_hash,
    fault,
    find_checkpoint,
    list_checkpoints,
    prune,
)
from recurrent_db.store.train_state import TrainState


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 1, 2 and 3."""
    config, tokenizer = micro_config("--run.keep", 3), load_tokenizer(data)
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config.model, 0)
    for step in (1, 2, 3):
        optimizer = build_optimizer(model, config.optim)
        save_checkpoint(tmp_path / "run", config, tokenizer, model, optimizer, None, TrainState(step=step), {})
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def test_an_interrupted_save_never_looks_like_a_checkpoint(run: Path) -> None:
    started = begin_checkpoint(run, 4)
    assert started is not None and started.is_dir()
    (started / "model.safetensors").write_bytes(b"half")
    assert names(run) == ["step-00000001", "step-00000002", "step-00000003"]
    assert find_checkpoint(run).name == "step-00000003"
    clean_leftovers(run)
    assert not started.exists()
    assert begin_checkpoint(run, 3) is None  # a good one is there already


def test_all_but_the_newest_are_pruned(run: Path) -> None:
    prune(run, 2)
    assert names(run) == ["step-00000002", "step-00000003"]
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_manifest_that_was_changed_or_has_no_digest_is_altered(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in ({"step": 9}, {"digest": "0"}, {"digest": None}):
        changed = {name: value for name, value in {**manifest, **change}.items() if value is not None}
        path.write_text(json.dumps(changed, indent=1))
        assert fault(checkpoint) == "manifest.json was altered (checksum)"
    path.write_text(json.dumps(manifest, indent=1))
    assert fault(checkpoint) is None


def test_a_damaged_newest_checkpoint_is_skipped_or_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step-00000003/model.safetensors").write_bytes(b"")
    assert find_checkpoint(run).name == "step-00000002"
    assert "step-00000003 is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="--resume last-good uses the newest undamaged one"):
        find_checkpoint(run, fall_back=False)


def test_copies_have_the_same_content_hash_and_the_optimizer_does_not_matter(run: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert content_hash(copy) == content_hash(checkpoint)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["slots.safetensors"] = {"sha256": "0" * 64}
    for name, same in (("optimizer.safetensors", True), ("model.safetensors", False)):
        manifest["files"][name]["sha256"] = "0" * 64
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert (content_hash(copy) == content_hash(checkpoint)) == same
