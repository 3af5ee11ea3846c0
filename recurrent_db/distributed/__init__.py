"""Several processes: the team that trains one model, its watchdog, and shared lists of work."""
