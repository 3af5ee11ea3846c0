"""The files of a run: run directory, checkpoints, metrics."""
