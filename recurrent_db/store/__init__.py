"""What a run leaves on disk: checkpoints, metrics, its directory."""
