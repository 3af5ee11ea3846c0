"""Scores of a checkpoint: likelihood by K, the lm-eval harness, judged text."""
