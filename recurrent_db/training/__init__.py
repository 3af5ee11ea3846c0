"""The training loop, the data that it trains on, and the guard against bad steps."""
