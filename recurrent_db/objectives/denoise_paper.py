"""`denoise_paper`: `denoise` with the constants that arXiv 2506.14202 prints (config.DenoisePaperConfig)."""

from recurrent_db.objectives.denoise import build

__all__ = ["build"]
