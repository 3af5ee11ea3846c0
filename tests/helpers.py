"""What several tests build: models whose every parameter matters, data of seeded synthetic tokens, the trainer."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recurrent_db.config import Config, load_config
from recurrent_db.data import Batch, DataWriter
from recurrent_db.data.tokenizer import Tokenizer, train
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.objectives import Objective, build_objective
from recurrent_db.rng import Rng
from recurrent_db.store.checkpoint import save_checkpoint
from recurrent_db.store.train_state import TrainState
from recurrent_db.training import trainer

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("next_token", "unrolled", "one_step", "denoise")

MICRO = [
    "--model.d_model", "32", "--model.n_heads", "2", "--model.d_mlp", "48", "--model.max_seq_len", "32",
    "--model.d_condition", "16", "--data.sequence_length", "32", "--data.batch_size", "4",
    "--objective.unrolled.mean_depth", "4", "--objective.unrolled.truncation", "2",
    "--eval.k", "1", "2", "--eval.tokens", "512", "--eval.points", "2", "--run.device", "cpu", "--run.threads", "1",
]  # fmt: skip
"""Dotted options for a model of about 20 thousand parameters: a step takes milliseconds."""

BLOCKS = [
    "--objective.name", "denoise",
    "--model.n_prelude", "0", "--model.n_core", "4", "--model.n_coda", "0", "--model.expected_depth", "1",
    "--objective.denoise.conditioning", "two-stream", "--objective.denoise.grid", "edges",
]  # fmt: skip
"""More, for one of four layers in blocks."""


def load_script(path: str) -> ModuleType:
    """Import a script of train/, eval/ or benchmarks/ as a module."""
    name = "script_" + re.sub(r"\W", "_", path.removesuffix(".py"))
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def change_loss(patch: pytest.MonkeyPatch, change: Callable[[Tensor, Rng], Tensor]) -> None:
    """Make ``change(loss, rng)`` of every loss that the trainer gets of its objective."""

    def changed(config: Config) -> Objective:
        inner = build_objective(config)

        class Changed(type(inner)):  # type: ignore[misc]
            def __call__(self, model: Any, batch: Any, rng: Rng, progress: float) -> Any:
                loss, metrics = super().__call__(model, batch, rng, progress)
                return change(loss, rng), metrics

        inner.__class__ = Changed
        return inner

    patch.setattr(trainer, "build_objective", changed)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: single numbers read, shapes that depend on values."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split(".")[0] in self.WAITING
        return func(*args, **(kwargs or {}))


def micro_config(*overrides: object) -> Config:
    return load_config(None, [*MICRO, *map(str, overrides)])


def blocks_config(*overrides: object, n: int = 4) -> Config:
    """Four layers in ``n`` blocks."""
    return micro_config(*BLOCKS, "--model.n_blocks", n, *overrides)


def micro_model(config: Config, vocab_size: int = 61, spread: float = 0.3) -> tuple[LoopedLM, Objective]:
    """A float64 model with its recurrence; ``spread`` moves every parameter off its initial value."""
    config.model.vocab_size = vocab_size
    model = build_model(config.model, 0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    objective = build_objective(config)
    model.recurrence = objective.recurrence
    return model, objective


def batch(n: int = 4, length: int = 16, vocab_size: int = 61, start: int = 0) -> Batch:
    """Random tokens at the run's positions from ``start`` on."""
    ids = torch.randint(vocab_size, (n, length + 1), generator=torch.Generator().manual_seed(3))
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]), torch.arange(start, start + n))


def with_values(module: nn.Module) -> nn.Module:
    """A part by itself, its parameters drawn: layers are born without values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


def make_checkpoint(folder: Path, tokenizer: Tokenizer, objective: str, window: int, *options: str) -> Path:
    """A run of a small model that has never been trained, away from its initialisation, where noise hardly matters, but not
    so far that its iterations drive neighbouring states apart."""
    shape = ["--model.d_model", "32", "--model.n_heads", "2", "--model.d_mlp", "64", "--model.n_core", "1"]
    window_options = ["--model.max_seq_len", str(window), "--data.sequence_length", str(window)]
    config = load_config(None, [*MICRO, *shape, *window_options, "--objective.name", objective, *options])
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config.model, seed=0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters())
    state = build_objective(config).state_dict()
    save_checkpoint(folder, config, tokenizer, model, optimizer, None, TrainState(), state)
    return folder


def write_benchmarks(folder: Path, rows: int = 3) -> None:
    """Files of each benchmark's shape, made up."""
    (folder / "blimp").mkdir(parents=True)
    names = ["cat", "dog", "mouse", "naïve bird", "日", "cow", "hen"]
    for number in range(rows):
        name = names[number % len(names)]
        made = {
            "arc_easy_validation": {
                "question": f"Which is a colour of a {name}?",
                "choices": {"text": ["red", "seven", "loud", f"the {name}"], "label": ["A", "B", "C", "D"]},
                "answerKey": "ACBD"[number % 4],
            },
            "piqa_validation": {
                "goal": f"Open a jar for a {name}", "sol1": "Turn the lid.", "sol2": "Turn the jam.", "label": number % 2,
            },
            "blimp/first": {"sentence_good": f"The {name}s sleep.", "sentence_bad": f"The {name}s sleeps."},
            "blimp/second": {"sentence_good": f"A {name} saw her.", "sentence_bad": f"Her saw a {name}."},
            "lambada_test": {"text": f"The {name} saw the dog, and the dog saw the {name}"},
        }  # fmt: skip
        for file, row in made.items():
            with (folder / f"{file}.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({**row, "id": number}) + "\n")


def synthetic_tokenizer() -> Tokenizer:
    """A tokenizer trained on text that depends on nothing but this function."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, size=n)) for n in rng.integers(2, 9, size=300)]
    return Tokenizer.from_bytes(train([" ".join(rng.choice(words, size=200)) for _ in range(20)], 300))


def synthetic_data(folder: Path, tokens: int = 20_000, seed: int = 1) -> Path:
    """A data directory of a seeded Markov chain, the same under every Python: each token has four likely successors."""
    tokenizer = synthetic_tokenizer()
    rng = np.random.default_rng(seed)
    low, high = 16, tokenizer.vocab_size
    successors = rng.integers(low, high, size=(high, 4))
    with DataWriter(folder, tokenizer) as writer:
        for split, count in (("train", tokens), ("validation", tokens // 8)):
            choices = rng.choice(4, p=[0.6, 0.2, 0.1, 0.1], size=count)
            ids = [low]
            for choice in choices:
                ids.append(int(successors[ids[-1], choice]))
            for start in range(0, count, 500):
                part = ids[start : start + 500]
                writer.add(split, "default", f"{split}-{start}", tokenizer.decode_bytes(part), part)
        writer.commit()
    return folder


def browse(html: str, folder: Path) -> tuple[str, bool, bool]:
    """Open a page in headless Chromium: the document as parsed, whether it wrote to the console, whether it fetched."""
    folder.mkdir()
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", "--enable-logging=stderr",
        "--virtual-time-budget=1000", "--dump-dom", (folder / "page.html").as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    # Requests of a page that was opened from a file have the opaque origin; the browser's own have none.
    requests = re.findall(r'"initiator":\s*"(.*?)"', (folder / "net.json").read_text(errors="replace"))
    return result.stdout, ":CONSOLE" in result.stderr, "null" in requests
