"""The cost of training and inference: FLOPs, memory, hardware, and plans of runs before they start."""
