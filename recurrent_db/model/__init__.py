"""The network: `looped.LoopedLM` and its parts."""

from recurrent_db.model.build import build_model
from recurrent_db.model.looped import LoopedLM

__all__ = ["LoopedLM", "build_model"]
