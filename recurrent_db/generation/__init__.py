"""Text from a checkpoint: decoders, caches, samplers."""
