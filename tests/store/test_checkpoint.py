"""A checkpoint holds everything that continues a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import batch, micro_config

from recurrent_db.accounting.flop_count import FlopCount
from recurrent_db.config import Config
from recurrent_db.data import load_tokenizer
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.model import build_model
from recurrent_db.model.looped import LoopedLM
from recurrent_db.objectives import build_objective
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.rng import Rng
from recurrent_db.store.checkpoint import Checkpoint, Saver, load_checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.tensors import load_weights, optimizer_tensors
from recurrent_db.store.train_state import TrainState

pytestmark = pytest.mark.fast


def trained(config: Config, tokenizer: Tokenizer) -> tuple[LoopedLM, torch.optim.Optimizer, EMA]:
    """A model after one step, with its optimizer and average."""
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config.model, 0)
    optimizer, ema = build_optimizer(model, config.optim), EMA(model, 0.9)
    loss, _ = build_objective(config)(model, batch(2), Rng(0, 0), 0.9)
    loss.backward()
    optimizer.step()
    ema.update(model, torch.zeros((), dtype=torch.bool))
    return model, optimizer, ema


def test_what_was_saved_comes_back_bit_for_bit(data: Path, tmp_path: Path) -> None:
    config, tokenizer = micro_config(), load_tokenizer(data)
    model, optimizer, ema = trained(config, tokenizer)
    state = TrainState(step=1, tokens=64, flops=FlopCount(1.5, 2.5, 1.0, 0.5, 3.0, 4.0), loss_mean=2.25)
    saver = Saver(tmp_path, config, tokenizer)
    saver.save(model, optimizer, ema, state, {"learned": [1, 2]})
    saver.finish()
    checkpoint = Checkpoint(find_checkpoint(tmp_path))
    assert checkpoint.training() == (state, {"learned": [1, 2]}, ema.updates)
    assert checkpoint.tokenizer().hash == tokenizer.hash
    assert checkpoint.config() == config

    other = build_model(config.model, 1)
    other_optimizer, other_ema = build_optimizer(other, config.optim), EMA(other, 0.9)
    load_checkpoint(checkpoint, other, other_optimizer, other_ema)
    for ours, theirs in (
        (dict(model.named_parameters()), dict(other.named_parameters())),
        (optimizer_tensors(model, optimizer), optimizer_tensors(other, other_optimizer)),
        (ema.shadow, other_ema.shadow),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_of_another_shape_are_refused_by_name() -> None:
    config = micro_config()
    config.model.vocab_size = 61
    model = build_model(config.model, 0)
    weights = dict(model.state_dict())
    with pytest.raises(UserError, match=r"x has no parameter final_norm\.weight"):
        load_weights(model, {name: t for name, t in weights.items() if name != "final_norm.weight"}, "x")
    with pytest.raises(UserError, match="x has a parameter wings that this model lacks"):
        load_weights(model, {**weights, "wings": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match=r"x: final_norm\.weight has shape \(1,\)"):
        load_weights(model, {**weights, "final_norm.weight": torch.zeros(1)}, "x")
    load_weights(model, {**weights, "wings": torch.zeros(1)}, "x", allow_new=("wings",))
