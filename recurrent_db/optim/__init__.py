"""Optimizers, the learning-rate schedule, the weight average."""
