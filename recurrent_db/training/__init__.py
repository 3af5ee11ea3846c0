"""The trainer, what it trains on, and what guards it."""
