"""`denoise_paper`: `denoise` with the constants printed in arXiv 2506.14202 (`objective_config.DenoisePaperConfig`)."""

from recurrent_db.objectives.denoise import build

__all__ = ["build"]
