"""Optimizers, the learning-rate schedule, the exponential moving average of the weights."""
