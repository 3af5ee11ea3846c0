"""Several processes: training one model together, a watchdog for hangs, and work that is divided among processes."""
