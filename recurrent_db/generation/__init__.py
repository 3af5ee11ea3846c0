"""Text generation: decoders, key-value caches, samplers."""
