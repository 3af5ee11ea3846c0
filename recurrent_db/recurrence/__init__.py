"""Inference with K iterations: the plain loop, and the walk over noise levels."""
