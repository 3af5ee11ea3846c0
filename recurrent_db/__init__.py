"""recurrent_db: pretraining, scoring and generation with looped language models.

>>> import recurrent_db
>>> model, tokenizer = recurrent_db.load("runs/demo/denoise")          # doctest: +SKIP
>>> recurrent_db.generate(model, tokenizer, "def main(", k=4)          # doctest: +SKIP
>>> config = recurrent_db.load_config("train/configs/tiny.toml")       # doctest: +SKIP
>>> recurrent_db.train(config)                                         # doctest: +SKIP

Each name in ``__all__`` is imported at its first use, so that importing the package does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurrent_db.config import Config, load_config
    from recurrent_db.errors import UserError
    from recurrent_db.generation.generate import generate, generate_texts
    from recurrent_db.generation.options import GenerationOptions
    from recurrent_db.store.loading import load
    from recurrent_db.training.trainer import train

__all__ = ["Config", "GenerationOptions", "UserError", "generate", "generate_texts", "load", "load_config", "train"]
__version__ = "0.1.0"

_MODULES = {
    "Config": "config",
    "GenerationOptions": "generation.options",
    "UserError": "errors",
    "generate": "generation.generate",
    "generate_texts": "generation.generate",
    "load": "store.loading",
    "load_config": "config",
    "train": "training.trainer",
}
"""The module that defines each public name."""

# After each operation OpenMP's threads wait for each other, by default in a busy loop. On a machine with other work, a busy
# thread takes the core from the thread that it waits for, and training takes many times as long (benchmarks/speed/busy.py).
# The OpenMP runtime reads this variable once, when torch is loaded, so this package must be imported before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
