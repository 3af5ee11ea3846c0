"""What K iterations do at inference: the loop, and the walk over noise levels."""
