"""`denoise_paper`: `denoise` with the constants that arXiv 2506.14202 prints (objective_config.DenoisePaperConfig)."""

from recurrent_db.objectives.denoise import build

__all__ = ["build"]
