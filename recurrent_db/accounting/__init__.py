"""What training and inference cost: FLOPs, memory, hardware, plans before a run."""
