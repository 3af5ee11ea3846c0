"""The network: `looped.LoopedLM` and its parts."""

from recurrent_db.model.looped import LoopedLM, build_model

__all__ = ["LoopedLM", "build_model"]
