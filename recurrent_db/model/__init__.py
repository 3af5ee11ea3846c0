"""The network: `looped.LoopedLM`, its parts, and `blocks_lm.BlocksLM` for a model in blocks."""

from recurrent_db.model.build import build_model
from recurrent_db.model.looped import LoopedLM

__all__ = ["LoopedLM", "build_model"]
